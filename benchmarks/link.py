"""How fast plain copies from pinned host memory are."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def link_bandwidth(rows: Tensor, device: torch.device) -> float:
    """GB/s of copies of one layer's experts, the better of two.

    Args:
        rows: Host weights, [E, row_bytes] uint8, pinned for a GPU.
        device: Where they go.
    """
    target = torch.empty_like(rows, device=device)
    best = 0.0
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(rows, non_blocking=True)
        synchronize(device)
        best = max(best, rows.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize()
