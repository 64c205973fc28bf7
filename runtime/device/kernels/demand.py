"""Fetches what a layer misses inside the launch of its first product, which goes on meanwhile.

The launch's first programs copy: of every missing expert first what the first product reads, then
the rest. Programs of resident experts multiply at once; those of a missing one wait until its first
part is here. Programs are started in order of their number, so the ones that are waited for always
run. The second product is a launch of its own and finds everything in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, WORD, copy_blocks
from foreroute.runtime.device.kernels.tables import ONLY_TAIL

DEMAND_PROGRAMS = 64
"""Enough to fill the link; they take the missing experts one after the other."""


@dataclass(frozen=True)
class Demand:
    """What a layer copies before its products are done."""

    rows: Tensor
    """Host weights, [E, row_bytes] uint8, pinned (or on the device)."""
    slots: Tensor
    """[S, row_bytes] uint8, on the device."""
    copies: Tensor
    """As `plan` wrote them, [3, N] int32."""
    head_words: Tensor
    """See `fetch`."""
    arrived: Tensor
    """See `ResidencyTables`."""
    progress: Tensor
    """See `ResidencyTables`."""
    first_bytes: int
    """Bytes of a row up to the end of what the first product reads."""

    def arguments(self) -> dict[str, Any]:
        """Those of a kernel that calls `serve_demand`."""
        num_copies = self.copies.shape[1]
        return {
            "rows": self.rows.view(WORD),
            "slots": self.slots.view(WORD),
            "copies": self.copies,
            "head_words": self.head_words,
            "arrived": self.arrived,
            "progress": self.progress,
            "num_copies": num_copies,
            "num_words": self.slots.shape[1] // WORD.itemsize,
            "first_blocks": -(-self.first_bytes // (WORD.itemsize * BLOCK_WORDS)),
            "COPIERS": DEMAND_PROGRAMS,
            "COPIES": triton.next_power_of_2(num_copies),
            "BLOCK": BLOCK_WORDS,
        }


def no_demand(anything: Tensor) -> dict[str, Any]:
    """Arguments of such a kernel where every expert is resident.

    Args:
        anything: Any tensor on the device; never read.
    """
    tensors = ("rows", "slots", "copies", "head_words", "arrived", "progress")
    sizes = dict.fromkeys(("num_copies", "num_words", "first_blocks"), 0)
    return dict.fromkeys(tensors, anything) | sizes | {"COPIERS": 0, "COPIES": 1, "BLOCK": 1}


@triton.jit
def _is_any_wanted(copies, num_copies, COPIES: tl.constexpr):
    at = tl.arange(0, COPIES)
    return tl.max(tl.load(copies + at, mask=at < num_copies, other=-1), 0) >= 0


@triton.jit
def serve_demand(  # noqa: ANN201
    rows,
    slots,
    copies,
    head_words,
    arrived,
    progress,
    num_copies,
    num_words,
    first_blocks,
    COPIERS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One copying program's share of all copies; reports each expert's first part, and the end."""
    if COPIERS > 0 and _is_any_wanted(copies, num_copies, COPIES):
        middle = tl.load(head_words) // BLOCK
        num_shared = 0  # blocks so far: all programs take turns, so that none has more than others
        for half in tl.static_range(2):
            for k in range(num_copies):
                expert = tl.load(copies + k).to(tl.int64)
                if expert >= 0:
                    slot = tl.load(copies + num_copies + k).to(tl.int64)
                    is_tail = tl.load(copies + 2 * num_copies + k) == ONLY_TAIL
                    begin = tl.where(is_tail, middle, 0)
                    if half == 0:
                        first, last = begin, first_blocks
                    else:
                        first, last = tl.maximum(begin, first_blocks), tl.cdiv(num_words, BLOCK)
                    turn = (tl.program_id(0) + COPIERS - num_shared % COPIERS) % COPIERS
                    copy_blocks(
                        rows,
                        slots,
                        expert,
                        slot,
                        first,
                        last,
                        num_words,
                        num_words,
                        turn,
                        COPIERS,
                        BLOCK,
                    )
                    num_shared += tl.maximum(last - first, 0)
                    if half == 0:
                        tl.debug_barrier()  # every thread has written
                        tl.atomic_add(arrived + slot, 1, sem="release")
        tl.debug_barrier()
        tl.atomic_add(progress + 1, 1, sem="release")


@triton.jit
def slot_named(place):  # noqa: ANN201
    """The slot that an entry of `places` names."""
    return tl.where(place < 0, -1 - place, place).to(tl.int64)


@triton.jit
def arrived_slot(place, arrived, COPIERS: tl.constexpr):  # noqa: ANN201
    """The slot that an entry of `places` names, once the expert's first part is in it."""
    slot = slot_named(place)
    if place < 0:
        while tl.atomic_add(arrived + slot, 0, sem="acquire") < COPIERS:
            pass
    return slot
