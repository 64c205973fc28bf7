"""What the kernels know about residency: one layer's tables on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from foreroute.runtime.policies.prefetching import PRIOR_PREFETCHES, find_prefetch_rule

EMPTY = -1
HITS, MISSES, PREFETCHES, WASTED, HEADS, TAILS, WASTED_HEADS, REGRETS = range(8)
NUM_COUNTERS = 8
WHOLE, HEAD, TAIL = range(3)
"""Parts of an expert that a copy moves."""
AT_MISSES, AT_PREFETCHES, AT_WASTED, AT_HEADS, AT_TAILS, AT_WASTED_HEADS, AT_REGRETS = map(
    tl.constexpr, (MISSES, PREFETCHES, WASTED, HEADS, TAILS, WASTED_HEADS, REGRETS)
)
"""Where a kernel finds a counter; the hits come first."""
NO_EXPERT, ONLY_HEAD, ONLY_TAIL = map(tl.constexpr, (EMPTY, HEAD, TAIL))
"""The same as `EMPTY`, `HEAD` and `TAIL`, for kernels."""
MOST_EARLY = 4
"""Experts begun early for one layer: whole ones, and a head."""
NUM_DRIVEN_OUT = tl.constexpr(MOST_EARLY)
HEAD_RULE = find_prefetch_rule("head")
TRUST_MEMORY = 1 - 1 / HEAD_RULE.trust_tokens
"""Kept of what is known about earlier heads, when another one is settled."""


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
    """[8] int32: hits, misses, prefetches, prefetches never used; heads, heads that were needed and
    got their tails, heads that were not; misses of experts that a demand had made resident and that
    what was begun for this very demand drove out (for its first part, if it comes in parts)."""
    pending: Tensor
    """[2] int32: the expert whose head is here or on its way, or -1, and its slot."""
    pending_confidence: Tensor
    """[1] float32: how many of the experts begun for the next demand are expected to be needed."""
    driven_out: Tensor
    """[4] int32: the experts that what is begun for the next demand drove out, or -1; none that had
    come early themselves and were never used."""
    arrived: Tensor
    """[S] int32: of an expert on its way, the programs that have copied its first part."""
    progress: Tensor
    """[2] int32: programs that copy for this layer's demand, and those that are done with it."""
    trust: Tensor
    """[2] float32, shared by all layers: guesses that were needed, and how many were expected to
    be; both fade by `TRUST_MEMORY`."""
    rivals: Tensor | None = None
    """[2, E] float32 under an adaptive rule: decayed frequency, and the step of the last use;
    `score` is one of them."""
    shadows: Tensor | None = None
    """[2, E] int32, 1 where a rival alone would have made the expert resident; in some layers."""
    lead: Tensor | None = None
    """[1] int32, shared by all layers: hits that recency's shadows are ahead."""

    @classmethod
    def empty(
        cls,
        num_experts: int,
        num_slots: int,
        device: torch.device | str,
        *,
        trust: Tensor | None = None,
        counters: Tensor | None = None,
        lead: Tensor | None = None,
        has_shadows: bool = False,
    ) -> ResidencyTables:
        """Tables of a layer with no expert resident.

        Args:
            num_experts: E.
            num_slots: S.
            device: Where they lie.
            trust: Shared with other layers; own if None.
            counters: A row of a tensor that holds all layers' counters; own if None.
            lead: Shared with other layers under an adaptive rule; no rivals if None.
            has_shadows: Whether this layer's hits count in it.
        """

        def filled(size: int, value: int) -> Tensor:
            return torch.full((size,), value, dtype=torch.int32, device=device)

        return cls(
            slot_of=filled(num_experts, EMPTY),
            expert_in=filled(num_slots, EMPTY),
            score=torch.zeros(num_experts, dtype=torch.float32, device=device),
            is_unused_prefetch=filled(num_slots, 0),
            step=filled(1, 0),
            counters=filled(NUM_COUNTERS, 0) if counters is None else counters,
            pending=filled(2, EMPTY),
            pending_confidence=torch.zeros(1, device=device),
            driven_out=filled(MOST_EARLY, EMPTY),
            arrived=filled(num_slots, 0),
            progress=filled(2, 0),
            trust=torch.full((2,), PRIOR_PREFETCHES, device=device) if trust is None else trust,
            rivals=None if lead is None else torch.zeros(2, num_experts, device=device),
            shadows=filled(2 * num_experts, 0).view(2, -1) if has_shadows else None,
            lead=lead,
        )

    @property
    def learnt(self) -> list[Tensor]:
        """What is known of the experts' uses."""
        rivalry = (self.rivals, self.shadows, self.lead)
        return [self.score, self.step, *(tensor for tensor in rivalry if tensor is not None)]

    def reset(self) -> None:
        """Forget everything that is resident, and the counts, in place."""
        self.forget()
        self.counters.zero_()

    def forget(self) -> None:
        """Forget everything that is resident, in place; counts go on."""
        for tensor in (self.slot_of, self.expert_in, self.pending, self.driven_out):
            tensor.fill_(EMPTY)
        own = (*self.learnt, self.is_unused_prefetch, self.pending_confidence)
        for tensor in (*own, self.arrived, self.progress):
            tensor.zero_()

    def check_integrity(self) -> None:
        """Check the tables against each other.

        Raises:
            RuntimeError: If they disagree.
        """
        if self.pending[0] != EMPTY:
            raise RuntimeError(f"Only the head of expert {int(self.pending[0])} has been copied.")
        expert_in = self.expert_in.tolist()
        placed = {e: s for e, s in enumerate(self.slot_of.tolist()) if s != EMPTY}
        if placed != {e: s for s, e in enumerate(expert_in) if e != EMPTY}:
            raise RuntimeError(f"Slot table {placed} and slot contents {expert_in} disagree.")
        if len(set(placed.values())) != len(placed):
            raise RuntimeError(f"Two experts share a slot: {placed}.")
