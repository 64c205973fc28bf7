"""Which experts of one layer must be copied into which slots: decided on the device, no sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

EMPTY = -1
HITS, MISSES, PREFETCHES, WASTED = range(4)
NUM_COUNTERS = 4


@dataclass(frozen=True)
class ScoreRule:
    """How an expert's score follows from its uses; the slot with the least score is evicted.

    At each step `score = decay * score`, and `+ 1` for experts in use; or, for recency, the score
    of experts in use is the step's number.
    """

    decay: float = 1.0
    """1 counts uses (LFU); 0.5 ** (1 / h) halves a use's worth every h steps (LRFU)."""
    is_recency: bool = False
    """Least recently used goes first."""


LRU = ScoreRule(is_recency=True)
LFU = ScoreRule()


def lrfu(half_life_steps: float) -> ScoreRule:
    """Decayed frequency."""
    return ScoreRule(decay=0.5 ** (1 / half_life_steps))


@dataclass
class ResidencyTables:
    """One layer's residency, on the device; every field is changed in place."""

    slot_of: Tensor
    """[E] int32, the expert's slot or -1."""
    expert_in: Tensor
    """[S] int32, the slot's expert or -1."""
    score: Tensor
    """[E] float32; see `ScoreRule`."""
    is_unused_prefetch: Tensor
    """[S] int32, 1 where a prefetched expert has not been used yet."""
    step: Tensor
    """[1] int32, decode steps so far."""
    counters: Tensor
    """[4] int32: hits, misses, prefetches, wasted prefetches."""

    @classmethod
    def empty(cls, num_experts: int, num_slots: int, device: torch.device | str) -> ResidencyTables:
        """Tables of a layer with no expert resident."""

        def filled(size: int, value: int) -> Tensor:
            return torch.full((size,), value, dtype=torch.int32, device=device)

        return cls(
            slot_of=filled(num_experts, EMPTY),
            expert_in=filled(num_slots, EMPTY),
            score=torch.zeros(num_experts, dtype=torch.float32, device=device),
            is_unused_prefetch=filled(num_slots, 0),
            step=filled(1, 0),
            counters=filled(NUM_COUNTERS, 0),
        )

    def reset(self) -> None:
        """Forget everything that is resident, in place."""
        self.slot_of.fill_(EMPTY)
        self.expert_in.fill_(EMPTY)
        for tensor in (self.score, self.is_unused_prefetch, self.step, self.counters):
            tensor.zero_()

    def check_integrity(self) -> None:
        """Check the tables against each other.

        Raises:
            RuntimeError: If they disagree.
        """
        expert_in = self.expert_in.tolist()
        placed = {e: s for e, s in enumerate(self.slot_of.tolist()) if s != EMPTY}
        if placed != {e: s for s, e in enumerate(expert_in) if e != EMPTY}:
            raise RuntimeError(f"Slot table {placed} and slot contents {expert_in} disagree.")
        if len(set(placed.values())) != len(placed):
            raise RuntimeError(f"Two experts share a slot: {placed}.")


