"""Triton kernels that keep decisions on the device, each with a plain PyTorch reference.

On a CPU they run under `TRITON_INTERPRET=1`, which is how CI tests them.
"""
