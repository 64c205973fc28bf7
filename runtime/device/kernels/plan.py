"""Which experts of one layer must be copied into which slots: decided on the device, no sync."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.demand import DEMAND_PROGRAMS
from foreroute.runtime.device.kernels.duel import compete, compete_reference
from foreroute.runtime.device.kernels.miss import (
    LayerRule,
    RuledChoice,
    rule_arguments,
    rule_ids,
)
from foreroute.runtime.device.kernels.tables import (
    AT_MISSES,
    AT_PREFETCHES,
    AT_REGRETS,
    AT_TAILS,
    AT_WASTED,
    AT_WASTED_HEADS,
    EMPTY,
    HITS,
    MISSES,
    NO_EXPERT,
    NUM_DRIVEN_OUT,
    ONLY_TAIL,
    PREFETCHES,
    REGRETS,
    TAIL,
    TAILS,
    TRUST_MEMORY,
    WASTED,
    WASTED_HEADS,
    WHOLE,
    ResidencyTables,
)
from foreroute.runtime.policies.eviction import ScoreRule


@triton.jit
def plan_ids(  # noqa: ANN201
    expert_ids,
    slot_of,
    expert_in,
    score,
    is_unused_prefetch,
    step,
    counters,
    pending,
    pending_confidence,
    trust,
    driven_out,
    arrived,
    progress,
    rivals,
    shadows,
    lead,
    copies,
    places,
    num_experts,
    num_slots,
    decay,
    memory,
    credited,
    IS_RECENCY: tl.constexpr,
    IS_PREFETCH: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    COPIERS: tl.constexpr,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """What `plan` does, inside the one program that does it."""
    at, slots, experts = tl.arange(0, IDS), tl.arange(0, SLOTS), tl.arange(0, EXPERTS)
    is_slot, is_expert = slots < num_slots, experts < num_experts
    ids = tl.load(expert_ids + at, mask=at < NUM_IDS, other=-1).to(tl.int32)
    held = tl.load(expert_in + slots, mask=is_slot, other=-2)  # -2 is no expert and no id
    unused = tl.load(is_unused_prefetch + slots, mask=is_slot, other=0)
    before = tl.load(score + experts, mask=is_expert, other=0.0)
    now = tl.load(step) + (0 if IS_PREFETCH else 1)
    where_held = tl.load(slot_of + ids, mask=ids >= 0, other=0)
    ahead = 0
    if lead is not None:
        ahead = tl.load(lead)
    taken = tl.where(is_slot, 0, 1)  # slots that may not be evicted
    in_use = tl.zeros([EXPERTS], dtype=tl.int32)
    SOME: tl.constexpr = 16 if IDS > 16 else IDS
    for start in tl.static_range(0, NUM_IDS, SOME):
        some_at = start + tl.arange(0, SOME)
        some = tl.load(expert_ids + some_at, mask=some_at < NUM_IDS, other=-1).to(tl.int32)
        is_held = (held[:, None] == some[None, :]) & (some >= 0)[None, :]
        taken = tl.maximum(taken, tl.max(is_held.to(tl.int32), 1))
        if credited is not None:
            some = tl.load(credited + some_at, mask=some_at < NUM_IDS, other=-1).to(tl.int32)
        is_used = experts[:, None] == some[None, :]
        in_use = tl.maximum(in_use, tl.max(is_used.to(tl.int32), 1))
    copied = tl.full([IDS], -1, dtype=tl.int32)
    placed = tl.zeros([IDS], dtype=tl.int32)
    part = tl.zeros([IDS], dtype=tl.int32)
    place = where_held
    is_late = tl.zeros([IDS], dtype=tl.int32)
    if not IS_PREFETCH:
        num_hits = tl.sum((is_slot & (taken == 1)).to(tl.int32), 0)
        num_right = tl.sum(tl.where(is_slot & (taken == 1), unused, 0), 0)
        unused = tl.where(is_slot & (taken == 1), 0, unused)
        said = tl.load(pending_confidence)
        early = tl.load(pending)
        if early >= 0:  # its head is here: settle it
            early_slot = tl.load(pending + 1)
            first = tl.min(tl.where(ids == early, at, IDS), 0)
            is_right = (first < IDS).to(tl.int32)
            tl.store(pending, NO_EXPERT)
            copied = tl.where(at == first, early, copied)
            placed = tl.where(at == first, early_slot, placed)
            part = tl.where(at == first, ONLY_TAIL, part)
            is_late = tl.where(ids == early, 1, is_late)
            num_hits -= is_right  # its tail is missing
            num_right += is_right
            tl.store(counters + AT_TAILS, tl.load(counters + AT_TAILS) + is_right)
            tl.store(counters + AT_WASTED_HEADS, tl.load(counters + AT_WASTED_HEADS) + 1 - is_right)
            if is_right == 0:
                tl.store(slot_of + early, NO_EXPERT)
                tl.store(expert_in + early_slot, NO_EXPERT)
                held = tl.where(slots == early_slot, NO_EXPERT, held)
        if said > 0:  # of all guesses for this step
            right, expected = tl.load(trust), tl.load(trust + 1)
            tl.store(trust, right * memory + num_right)
            tl.store(trust + 1, expected * memory + said)
            num_regrets = 0
            for k in tl.static_range(NUM_DRIVEN_OUT):
                gone = tl.load(driven_out + k)
                is_missed = (ids == gone) & (ids >= 0) & (where_held < 0)
                num_regrets += tl.max(is_missed.to(tl.int32), 0)
                tl.store(driven_out + k, NO_EXPERT)
            tl.store(counters + AT_REGRETS, tl.load(counters + AT_REGRETS) + num_regrets)
            tl.store(pending_confidence, 0.0)
        tl.store(counters, tl.load(counters) + num_hits)
        tl.store(step, now)
    is_absent = ((ids >= 0) & (where_held < 0)).to(tl.int32)
    num_absent = tl.sum(is_absent, 0)
    if num_absent > 0:
        worth = tl.load(score + held, mask=held >= 0, other=-1.0)
        num_copies, num_wasted = 0, 0
        while num_absent > 0:
            first = tl.min(tl.where(is_absent == 1, at, IDS), 0)
            wanted = tl.sum(tl.where(at == first, ids, 0), 0)
            is_absent = tl.where(ids == wanted, 0, is_absent)
            num_absent = tl.sum(is_absent, 0)
            if tl.min(taken, 0) == 0:
                slot = tl.argmin(tl.where(taken == 0, worth, float("inf")), 0)
                here = slots == slot
                evicted = tl.sum(tl.where(here, held, 0), 0)
                num_wasted += tl.sum(tl.where(here, unused, 0), 0)
                if evicted >= 0:
                    tl.store(slot_of + evicted, NO_EXPERT)
                tl.store(slot_of + wanted, slot)
                copied = tl.where(at == first, wanted, copied)
                placed = tl.where(at == first, slot, placed)
                place = tl.where(ids == wanted, slot, place)
                is_late = tl.where(ids == wanted, 1, is_late)
                held = tl.where(here, wanted, held)
                taken = tl.where(here, 1, taken)
                unused = tl.where(here, 1 if IS_PREFETCH else 0, unused)
                num_copies += 1
        tl.store(expert_in + slots, held, mask=is_slot)
        kind = counters + (AT_PREFETCHES if IS_PREFETCH else AT_MISSES)
        tl.store(kind, tl.load(kind) + num_copies)
        tl.store(counters + AT_WASTED, tl.load(counters + AT_WASTED) + num_wasted)
    tl.store(copies + at, copied, mask=at < NUM_IDS)
    tl.store(copies + NUM_IDS + at, placed, mask=copied >= 0)
    tl.store(copies + 2 * NUM_IDS + at, part, mask=copied >= 0)
    tl.store(is_unused_prefetch + slots, unused, mask=is_slot)
    if HAS_PLACES:
        is_copied = copied >= 0
        tl.store(arrived + placed, 0, mask=is_copied)
        tl.store(progress, tl.where(tl.max(is_copied.to(tl.int32), 0) > 0, COPIERS, 0))
        tl.store(progress + 1, 0)
        is_id = at < NUM_IDS
        # late ones last; of either kind those of one expert after each other, to be read once
        is_same = (ids[:, None] == ids[None, :]) & is_id[None, :]
        first_same = tl.min(tl.where(is_same, at[None, :], IDS), 1)
        key = (is_late * IDS + first_same) * IDS + at
        all_keys = tl.where(is_id, key, 4 * IDS * IDS)
        rank = tl.sum((all_keys[None, :] < key[:, None]).to(tl.int32), 1)
        tl.store(places + at, tl.where(is_late == 1, -1 - place, place), mask=is_id)
        tl.store(places + NUM_IDS + rank, at, mask=is_id)
    if IS_RECENCY:
        tl.store(score + experts, now.to(tl.float32), mask=in_use == 1)
    elif IS_PREFETCH:
        pass
    elif rivals is not None:
        compete(
            score,
            rivals,
            shadows,
            lead,
            ahead,
            in_use,
            now,
            decay,
            num_experts,
            num_slots,
            EXPERTS,
        )
    else:
        tl.store(score + experts, before * decay + in_use.to(tl.float32), mask=is_expert)


@triton.jit
def _plan_kernel(
    expert_ids,
    slot_of,
    expert_in,
    score,
    is_unused_prefetch,
    step,
    counters,
    pending,
    pending_confidence,
    trust,
    driven_out,
    arrived,
    progress,
    rivals,
    shadows,
    lead,
    copies,
    places,
    num_experts,
    num_slots,
    decay,
    memory,
    credited,
    rule_logits,
    given,
    ranked,
    ruled,
    ruled_gates,
    selection_bias,
    judged,
    floor,
    allowed,
    is_first,
    IS_RECENCY: tl.constexpr,
    IS_PREFETCH: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    COPIERS: tl.constexpr,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_RULE: tl.constexpr,
    BONUS: tl.constexpr,
    IS_LEAVING: tl.constexpr,
    SHARE: tl.constexpr,
    MASS: tl.constexpr,
    HAS_BUDGET: tl.constexpr,
    REPLACES: tl.constexpr,
    KIND: tl.constexpr,
    RENORMALISES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    RANKED: tl.constexpr,
    RULED_TOKENS: tl.constexpr,
    RULED_K: tl.constexpr,
    RULED_PADDED: tl.constexpr,
):
    if HAS_RULE:
        rule_ids(
            rule_logits,
            credited,
            given,
            ranked,
            ruled,
            ruled_gates,
            selection_bias,
            slot_of,
            pending,
            judged,
            floor,
            allowed,
            is_first,
            num_experts,
            BONUS,
            IS_LEAVING,
            SHARE,
            MASS,
            HAS_BUDGET,
            REPLACES,
            KIND,
            RENORMALISES,
            SCALE,
            HAS_SELECTION_BIAS,
            WINDOW,
            RANKED,
            RULED_TOKENS,
            RULED_K,
            RULED_PADDED,
            EXPERTS,
        )
        tl.debug_barrier()  # the plan reads the ids
    plan_ids(
        expert_ids,
        slot_of,
        expert_in,
        score,
        is_unused_prefetch,
        step,
        counters,
        pending,
        pending_confidence,
        trust,
        driven_out,
        arrived,
        progress,
        rivals,
        shadows,
        lead,
        copies,
        places,
        num_experts,
        num_slots,
        decay,
        memory,
        credited,
        IS_RECENCY,
        IS_PREFETCH,
        HAS_PLACES,
        COPIERS,
        NUM_IDS,
        IDS,
        SLOTS,
        EXPERTS,
    )


def plan_arguments(
    expert_ids: Tensor,
    tables: ResidencyTables,
    rule: ScoreRule,
    copies: Tensor,
    *,
    places: Tensor | None = None,
    credited: Tensor | None = None,
    is_prefetch: bool = False,
) -> dict[str, Any]:
    """Those of a kernel that calls `plan_ids`; takes what `plan` takes."""
    num_experts, num_slots = len(tables.slot_of), len(tables.expert_in)
    num_ids = expert_ids.numel()
    return {
        **{field.name: getattr(tables, field.name) for field in fields(tables)},
        "expert_ids": expert_ids,
        "copies": copies,
        "places": copies if places is None else places,
        "num_experts": num_experts,
        "num_slots": num_slots,
        "decay": rule.decay,
        "memory": TRUST_MEMORY,
        "credited": credited,
        "IS_RECENCY": rule.is_recency,
        "IS_PREFETCH": is_prefetch,
        "HAS_PLACES": places is not None,
        "COPIERS": DEMAND_PROGRAMS,
        "NUM_IDS": num_ids,
        "IDS": triton.next_power_of_2(num_ids),
        "SLOTS": triton.next_power_of_2(num_slots),
        "EXPERTS": triton.next_power_of_2(num_experts),
    }


def no_plan(anything: Tensor, num_experts: int) -> dict[str, Any]:
    """Arguments of such a kernel where nothing is planned.

    Args:
        anything: Any tensor on the device; never read.
        num_experts: E.
    """
    tensors = [field.name for field in fields(ResidencyTables) if field.default is MISSING]
    absent = [field.name for field in fields(ResidencyTables) if field.default is None]
    flags = dict.fromkeys(("IS_RECENCY", "IS_PREFETCH", "HAS_PLACES"), False)
    ones = dict.fromkeys(("COPIERS", "NUM_IDS", "IDS", "SLOTS"), 1)
    return (
        dict.fromkeys([*tensors, "expert_ids", "copies", "places"], anything)
        | {"num_slots": 0, "decay": 1.0, "memory": 1.0, "num_experts": num_experts}
        | dict.fromkeys([*absent, "credited"])
        | {**flags, **ones, "EXPERTS": triton.next_power_of_2(num_experts)}
    )


def plan(
    expert_ids: Tensor,
    tables: ResidencyTables,
    rule: ScoreRule,
    copies: Tensor,
    *,
    places: Tensor | None = None,
    is_prefetch: bool = False,
    ruling: tuple[LayerRule, RuledChoice] | None = None,
) -> None:
    """Give every absent expert a slot, evicting the lowest scores; one launch.

    A demand also settles the layer's pending head (`plan_head`): if it is needed, its tail is to be
    copied, else its slot is free again. Experts of this call are never victims. Where a prefetch
    finds only such slots, it leaves the expert out; a demand must not name more distinct experts
    than there are slots.

    Args:
        expert_ids: Experts asked for, [N], any integer dtype; -1 asks for nothing.
        tables: Of the layer, changed in place.
        rule: How scores change. A prefetch leaves frequencies alone.
        copies: Written, [3, N] int32: for each id the expert to copy or -1; where it is not -1, the
            slot to copy it to, and whether that is all of it (0) or what its head left (2).
        places: Written, [2, N] int32, if the copies are made by the launch that needs them
            (`demand.py`; no id may be -1 then): each id's slot, or -1 - slot where a copy must
            arrive; and the ids in the order to work on them, late ones last, those of one expert
            after each other.
        is_prefetch: Whether the experts are predicted, not yet needed.
        ruling: A rule on a miss, and a router's choice, of which it makes the expert ids first; the
            router's own are credited with the use.
    """
    layer_rule, choice = ruling or (None, None)
    _plan_kernel[(1,)](
        **plan_arguments(
            expert_ids,
            tables,
            rule,
            copies,
            places=places,
            credited=None if choice is None else choice.chosen,
            is_prefetch=is_prefetch,
        ),
        **rule_arguments(layer_rule, choice),
        rule_logits=None if choice is None else choice.logits,
        given=None if choice is None else choice.given,
        num_warps=1,
    )


def plan_reference(
    expert_ids: Tensor,
    tables: ResidencyTables,
    rule: ScoreRule,
    copies: Tensor,
    *,
    places: Tensor | None = None,
    credited: Tensor | None = None,
    is_prefetch: bool = False,
) -> None:
    """What `plan` does, in plain Python, with the use of some experts credited to others."""
    ids = [int(e) for e in expert_ids.flatten()]
    worth = {s: float(tables.score[e]) if e >= 0 else -1.0 for s, e in _held(tables).items()}
    tables.step += 0 if is_prefetch else 1
    now = float(tables.step)
    taken = {s for s, e in _held(tables).items() if e >= 0 and e in ids}
    seen: set[int] = set()
    early, early_slot = tables.pending.tolist()
    if tables.pending_confidence[0] > 0 and not is_prefetch:
        used = [s for s, e in _held(tables).items() if e >= 0 and e in ids]
        tables.trust *= TRUST_MEMORY
        tables.trust[0] += tables.is_unused_prefetch[used].sum() + (early != EMPTY and early in ids)
        tables.trust[1] += tables.pending_confidence[0]
        tables.pending_confidence.zero_()
        gone = {expert for expert in tables.driven_out.tolist() if expert >= 0}
        tables.counters[REGRETS] += len(gone.intersection(ids))
        tables.driven_out.fill_(EMPTY)
    if early != EMPTY and not is_prefetch:
        tables.pending[0] = EMPTY
        if early in ids:
            tables.counters[TAILS] += 1
            seen.add(early_slot)
        else:
            tables.slot_of[early] = tables.expert_in[early_slot] = EMPTY
            worth[early_slot] = -1.0
            tables.counters[WASTED_HEADS] += 1
    for i, expert in enumerate(ids):
        slot = int(tables.slot_of[expert]) if expert >= 0 else EMPTY
        free = [s for s in worth if s not in taken]
        copies[0, i] = -1
        if early != EMPTY and not is_prefetch and ids.index(expert) == i and expert == early:
            copies[:, i] = torch.tensor([early, early_slot, TAIL])
            tables.is_unused_prefetch[early_slot] = 0
            continue
        if expert >= 0 and slot == EMPTY and free:
            slot = min(free, key=lambda s: (worth[s], s))
            evicted = int(tables.expert_in[slot])
            tables.counters[WASTED] += tables.is_unused_prefetch[slot]
            if evicted >= 0:
                tables.slot_of[evicted] = EMPTY
            tables.slot_of[expert], tables.expert_in[slot] = slot, expert
            copies[:, i] = torch.tensor([expert, slot, WHOLE])
            taken.add(slot)
            tables.is_unused_prefetch[slot] = int(is_prefetch)
            tables.counters[PREFETCHES if is_prefetch else MISSES] += 1
        elif slot != EMPTY and not is_prefetch:
            tables.counters[HITS] += slot not in seen
            tables.is_unused_prefetch[slot] = 0
        seen.add(slot)
    if places is not None:
        _place(ids, tables, copies, places)
    used = ids if credited is None else credited.flatten().tolist()
    named = torch.tensor(sorted({e for e in used if e >= 0}), dtype=torch.long)
    if rule.is_recency:
        tables.score[named] = now
    elif is_prefetch:
        return
    elif tables.rivals is not None:
        compete_reference(tables, named, rule.decay)
    else:
        tables.score *= rule.decay
        tables.score[named] += 1


def _place(ids: list[int], tables: ResidencyTables, copies: Tensor, places: Tensor) -> None:
    late = [expert for expert in copies[0].tolist() if expert >= 0]
    for slot in (int(tables.slot_of[expert]) for expert in late):
        tables.arrived[slot] = 0
    tables.progress.copy_(torch.tensor([DEMAND_PROGRAMS if late else 0, 0]))
    slots = [int(tables.slot_of[e]) for e in ids]
    codes = [-1 - slot if e in late else slot for e, slot in zip(ids, slots, strict=True)]
    order = sorted(range(len(ids)), key=lambda i: (ids[i] in late, ids.index(ids[i]), i))
    places.copy_(torch.tensor([codes, order]))


def _held(tables: ResidencyTables) -> dict[int, int]:
    return dict(enumerate(tables.expert_in.tolist()))
