"""What a machine can do and what a model needs: `foreroute profile` and `foreroute plan`."""
