"""Prefetch on the host: which predicted experts are worth fetching now, whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from foreroute.runtime.policies.layer_state import LayerState
from foreroute.runtime.policies.prefetching import (
    DEMAND_MEMORY,
    PRIOR_DEMAND,
    PRIOR_PREFETCHES,
    PrefetchRule,
)


@dataclass
class PrefetchChooser:
    """Spends the link's idle time by a `PrefetchRule`, and learns how far predictions hold.

    Experts come whole and behind the last demand, so the link is taken to be idle when a layer's
    predictions are known.
    """

    rule: PrefetchRule
    layer_ms: float
    """Compute of one layer: what a copy can hide behind."""
    copy_ms: float
    """One expert over the link."""
    right: float = PRIOR_PREFETCHES
    expected: float = PRIOR_PREFETCHES
    _demands: dict[int, float] = field(default_factory=dict)
    _asked: dict[int, dict[int, float]] = field(default_factory=dict)

    @property
    def trust(self) -> float:
        """How often guesses at absent experts come true, over how often they say."""
        return min(1.0, self.right / self.expected)

    def forget(self) -> None:
        """Trust predictions as at first."""
        self.right = self.expected = PRIOR_PREFETCHES

    def choose(
        self,
        layer: int,
        state: LayerState,
        predicted: Iterable[tuple[int, float]],
        *,
        kept: Collection[int],
        ahead: float = 1,
    ) -> Iterator[int]:
        """Experts to fetch now; the caller gives each its slot before it asks for the next.

        Args:
            layer: The layer that will need them.
            state: Its slots.
            predicted: Distinct experts and their probabilities.
            kept: Experts that may not be evicted for them.
            ahead: Layers of compute until then.

        Yields:
            Absent experts, likeliest first.
        """
        spared, room_ms = set(kept), ahead * self.layer_ms
        for expert, probability in sorted(predicted, key=lambda guess: -guess[1]):
            chance = probability * self.trust
            if room_ms <= 0 or chance < self.rule.least_confidence:
                break
            if state.here[expert]:
                continue
            slot = state.victim_slot(spared)
            if slot < 0 or not self._pays(layer, state, state.expert_in[slot], chance, room_ms):
                break
            spared.add(expert)
            room_ms -= self.copy_ms
            self._asked.setdefault(layer, {})[expert] = probability
            yield expert

    def _pays(
        self, layer: int, state: LayerState, victim: int, chance: float, room_ms: float
    ) -> bool:
        hidden_ms = min(self.copy_ms, room_ms)
        feared = state.frequency(victim) if victim >= 0 else 0.0
        if not self.rule.is_worth(chance, hidden_ms, feared, self.copy_ms):
            return False
        overhang_ms = self.copy_ms - hidden_ms
        demand = self._demands.get(layer, PRIOR_DEMAND)
        return not overhang_ms or self.rule.may_overhang(chance, hidden_ms, overhang_ms, demand)

    def settle(self, layer: int, needed: Collection[int], *, has_missed: bool) -> None:
        """Learn from what a layer needed.

        Args:
            layer: The layer.
            needed: Its experts.
            has_missed: Whether some had to be fetched on demand.
        """
        keeps = 1 - 1 / self.rule.trust_tokens
        for expert, probability in self._asked.pop(layer, {}).items():
            self.right = self.right * keeps + (expert in needed)
            self.expected = self.expected * keeps + probability
        habit = self._demands.get(layer, PRIOR_DEMAND)
        self._demands[layer] = habit * DEMAND_MEMORY + (1 - DEMAND_MEMORY) * has_missed
