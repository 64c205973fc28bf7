"""One layer's slots under an eviction policy, in plain Python: for the host and the simulator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from foreroute.runtime.policies.duel import Duel, Shadow
from foreroute.runtime.policies.eviction import EvictionPolicy

EMPTY = -1
RESCALE_ABOVE = 2.0**400
RESCALE_BY = 2.0**-400
TIE = 2.0**-10
"""What a place further back in a token's choice adds to the step of a use, under recency."""


class LayerState:
    """Which experts of a layer lie in its slots, and what each is worth.

    The same rule as `kernels.plan`: of equal scores the lowest slot goes first (recency alone also
    orders the experts of one token). In place of decaying E scores a step, a use counts `unit`,
    which grows by 1 / decay a step: the order of scores is the same.
    """

    __slots__ = (
        "_duel",
        "_experts",
        "_grows_by",
        "_heap",
        "_is_recency",
        "_is_static",
        "_likely_bonus",
        "_ranking",
        "_shadows",
        "expert_in",
        "here",
        "num_slots",
        "policy",
        "step",
        "unit",
        "used_at",
        "worth",
    )

    def __init__(
        self,
        policy: EvictionPolicy,
        num_experts: int,
        num_slots: int,
        duel: Duel | None = None,
        *,
        has_shadows: bool = True,
    ) -> None:
        """Start with empty slots.

        Args:
            policy: How experts are scored.
            num_experts: E.
            num_slots: S.
            duel: Shared with other layers under an adaptive policy; own if None.
            has_shadows: Whether this layer's hits count in it.
        """
        self.policy = policy
        self.num_slots = num_slots
        self._experts = range(num_experts)
        self.here = [False] * num_experts
        """Per expert, whether it has a slot."""
        self.expert_in = [EMPTY] * num_slots
        self.worth = [0.0] * num_experts
        """Scores in growing units; only their order, or their ratio to `unit`, means something."""
        self.used_at = [0.0] * num_experts
        """Under an adaptive policy the step of each expert's last use."""
        self._ranking = self.worth
        self.step = 0
        self.unit = 1.0
        self._grows_by = 1.0 / policy.decay
        self._is_recency = policy.worth == "recency"
        self._is_static = policy.worth in ("static", "future")
        self._likely_bonus = policy.likely_bonus
        self._duel = (duel or Duel()) if policy.worth == "adaptive" else None
        has_shadows = has_shadows and self._duel is not None
        self._shadows = (Shadow(num_slots), Shadow(num_slots)) if has_shadows else None
        # one entry (worth, slot) per slot; a stale worth is too low, never too high
        self._heap = [(-1.0, slot) for slot in range(num_slots)]

    def demand(self, ids: Sequence[int]) -> list[int]:
        """Make one token's experts resident and count their use.

        Args:
            ids: Distinct experts, no more than slots.

        Returns:
            Those that were absent, in the same order.
        """
        here = self.here
        missing = [expert for expert in ids if not here[expert]]
        for expert in missing:
            self.admit(expert, ids)
        self.use(ids)
        return missing

    def use(self, ids: Sequence[int]) -> None:
        """Count one decode step in which these experts were used."""
        worth = self.worth
        self.step += 1
        if self._duel is not None:
            self._compete(self._duel, ids)
        if self._is_recency:
            when = float(self.step)
            for expert in ids:  # within a token in the router's order, as the host's cache has it
                worth[expert] = when
                when += TIE
        elif not self._is_static:
            unit = self.unit = self.unit * self._grows_by
            for expert in ids:
                worth[expert] += unit
            if unit > RESCALE_ABOVE:
                self._rescale()
        if self._duel is not None:
            self._follow(self._duel)

    def _compete(self, duel: Duel, ids: Sequence[int]) -> None:
        """Count what either rule would have hit, and when these experts were used."""
        if self._shadows is not None:
            by_frequency, by_recency = self._shadows
            duel.count(by_recency.demand(ids, self.used_at), by_frequency.demand(ids, self.worth))
        for expert in ids:
            self.used_at[expert] = self.step

    def _follow(self, duel: Duel) -> None:
        """Evict by the rule that leads, until this layer is used again."""
        ranking = self.used_at if duel.is_for_recency else self.worth
        if ranking is not self._ranking:
            self._ranking = ranking
            self._reorder()

    def expect(self, ids: Sequence[int], probabilities: Sequence[float]) -> None:
        """Credit experts that the next token is likely to use."""
        factor = self._likely_bonus * self.unit
        for expert, probability in zip(ids, probabilities, strict=True):
            self.worth[expert] += factor * probability

    def admit(self, expert: int, kept: Collection[int]) -> int:
        """Give an absent expert the slot of the least worth.

        Args:
            expert: The expert.
            kept: Experts that may not be evicted, besides.

        Returns:
            The expert evicted, or `EMPTY`.

        Raises:
            RuntimeError: If every slot holds one that may not be evicted.
        """
        slot = self.victim_slot(kept)
        if slot < 0:
            raise RuntimeError(f"All {self.num_slots} slots hold experts that are needed.")
        victim = self.expert_in[slot]
        if victim >= 0:
            self.here[victim] = False
        self.expert_in[slot] = expert
        self.here[expert] = True
        self._settle(expert, slot)
        return victim

    def _settle(self, expert: int, slot: int) -> None:
        """Enter the worth of an expert that now lies in the slot at the heap's top."""
        heapreplace(self._heap, (self._ranking[expert], slot))

    def victim_slot(self, kept: Collection[int]) -> int:
        """The slot that would be emptied next (also the top of the heap), or -1 if none may be."""
        heap, expert_in, worth = self._heap, self.expert_in, self._ranking
        aside: list[tuple[float, int]] = []
        slot = -1
        while heap:
            key, top = heap[0]
            expert = expert_in[top]
            if expert >= 0:
                now = worth[expert]
                if now != key:
                    heapreplace(heap, (now, top))
                    continue
                if expert in kept:
                    aside.append(heappop(heap))
                    continue
            slot = top
            break
        if aside:
            self._put_back(aside, slot)
        return slot

    def _reorder(self) -> None:
        ranking = self._ranking
        self._heap = [
            (ranking[expert] if expert >= 0 else -1.0, slot)
            for slot, expert in enumerate(self.expert_in)
        ]
        heapify(self._heap)

    def _put_back(self, aside: list[tuple[float, int]], slot: int) -> None:
        """Return entries that may not go; the victim's entry then lies at the top as if least."""
        heap = self._heap
        if slot >= 0:
            heappop(heap)
        for entry in aside:
            heappush(heap, entry)
        if slot >= 0:
            heappush(heap, (-2.0, slot))

    def release(self, expert: int) -> None:
        """Empty the slot of a resident expert."""
        slot = self.expert_in.index(expert)
        self.here[expert] = False
        self.expert_in[slot] = EMPTY
        self._heap = [(-1.0, slot), *(entry for entry in self._heap if entry[1] != slot)]
        heapify(self._heap)

    def frequency(self, expert: int) -> float:
        """Estimated uses per step, 0..1."""
        if self._is_recency:
            return 1.0 / (2.0 + self.step - self.worth[expert])
        forgets = max(1 - self.policy.decay, 1 / (1 + self.step))
        return min(1.0, self.worth[expert] / self.unit * forgets)

    def clear(self) -> None:
        """Empty every slot; scores stay."""
        for expert in self.expert_in:
            if expert >= 0:
                self.here[expert] = False
        self.expert_in = [EMPTY] * self.num_slots
        self._heap = [(-1.0, slot) for slot in range(self.num_slots)]

    def warm(self, prompt: Sequence[Sequence[int]]) -> None:
        """Count a prompt's uses, then fill the slots with the experts of most worth.

        Args:
            prompt: Per token the experts it used.
        """
        self.count_prompt(prompt)
        self.fill()

    def count_prompt(self, prompt: Sequence[Sequence[int]]) -> None:
        """Count a prompt's uses, per token the experts it used; slots stay as they are."""
        for ids in prompt:
            weight = self.policy.prompt_weight
            self.step += 1
            self.unit *= self._grows_by
            for place, expert in enumerate(ids):
                if self._is_recency:
                    self.worth[expert] = self.step + place * TIE
                else:
                    self.worth[expert] += self.unit * weight
                    self.used_at[expert] = self.step
            if self.unit > RESCALE_ABOVE:
                self._rescale()
        if self._shadows is not None:
            by_frequency, by_recency = self._shadows
            by_frequency.fill(self.worth)
            by_recency.fill(self.used_at)
        if self._duel is not None:
            self._follow(self._duel)

    def fill(self) -> None:
        """Make the experts of most worth resident, none that was never used."""
        worth = self._ranking
        used = [expert for expert in self._experts if worth[expert] > 0]
        best = sorted(used, key=lambda expert: -worth[expert])[: self.num_slots]
        best += [EMPTY] * (self.num_slots - len(best))
        for expert in self._experts:
            self.here[expert] = False
        for expert in best:
            if expert >= 0:
                self.here[expert] = True
        self.expert_in = best
        self._reorder()

    def _rescale(self) -> None:
        self.unit *= RESCALE_BY
        for expert in self._experts:
            self.worth[expert] *= RESCALE_BY
        self._reorder()

    def check_integrity(self) -> None:
        """Check the tables against each other.

        Raises:
            RuntimeError: If they disagree.
        """
        held = [expert for expert in self.expert_in if expert >= 0]
        there = [expert for expert in self._experts if self.here[expert]]
        if sorted(held) != there or sorted(s for _, s in self._heap) != list(range(self.num_slots)):
            raise RuntimeError(f"Slots hold {held}, the table says {there}.")