@triton.jit
def _plan_kernel(
    expert_ids,
    slot_of,
    expert_in,
    score,
    is_unused_prefetch,
    step,
    counters,
    source,
    target,
    num_experts,
    num_slots,
    decay,
    IS_RECENCY: tl.constexpr,
    IS_PREFETCH: tl.constexpr,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    at, slots, experts = tl.arange(0, IDS), tl.arange(0, SLOTS), tl.arange(0, EXPERTS)
    is_slot, is_expert = slots < num_slots, experts < num_experts
    ids = tl.load(expert_ids + at, mask=at < NUM_IDS, other=-1).to(tl.int32)
    held = tl.load(expert_in + slots, mask=is_slot, other=-2)  # -2 is no expert and no id
    unused = tl.load(is_unused_prefetch + slots, mask=is_slot, other=0)
    before = tl.load(score + experts, mask=is_expert, other=0.0)
    now = tl.load(step) + (0 if IS_PREFETCH else 1)
    where_held = tl.load(slot_of + ids, mask=ids >= 0, other=0)
    taken = tl.where(is_slot, 0, 1)  # slots that may not be evicted
    in_use = tl.zeros([EXPERTS], dtype=tl.int32)
    for i in tl.static_range(NUM_IDS):
        expert = tl.load(expert_ids + i).to(tl.int32)
        taken = tl.where((held == expert) & (expert >= 0), 1, taken)
        in_use = tl.where(experts == expert, 1, in_use)
    if not IS_PREFETCH:
        is_hit = is_slot & (taken == 1)
        unused = tl.where(is_hit, 0, unused)
        tl.store(counters, tl.load(counters) + tl.sum(is_hit.to(tl.int32), 0))
        tl.store(step, now)
    copied = tl.full([IDS], -1, dtype=tl.int32)
    placed = tl.zeros([IDS], dtype=tl.int32)
    if tl.sum(((ids >= 0) & (where_held < 0)).to(tl.int32), 0) > 0:
        worth = tl.load(score + held, mask=held >= 0, other=-1.0)
        num_copies, num_wasted = 0, 0
        for k in range(NUM_IDS):
            wanted = tl.load(expert_ids + k).to(tl.int32)
            is_here = tl.sum((held == wanted).to(tl.int32), 0)
            room = tl.min(taken, 0) == 0
            if (is_here == 0) & (wanted >= 0) & room:
                slot = tl.argmin(tl.where(taken == 0, worth, float("inf")), 0)
                here = slots == slot
                evicted = tl.sum(tl.where(here, held, 0), 0)
                num_wasted += tl.sum(tl.where(here, unused, 0), 0)
                if evicted >= 0:
                    tl.store(slot_of + evicted, -1)
                tl.store(slot_of + wanted, slot)
                copied = tl.where(at == k, wanted, copied)
                placed = tl.where(at == k, slot, placed)
                held = tl.where(here, wanted, held)
                taken = tl.where(here, 1, taken)
                unused = tl.where(here, 1 if IS_PREFETCH else 0, unused)
                num_copies += 1
        tl.store(expert_in + slots, held, mask=is_slot)
        kind = counters + (2 if IS_PREFETCH else 1)
        tl.store(kind, tl.load(kind) + num_copies)
        tl.store(counters + 3, tl.load(counters + 3) + num_wasted)
    tl.store(source + at, copied, mask=at < NUM_IDS)
    tl.store(target + at, placed, mask=copied >= 0)
    tl.store(is_unused_prefetch + slots, unused, mask=is_slot)
    if IS_RECENCY:
        tl.store(score + experts, now.to(tl.float32), mask=in_use == 1)
    elif not IS_PREFETCH:
        tl.store(score + experts, before * decay + in_use.to(tl.float32), mask=is_expert)


def plan(
    expert_ids: Tensor,
    tables: ResidencyTables,
    rule: ScoreRule,
    source: Tensor,
    target: Tensor,
    *,
    is_prefetch: bool = False,
) -> None:
    """Give every absent expert a slot, evicting the lowest scores; one launch.

    Experts of this call are never victims. Where a prefetch finds only such slots, it leaves the
    expert out; a demand must not name more distinct experts than there are slots.

    Args:
        expert_ids: Experts asked for, [N], any integer dtype; -1 asks for nothing.
        tables: Of the layer, changed in place.
        rule: How scores change. A prefetch leaves frequencies alone.
        source: Written: the expert to copy for each id or -1, [N] int32.
        target: Written where source is not -1: the slot to copy it to, [N] int32.
        is_prefetch: Whether the experts are predicted, not yet needed.
    """
    num_experts, num_slots = len(tables.slot_of), len(tables.expert_in)
    num_ids = expert_ids.numel()
    _plan_kernel[(1,)](
        expert_ids,
        tables.slot_of,
        tables.expert_in,
        tables.score,
        tables.is_unused_prefetch,
        tables.step,
        tables.counters,
        source,
        target,
        num_experts,
        num_slots,
        rule.decay,
        IS_RECENCY=rule.is_recency,
        IS_PREFETCH=is_prefetch,
        NUM_IDS=num_ids,
        IDS=triton.next_power_of_2(num_ids),
        SLOTS=triton.next_power_of_2(num_slots),
        EXPERTS=triton.next_power_of_2(num_experts),
        num_warps=1,
    )


def plan_reference(
    expert_ids: Tensor,
    tables: ResidencyTables,
    rule: ScoreRule,
    source: Tensor,
    target: Tensor,
    *,
    is_prefetch: bool = False,
) -> None:
    """What `plan` does, in plain Python."""
    ids = [int(e) for e in expert_ids.flatten()]
    worth = {s: float(tables.score[e]) if e >= 0 else -1.0 for s, e in _held(tables).items()}
    tables.step += 0 if is_prefetch else 1
    now = float(tables.step)
    taken = {s for s, e in _held(tables).items() if e >= 0 and e in ids}
    seen: set[int] = set()
    for i, expert in enumerate(ids):
        slot = int(tables.slot_of[expert]) if expert >= 0 else EMPTY
        free = [s for s in worth if s not in taken]
        source[i] = -1
        if expert >= 0 and slot == EMPTY and free:
            slot = min(free, key=lambda s: (worth[s], s))
            evicted = int(tables.expert_in[slot])
            tables.counters[WASTED] += tables.is_unused_prefetch[slot]
            if evicted >= 0:
                tables.slot_of[evicted] = EMPTY
            tables.slot_of[expert], tables.expert_in[slot] = slot, expert
            source[i], target[i] = expert, slot
            taken.add(slot)
            tables.is_unused_prefetch[slot] = int(is_prefetch)
            tables.counters[PREFETCHES if is_prefetch else MISSES] += 1
        elif slot != EMPTY and not is_prefetch:
            tables.counters[HITS] += slot not in seen
            tables.is_unused_prefetch[slot] = 0
        seen.add(slot)
    named = torch.tensor(sorted({e for e in ids if e >= 0}), dtype=torch.long)
    if rule.is_recency:
        tables.score[named] = now
    elif not is_prefetch:
        tables.score *= rule.decay
        tables.score[named] += 1


def _held(tables: ResidencyTables) -> dict[int, int]:
    return dict(enumerate(tables.expert_in.tolist()))
