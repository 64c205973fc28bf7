"""Copies experts from pinned host memory into slots, by a kernel that reads the host itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = torch.int64
BLOCK_WORDS = 1024


@triton.jit
def _fetch_kernel(rows, slots, source, target, num_words, BLOCK: tl.constexpr):
    expert = tl.load(source + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        slot = tl.load(target + tl.program_id(1)).to(tl.int64)
        for block in range(tl.program_id(0), tl.cdiv(num_words, BLOCK), tl.num_programs(0)):
            words = block * BLOCK + tl.arange(0, BLOCK)
            is_word = words < num_words
            values = tl.load(rows + expert * num_words + words, mask=is_word)
            tl.store(slots + slot * num_words + words, values, mask=is_word)


def fetch(rows: Tensor, slots: Tensor, source: Tensor, target: Tensor, *, num_blocks: int) -> None:
    """Copy the planned experts; programs with nothing to copy end at once.

    Args:
        rows: Host weights, [E, row_bytes] uint8, pinned (or on the device).
        slots: [S, row_bytes] uint8, on the device.
        source: Expert to copy or -1, [N] int32.
        target: Slot to copy it to, [N] int32.
        num_blocks: Thread blocks per expert: enough to fill the link, few enough to leave the
            GPU's multiprocessors to compute that runs beside.
    """
    grid = (num_blocks, source.numel())
    _fetch_kernel[grid](
        rows.view(WORD),
        slots.view(WORD),
        source,
        target,
        rows.shape[1] // WORD.itemsize,
        BLOCK=BLOCK_WORDS,
        num_warps=4,
    )


def fetch_reference(rows: Tensor, slots: Tensor, source: Tensor, target: Tensor) -> None:
    """What `fetch` does, in plain PyTorch."""
    for expert, slot in zip(source.tolist(), target.tolist(), strict=True):
        if expert >= 0:
            slots[slot].copy_(rows[expert])
