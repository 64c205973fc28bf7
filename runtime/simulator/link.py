"""Times of one machine for one model, as the replay's inner loop needs them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreroute.runtime.machine import MachineProfile

FULL_GATHER = 4
"""Experts of which a prefetch's rate is taken: it goes on while others are asked for."""


@dataclass(frozen=True)
class LinkTimes:
    """All in ms."""

    layer_ms: float
    """Compute from one layer's routing to the next one's."""
    token_ms: float
    """Compute outside the layers."""
    predict_ms: float
    """From routing known to predictions known."""
    demand_ms: tuple[float, ...]
    """To copy n experts that were asked for at once, n = 0, 1, ..."""
    pieces: int
    """Pieces that a prefetch is cut in."""
    piece_ms: float
    """To copy one."""

    @classmethod
    def of(
        cls,
        profile: MachineProfile,
        *,
        top_k: int,
        expert_bytes: int | None = None,
        layer_ms: float | None = None,
    ) -> LinkTimes:
        """Take the reference model of a profile, or another one.

        Args:
            profile: The machine.
            top_k: K.
            expert_bytes: Bytes of one expert as copied.
            layer_ms: Compute per layer.
        """
        size = expert_bytes or profile.expert_bytes
        pieces = max(1, math.ceil(size / profile.piece_bytes))
        return cls(
            layer_ms=profile.layer_ms if layer_ms is None else layer_ms,
            token_ms=profile.token_ms,
            predict_ms=profile.predict_ms,
            demand_ms=tuple(profile.copy_ms(count * size) for count in range(top_k + 1)),
            pieces=pieces,
            piece_ms=profile.copy_ms(FULL_GATHER * size) / FULL_GATHER / pieces,
        )

    def copy_ms(self, experts: float) -> float:
        """To copy a number of experts, parts of one included."""
        whole = int(experts)
        if whole >= len(self.demand_ms) - 1:
            return self.demand_ms[-1] * experts / (len(self.demand_ms) - 1)
        part = experts - whole
        if not part:
            return self.demand_ms[whole]
        below, above = self.demand_ms[whole], self.demand_ms[whole + 1]
        return below + part * (above - below)
