"""Speculative execution: which experts run in place of the true ones, and when to stop doing it."""

from __future__ import annotations

import logging
from collections import deque

import torch
from torch import Tensor

from foreroute.data.adapters import gate_weights
from foreroute.estimators.types import GateFamily

logger = logging.getLogger(__name__)

WINDOW_LAYER_STEPS = 256


def gate_weights_of(
    router_logits: Tensor,
    expert_ids: Tensor,
    family: GateFamily,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Gate weights a router would give to these experts, whether or not it would choose them.

    Args:
        router_logits: [T, E].
        expert_ids: [T, K].
        family: How this model derives gate weights.
        scale: Factor on all of them.
        dtype: Of the result.

    Returns:
        [T, K].

    Raises:
        ValueError: If the model's rule is not known.
    """
    return gate_weights(router_logits, expert_ids, family, scale).to(dtype)


def without_missing(gate_weights: Tensor, is_present: Tensor, family: GateFamily) -> Tensor:
    """Gate weights when some experts are left out.

    Models that renormalise their gate weights get the same sum as before; others keep the rest as
    it is (renormalising them multiplies the error).

    Args:
        gate_weights: [T, K].
        is_present: [T, K] bool.
        family: How this model derives gate weights.

    Returns:
        [T, K], zero where missing.
    """
    kept = gate_weights * is_present
    if not family.is_renormalised:
        return kept
    before = gate_weights.sum(-1, keepdim=True)
    after = kept.sum(-1, keepdim=True)
    return torch.where(after > 0, kept * (before / after.clamp_min(1e-9)), kept)


class AgreementGuard:
    """Ends speculative execution when too few of its experts are the true router's."""

    def __init__(self, floor: float) -> None:
        """Start trusting.

        Args:
            floor: Least share of agreement over the last layer steps, 0..1.
        """
        self.floor = floor
        self.is_open = True
        self._recent: deque[tuple[int, int]] = deque(maxlen=WINDOW_LAYER_STEPS)

    def observe(self, num_agreed: int, num_run: int) -> None:
        """Count one layer's experts for one step; may close the guard for good."""
        self._recent.append((num_agreed, num_run))
        if not self.is_open or len(self._recent) < WINDOW_LAYER_STEPS:
            return
        agreed, run = (sum(column) for column in zip(*self._recent, strict=True))
        if agreed < self.floor * run:
            self.is_open = False
            logger.warning(
                "Speculative execution is off from here: only %.0f %% of the experts run were the "
                "true router's, the floor is %.0f %%.",
                100 * agreed / run,
                100 * self.floor,
            )
