"""Belady's bound: evicts the expert whose next use is farthest, which only a replay knows."""

from __future__ import annotations

from collections.abc import Sequence

from foreroute.runtime.policies import EvictionPolicy, LayerState

NEVER = float("-inf")


class BeladyState(LayerState):
    """A layer's slots with the future known."""

    __slots__ = ("_next_uses",)

    def __init__(
        self,
        policy: EvictionPolicy,
        num_experts: int,
        num_slots: int,
        route: Sequence[Sequence[int]],
        **shared: object,
    ) -> None:
        """Read the future.

        Args:
            policy: `belady`.
            num_experts: E.
            num_slots: S.
            route: Per token, in the order of replay, the experts it uses.
            **shared: As `LayerState` takes it.
        """
        super().__init__(policy, num_experts, num_slots, **shared)  # type: ignore[arg-type]
        self._next_uses: list[list[float]] = []  # minus the step of the next use, per token
        upcoming: dict[int, float] = {}
        for step in range(len(route) - 1, -1, -1):
            self._next_uses.append([upcoming.get(expert, NEVER) for expert in route[step]])
            upcoming.update(dict.fromkeys(route[step], -float(step)))
        self._next_uses.reverse()
        for expert in self._experts:
            self.worth[expert] = upcoming.get(expert, NEVER)

    def use(self, ids: Sequence[int]) -> None:
        """Look up when these experts come next."""
        for expert, worth in zip(ids, self._next_uses[self.step], strict=True):
            self.worth[expert] = worth
        self.step += 1

    def victim_slot(self, kept: object) -> int:
        """The slot whose expert comes last; empty ones first."""
        best, least = -1, 1.0
        for slot, expert in enumerate(self.expert_in):
            if expert < 0:
                return slot
            worth = self.worth[expert]
            if worth < least and expert not in kept:  # type: ignore[operator]
                best, least = slot, worth
        return best

    def _settle(self, expert: int, slot: int) -> None:
        """No heap to keep."""

    def warm(self, prompt: Sequence[Sequence[int]]) -> None:
        """Replay the prompt, untimed."""
        for ids in prompt:
            self.demand(ids)
