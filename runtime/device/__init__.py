"""Decides on the GPU: residency, eviction, fetches, prediction and products inside one CUDA graph.

`driver` is the way in. `kernels` hold the Triton kernels, `fusions` put some of them in the
place of the model's own code.
"""
