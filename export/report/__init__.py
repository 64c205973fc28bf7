"""What `foreroute report` writes: one page of pictures and tables about finished runs."""
