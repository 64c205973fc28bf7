"""Fetches missing experts whose host rows are not page-locked, before a layer's products.

A GPU cannot read such rows. Each program asks the host for the pieces that are its own, one at a
time, and copies them from its lane of the staging area into the slot; see `Staging`. What is left
of the plan, the page-locked experts, goes on to the launch that multiplies.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, WORD
from foreroute.runtime.device.kernels.tables import EMPTY, NO_EXPERT
from foreroute.runtime.store.staging import (
    EXPERT_BITS,
    LANES,
    LAYER_BITS,
    LINE_WORDS,
    PIECE_BITS,
    TURN_BITS,
    Staging,
)

MOST_TRIES = 1 << 24
"""Looks of one program for its answer, some 20 s, before it gives up and says so."""


@triton.jit(do_not_specialize=["layer", "first_pinned"])
def _stage_kernel(
    copies,
    places,
    is_pinned,
    slots,
    buffers,
    asked,
    answered,
    turns,
    failed,
    copies_left,
    places_left,
    num_copies,
    num_words,
    layer,
    first_pinned,
    most_tries,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    COPIES: tl.constexpr,
    LANES: tl.constexpr,
    LINE: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    EXPERTS: tl.constexpr,
    LAYERS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0)
    at, nth = tl.arange(0, IDS), tl.arange(0, COPIES)
    is_id, is_copy = at < NUM_IDS, nth < num_copies
    place = tl.load(places + at, mask=is_id, other=0)
    pairs = 2 * tl.arange(0, BLOCK // 2)[:, None] + tl.arange(0, 2)[None, :]
    num_before = 0  # pieces so far: lanes take turns
    for k in range(num_copies):
        expert = tl.load(copies + k)
        is_staged = expert >= 0
        if is_staged:
            is_staged = tl.load(is_pinned + expert) == 0
        if is_staged:
            slot = tl.load(copies + num_copies + k)
            place = tl.where(place == -1 - slot, slot, place)
            num_pieces = tl.cdiv(num_words, PIECE)
            first = (lane + LANES - num_before % LANES) % LANES
            for piece in range(first, num_pieces, LANES):
                turn = tl.atomic_add(turns + lane, 1) + 1
                word = (turn & (TURNS - 1)).to(tl.int64) * LAYERS + layer
                word = (word * EXPERTS + expert) * PIECES + piece
                tl.store(asked + lane * LINE, word, cache_modifier=".wt")
                tl.atomic_add(turns + lane, 0, sem="acq_rel", scope="sys")  # the word is out
                seen = tl.load(answered + lane * LINE, volatile=True)
                tries = 0
                while (seen != word) & (tries < most_tries):
                    seen = tl.load(answered + lane * LINE, volatile=True)
                    tries += 1
                if seen != word:
                    tl.store(failed, 1)
                tl.atomic_add(turns + lane, 0, sem="acq_rel", scope="sys")  # and the piece is in
                tl.debug_barrier()
                for start in range(0, PIECE, BLOCK):
                    words = start + pairs
                    is_word = piece * PIECE + words < num_words
                    source = buffers + lane * PIECE + words
                    values = tl.load(source, mask=is_word, volatile=True)  # no older piece
                    to = slots + slot.to(tl.int64) * num_words + piece * PIECE + words
                    tl.store(to, values, mask=is_word)
                tl.debug_barrier()  # every thread has read
            num_before += num_pieces
    if lane == 0:
        wanted = tl.load(copies + nth, mask=is_copy, other=NO_EXPERT)
        is_here = tl.load(is_pinned + wanted, mask=wanted >= 0, other=1)
        is_left = (wanted >= 0) & (is_here != 0)
        left = tl.where(is_left, wanted - first_pinned, NO_EXPERT)
        tl.store(copies_left + nth, left, mask=is_copy)
        for row in tl.static_range(1, 3):
            others = tl.load(copies + row * num_copies + nth, mask=is_copy)
            tl.store(copies_left + row * num_copies + nth, others, mask=is_copy)
        tl.store(places_left + at, place, mask=is_id)
        order = tl.load(places + NUM_IDS + at, mask=is_id)
        tl.store(places_left + NUM_IDS + at, order, mask=is_id)


def stage(
    demand: Demand,
    places: Tensor,
    is_pinned: Tensor,
    staging: Staging,
    layer: int,
    first_pinned: int = 0,
    most_tries: int = MOST_TRIES,
) -> tuple[Demand, Tensor]:
    """Copy what the host must hand out.

    Args:
        demand: What a layer misses, whole experts.
        places: Where each expert will be, [2, N] int32.
        is_pinned: Whether an expert's row is page-locked, [E] int32 on the device.
        staging: Where the host hands out the others.
        layer: Which of its layers.
        first_pinned: The first expert whose row is page-locked, E if none is. What multiplies is
            given the rows from there on, as CUDA takes no address that it cannot read.
        most_tries: See `MOST_TRIES`.

    Returns:
        What is left to be copied, its experts counted from the first page-locked one on, and the
        places, where nobody waits for what has come.
    """
    copies = demand.copies
    left, places_left = copies.new_empty(copies.shape), places.new_empty(places.shape)
    num_copies, num_ids = copies.shape[1], places.shape[1]
    _stage_kernel[(LANES,)](
        copies,
        places,
        is_pinned,
        demand.slots.view(WORD),
        staging.buffers.view(WORD),
        staging.asked,
        staging.answered,
        staging.turns,
        staging.failed,
        left,
        places_left,
        num_copies,
        demand.slots.shape[1] // WORD.itemsize,
        layer,
        first_pinned,
        most_tries,
        NUM_IDS=num_ids,
        IDS=triton.next_power_of_2(num_ids),
        COPIES=triton.next_power_of_2(num_copies),
        LANES=LANES,
        LINE=LINE_WORDS,
        PIECE=staging.buffers.shape[1] // WORD.itemsize,
        PIECES=1 << PIECE_BITS,
        EXPERTS=1 << EXPERT_BITS,
        LAYERS=1 << LAYER_BITS,
        TURNS=1 << TURN_BITS,
        BLOCK=BLOCK_WORDS,
        num_warps=4,
    )
    readable = demand.rows[first_pinned:]
    if not len(readable):
        readable = staging.buffers  # any address that CUDA takes; no copy is left
    return replace(demand, rows=readable, copies=left), places_left


def stage_reference(
    demand: Demand, places: Tensor, is_pinned: Tensor, first_pinned: int = 0
) -> tuple[Demand, Tensor]:
    """What `stage` does, in plain PyTorch."""
    left, places_left = demand.copies.clone(), places.clone()
    for k, (expert, slot, _) in enumerate(demand.copies.T.tolist()):
        if expert >= 0 and not is_pinned[expert]:
            demand.slots[slot].copy_(demand.rows[expert])
            left[0, k] = EMPTY
            places_left[0][places_left[0] == -1 - slot] = slot
        elif expert >= 0:
            left[0, k] = expert - first_pinned
    return replace(demand, copies=left), places_left
