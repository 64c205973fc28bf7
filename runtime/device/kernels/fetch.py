"""Copies experts from pinned host memory into slots, by programs that read the host themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.tables import HEAD, ONLY_HEAD, ONLY_TAIL, TAIL, WHOLE

WORD = torch.int64
BLOCK_WORDS = 1024
MOST_TRIES = tl.constexpr(1 << 15)
"""Looks of one program at a counter before `let_pass` goes on all the same, some tens of ms."""


@triton.jit
def copy_blocks(  # noqa: ANN201
    rows,
    slots,
    expert,
    slot,
    first,
    last,
    end,
    num_words,
    program,
    num_programs,
    BLOCK: tl.constexpr,
):
    """Copy every `num_programs`-th block of [first, last) of one expert, up to word `end`.

    Pairs of words, which no other tile of a kernel is made of: a tile of `BLOCK` words shared its
    layout with a product's tile of as many inputs, and then crossed the link at two thirds.
    """
    pairs = 2 * tl.arange(0, BLOCK // 2)[:, None] + tl.arange(0, 2)[None, :]
    for block in range(first + program, last, num_programs):
        words = block * BLOCK + pairs
        is_word = words < end
        values = tl.load(rows + expert * num_words + words, mask=is_word)
        tl.store(slots + slot * num_words + words, values, mask=is_word)


@triton.jit
def let_pass(progress):  # noqa: ANN201
    """Wait until a layer's demand has been copied: it has the link alone.

    Nothing but speed depends on it, and the launch that is waited for may come after this one where
    launches do not run side by side: the wait has an end.
    """
    expected, tries = tl.load(progress), 0
    while (tl.load(progress + 1, volatile=True) < expected) & (tries < MOST_TRIES):
        tries += 1


@triton.jit
def _fetch_kernel(
    rows,
    slots,
    copies,
    head_words,
    behind,
    num_copies,
    num_words,
    HAS_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.load(copies + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        if behind is not None:
            let_pass(behind)
        slot = tl.load(copies + num_copies + tl.program_id(1)).to(tl.int64)
        begin, end = 0, num_words
        if HAS_PARTS:
            part = tl.load(copies + 2 * num_copies + tl.program_id(1))
            middle = tl.load(head_words)
            begin = tl.where(part == ONLY_TAIL, middle, 0)
            end = tl.where(part == ONLY_HEAD, middle, num_words)
        copy_blocks(
            rows,
            slots,
            expert,
            slot,
            begin // BLOCK,
            tl.cdiv(end, BLOCK),
            end,
            num_words,
            tl.program_id(0),
            tl.num_programs(0),
            BLOCK,
        )


def fetch(
    rows: Tensor,
    slots: Tensor,
    copies: Tensor,
    *,
    num_blocks: int,
    head_words: Tensor | None = None,
    behind: Tensor | None = None,
) -> None:
    """Copy the planned experts; programs with nothing to copy end at once.

    Args:
        rows: Host weights, [E, row_bytes] uint8, pinned (or on the device).
        slots: [S, row_bytes] uint8, on the device.
        copies: [3, N] int32: experts or -1, their slots, and the part to copy (0 all, 1 its head, 2
            its tail).
        num_blocks: Thread blocks per expert: enough to fill the link, few enough to leave the
            GPU's multiprocessors to compute that runs beside.
        head_words: Where heads end and tails begin, [1] int32, in words of 8 bytes and a multiple
            of `BLOCK_WORDS`; everything is copied whole if None.
        behind: `progress` of another layer's tables, whose demand is to be copied first.
    """
    num_copies = copies.shape[1]
    _fetch_kernel[(num_blocks, num_copies)](
        rows.view(WORD),
        slots.view(WORD),
        copies,
        copies if head_words is None else head_words,
        behind,
        num_copies,
        rows.shape[1] // WORD.itemsize,
        HAS_PARTS=head_words is not None,
        BLOCK=BLOCK_WORDS,
        num_warps=4,
    )


def fetch_reference(
    rows: Tensor, slots: Tensor, copies: Tensor, head_words: Tensor | None = None
) -> None:
    """What `fetch` does, in plain PyTorch."""
    for expert, slot, part in copies.T.tolist():
        if expert >= 0:
            middle = 0 if head_words is None else int(head_words) * WORD.itemsize
            part = WHOLE if head_words is None else part
            begin, end = {WHOLE: (0, None), HEAD: (0, middle), TAIL: (middle, None)}[part]
            slots[slot, begin:end].copy_(rows[expert, begin:end])
