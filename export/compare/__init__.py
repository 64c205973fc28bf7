"""What `foreroute compare-predictors` and `foreroute score` do: predictors side by side."""
