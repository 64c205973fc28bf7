"""CUDA streams that engines use one after the other."""

from __future__ import annotations

import weakref

import torch

_FREE: dict[tuple[torch.device, int], list[torch.cuda.Stream]] = {}


def borrow_stream(device: torch.device, owner: object, *, priority: int = 0) -> torch.cuda.Stream:
    """A stream that nobody else has until its owner is gone.

    cuBLAS keeps 32 MiB for every stream it ever multiplied on: a new one for each engine would
    leave that much behind each time.

    Args:
        device: The GPU.
        owner: When it goes, the stream is free for others.
        priority: Of the stream; -1 comes before 0.
    """
    free = _FREE.setdefault((device, priority), [])
    stream = free.pop() if free else torch.cuda.Stream(device=device, priority=priority)
    weakref.finalize(owner, free.append, stream).atexit = False
    return stream
