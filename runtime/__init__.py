"""Phase three, second half: run an MoE with its experts in host memory, fetched ahead of need."""
