"""What a rule on a miss left out or replaced, fetched behind the layer: decided on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.miss import BEHIND
from foreroute.runtime.device.kernels.tables import (
    AT_WASTED,
    EMPTY,
    NO_EXPERT,
    WASTED,
    WHOLE,
    ResidencyTables,
)

AT_BEHIND = tl.constexpr(BEHIND)


@triton.jit
def _behind_kernel(
    chosen,
    run,
    slot_of,
    expert_in,
    score,
    uses,
    is_unused_prefetch,
    counters,
    judged,
    copies,
    num_slots,
    ONLY_LIKELY: tl.constexpr,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    at, slots = tl.arange(0, IDS), tl.arange(0, SLOTS)
    is_id, is_slot = at < NUM_IDS, slots < num_slots
    ids = tl.load(chosen + at, mask=is_id, other=-1).to(tl.int32)
    held = tl.load(expert_in + slots, mask=is_slot, other=-2)  # -2 is no expert and no id
    unused = tl.load(is_unused_prefetch + slots, mask=is_slot, other=0)
    taken = tl.where(is_slot, 0, 1)  # slots that may not be evicted
    SOME: tl.constexpr = 16 if IDS > 16 else IDS
    for start in tl.static_range(0, NUM_IDS, SOME):
        some_at = start + tl.arange(0, SOME)
        for named in tl.static_range(2):
            some = tl.load((run if named else chosen) + some_at, mask=some_at < NUM_IDS, other=-1)
            is_held = held[:, None] == some.to(tl.int32)[None, :]
            is_held = is_held & (held >= 0)[:, None]
            taken = tl.maximum(taken, tl.max(is_held.to(tl.int32), 1))
    is_absent = is_id & (tl.load(slot_of + ids, mask=is_id, other=0) < 0)
    is_absent = is_absent.to(tl.int32)
    used = tl.load(uses + ids, mask=is_id, other=0.0)
    worth = tl.load(score + held, mask=held >= 0, other=-1.0)
    copied = tl.full([IDS], -1, dtype=tl.int32)
    placed = tl.zeros([IDS], dtype=tl.int32)
    num_absent, num_copies, num_wasted = tl.sum(is_absent, 0), 0, 0
    while num_absent > 0:
        first = tl.min(tl.where(is_absent == 1, at, IDS), 0)
        if ONLY_LIKELY:
            first = tl.argmax(tl.where(is_absent == 1, used, -1.0), 0)
        wanted = tl.sum(tl.where(at == first, ids, 0), 0)
        slot = tl.argmin(tl.where(taken == 0, worth, float("inf")), 0)
        here = slots == slot
        evicted = tl.sum(tl.where(here, held, 0), 0)
        pays = tl.min(taken, 0) == 0
        if ONLY_LIKELY:  # either costs one copy: this one, and its victim's if that must come back
            likely = tl.sum(tl.where(at == first, used, 0.0), 0)
            feared = tl.load(uses + evicted, mask=evicted >= 0, other=-1.0)
            pays = pays & (likely > feared)
            is_absent = tl.zeros_like(is_absent)
        is_absent = tl.where(ids == wanted, 0, is_absent)
        num_absent = tl.sum(is_absent, 0)
        if pays:
            if evicted >= 0:
                tl.store(slot_of + evicted, NO_EXPERT)
            tl.store(slot_of + wanted, slot)
            tl.store(expert_in + slot, wanted)
            tl.store(is_unused_prefetch + slot, 0)
            num_wasted += tl.sum(tl.where(here, unused, 0), 0)
            copied = tl.where(at == first, wanted, copied)
            placed = tl.where(at == first, slot, placed)
            taken = tl.where(here, 1, taken)
            num_copies += 1
    tl.store(copies + at, copied, mask=is_id)
    tl.store(copies + NUM_IDS + at, placed, mask=is_id)
    tl.store(copies + 2 * NUM_IDS + at, tl.zeros([IDS], dtype=tl.int32), mask=is_id)  # all of it
    tl.store(judged + AT_BEHIND, tl.load(judged + AT_BEHIND) + num_copies)
    tl.store(counters + AT_WASTED, tl.load(counters + AT_WASTED) + num_wasted)


def plan_behind(
    chosen: Tensor,
    run: Tensor,
    tables: ResidencyTables,
    judged: Tensor,
    copies: Tensor,
    *,
    only_likely: bool,
) -> None:
    """Give experts slots that the router chose and nobody waited for; one launch.

    It comes after the layer's demand, which credited them. What the router chose, and what ran in
    its place, is never a victim; of the rest the lowest scores go first. Where only such are left,
    experts stay away.

    Args:
        chosen: The router's experts, [T, K] int64, contiguous.
        run: What ran in their place, likewise.
        tables: Of the layer, changed in place.
        judged: See `LayerRule`; counts the copies.
        copies: Written, [3, T * K] int32, as `fetch` takes it.
        only_likely: Fetch the one that is used most alone, and only if it is used more than what it
            evicts.
    """
    num_ids, num_slots = chosen.numel(), len(tables.expert_in)
    _behind_kernel[(1,)](
        chosen,
        run,
        tables.slot_of,
        tables.expert_in,
        tables.score,
        _uses_of(tables),
        tables.is_unused_prefetch,
        tables.counters,
        judged,
        copies,
        num_slots,
        ONLY_LIKELY=only_likely,
        NUM_IDS=num_ids,
        IDS=triton.next_power_of_2(num_ids),
        SLOTS=triton.next_power_of_2(num_slots),
        num_warps=1,
    )


def plan_behind_reference(
    chosen: Tensor,
    run: Tensor,
    tables: ResidencyTables,
    judged: Tensor,
    copies: Tensor,
    *,
    only_likely: bool,
) -> None:
    """What `plan_behind` does, in plain Python."""
    copies[0] = EMPTY
    ids, uses = chosen.flatten().tolist(), _uses_of(tables).tolist()
    kept = {*ids, *run.flatten().tolist()}
    absent = [e for e in dict.fromkeys(ids) if tables.slot_of[e] == EMPTY]
    for expert in [max(absent, key=uses.__getitem__)] if only_likely and absent else absent:
        held = tables.expert_in.tolist()
        worth = {s: float(tables.score[e]) if e >= 0 else -1.0 for s, e in enumerate(held)}
        free = [s for s, e in enumerate(held) if e not in kept]
        if not free:
            return
        slot = min(free, key=lambda s: (worth[s], s))
        evicted = held[slot]
        if only_likely and evicted != EMPTY and uses[expert] <= uses[evicted]:
            return
        if evicted != EMPTY:
            tables.slot_of[evicted] = EMPTY
        tables.counters[WASTED] += tables.is_unused_prefetch[slot]
        tables.is_unused_prefetch[slot] = 0
        tables.slot_of[expert], tables.expert_in[slot] = slot, expert
        copies[:, ids.index(expert)] = torch.tensor([expert, slot, WHOLE])
        judged[BEHIND] += 1


def _uses_of(tables: ResidencyTables) -> Tensor:
    """How often each expert is used, [E], in any unit; when it was last, under recency alone."""
    return tables.score if tables.rivals is None else tables.rivals[0]
