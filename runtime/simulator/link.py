"""Times of one machine for one model, as the replay's inner loop needs them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from foreroute.runtime.planning.machine import MachineProfile
from foreroute.runtime.simulator.timeline import Machine

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
    """From routing known to the first byte of a prefetch."""
    demand_ms: tuple[float, ...]
    """To copy n experts that were asked for at once, n = 0, 1, ..."""
    pieces: int
    """Pieces that a prefetch is cut in."""
    piece_ms: float
    """To copy one."""
    early_ms: tuple[float, ...] = ()
    """To copy n whole experts beside compute; as on demand if empty."""
    fetch_ms: float = 0.0
    """What copying any part of an expert takes, however small, less the layer's own compute that
    goes on meanwhile; so it can be negative. It is part of `demand_ms`."""
    begin_ms: float = 0.0
    """From a demand's last byte to the first of a prefetch."""
    ahead_ms: float = 0.0
    """What predicting and copying beside it costs a layer."""

    @property
    def head_share(self) -> float:
        """The share of an expert that the rule `head` fetches: what comes during a layer."""
        hidden_ms = max(0.0, self.layer_ms - self.predict_ms)
        return min(1.0, hidden_ms / self.demand_ms[1]) if self.demand_ms[1] else 1.0

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
        hidden_ms = min(profile.overlap_ms, profile.copy_ms(size))
        demand_ms = tuple(
            profile.copy_ms(count * size) - hidden_ms if count else 0.0
            for count in range(top_k + 1)
        )
        early_ms = tuple(profile.early_copy_ms(count * size) for count in range(top_k + 1))
        return cls(
            layer_ms=profile.layer_ms if layer_ms is None else layer_ms,
            token_ms=profile.token_ms,
            predict_ms=profile.predict_ms,
            demand_ms=demand_ms,
            pieces=pieces,
            piece_ms=profile.early_copy_ms(FULL_GATHER * size) / FULL_GATHER / pieces,
            early_ms=early_ms,
            fetch_ms=min(profile.fetch_ms - hidden_ms, demand_ms[1]),
            begin_ms=profile.begin_ms,
            ahead_ms=profile.ahead_ms,
        )

    def delayed(self, share: float) -> LinkTimes:
        """The same where predictions come later after a layer's routing.

        Args:
            share: How much later, as a share of a layer's compute.
        """
        return dataclasses.replace(self, predict_ms=self.predict_ms + share * self.layer_ms)

    def machine(self) -> Machine:
        """The form that the replay's inner loops take."""
        return Machine(
            layer_ms=self.layer_ms,
            token_ms=self.token_ms,
            predict_ms=self.predict_ms,
            fetch_ms=self.fetch_ms,
            begin_ms=self.begin_ms,
            ahead_ms=self.ahead_ms,
            head_share=self.head_share,
            demand_ms=np.array(self.demand_ms, dtype=np.float64),
            early_ms=np.array(self.early_ms or self.demand_ms, dtype=np.float64),
            pieces=self.pieces,
            piece_ms=float(self.piece_ms),
        )
