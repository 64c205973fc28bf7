"""From a model's name to a faster engine: the other commands, one after the other, resumable."""
