"""Eviction that adapts: which of two rules evicts follows from the hits that either would have had.

The rules are decayed frequency and recency. In some layers, each of them has shadow slots: the ids
of the experts that would be resident had it always evicted. Their hits are compared step by step.
The same stands in `simulator/timeline.py`; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DUEL_LAYERS = 24
"""Layers that have shadow slots, at most."""
LEAST_LEAD = 24
"""Hits by which recency must lead before it evicts."""
MOST_LEAD = 192
"""Either rule's lead is cut here, so that what was long ago is soon made up for."""


def duelling_layers(num_layers: int) -> list[bool]:
    """Which layers have shadow slots, spread evenly, [L]."""
    count = min(num_layers, DUEL_LAYERS)
    chosen = {(2 * place + 1) * num_layers // (2 * count) for place in range(count)}
    return [layer in chosen for layer in range(num_layers)]


@dataclass
class Duel:
    """Who leads; shared by the layers of an engine."""

    lead: int = 0
    """Hits that the shadows of recency had more than those of decayed frequency."""

    @property
    def is_for_recency(self) -> bool:
        """Whether recency evicts."""
        return self.lead >= LEAST_LEAD

    def count(self, recency_hits: int, frequency_hits: int) -> None:
        """Compare one decode step of one layer."""
        lead = self.lead + recency_hits - frequency_hits
        self.lead = min(MOST_LEAD, max(-MOST_LEAD, lead))


class Shadow:
    """The experts of a layer that would be resident had one rule always evicted."""

    def __init__(self, num_slots: int) -> None:
        """Start with none.

        Args:
            num_slots: S.
        """
        self.experts: set[int] = set()
        self._num_slots = num_slots

    def demand(self, ids: Sequence[int], worth: Sequence[float]) -> int:
        """Make a step's experts resident; of equal worth the lowest expert goes first.

        Args:
            ids: Distinct experts; they stay, were they more than slots.
            worth: Of every expert before the step, [E].

        Returns:
            How many were there.
        """
        hits = len(self.experts.intersection(ids))
        others = sorted(self.experts.difference(ids), key=lambda expert: (worth[expert], expert))
        self.experts.difference_update(others[: max(0, len(others) + len(ids) - self._num_slots)])
        self.experts.update(ids)
        return hits

    def fill(self, worth: Sequence[float]) -> None:
        """Make those of most worth resident, none that was never used, [E]."""
        used = [expert for expert, value in enumerate(worth) if value > 0]
        self.experts = set(sorted(used, key=lambda expert: -worth[expert])[: self._num_slots])
