"""The command `foreroute generate`: a prompt in, text out as it comes."""
