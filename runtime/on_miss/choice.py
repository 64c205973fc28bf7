"""What a router chose for a few tokens, and what a rule makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.estimators.selection import SMALLEST_WEIGHT, gate_weights, selection_scores
from foreroute.estimators.types import GateFamily


@dataclass(frozen=True, kw_only=True)
class Gates:
    """How a layer's router ranks experts and weighs them."""

    family: GateFamily
    scale: float = 1.0
    """Factor on all gate weights."""
    selection_bias: Tensor | None = None
    """[E], added to scores where experts are chosen, and to nothing else."""

    def ranking(self, router_logits: Tensor) -> Tensor:
        """What experts are chosen by, [T, E] float32; routers with groups as if ungrouped."""
        if self.selection_bias is None:
            return router_logits.float()
        return selection_scores(router_logits, self.family, self.selection_bias)

    def weights(self, router_logits: Tensor, expert_ids: Tensor) -> Tensor:
        """Gate weights a router would give to these experts, whether or not it would choose them.

        Args:
            router_logits: [T, E].
            expert_ids: [T, K], int64.

        Returns:
            [T, K], float32.

        Raises:
            ValueError: If the model's rule is not known.
        """
        return gate_weights(router_logits, expert_ids, self.family, self.scale)


@dataclass(frozen=True, kw_only=True)
class RouterChoice:
    """A router's results for a few tokens."""

    expert_ids: Tensor
    """[T, K], int64."""
    gate_weights: Tensor
    """[T, K]."""
    gates: Gates
    router_logits: Tensor | None = None
    """[T, E]; only rules that weigh other experts read them."""

    @property
    def logits(self) -> Tensor:
        """The router's logits, [T, E]."""
        assert self.router_logits is not None  # the driver hooks the router for such rules
        return self.router_logits


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """What runs in the place of a router's choice."""

    expert_ids: Tensor
    """[T, K], int64: every one of them must be resident when the layer computes. Where an expert is
    left out, another one of the token stands for it."""
    gate_weights: Tensor
    """[T, K], 0 where an expert is left out."""
    is_run: Tensor
    """[T, K] bool: whether it is not left out."""


def shares_of(gate_weights: Tensor) -> Tensor:
    """Each expert's part of its token's gate weights, [T, K] float32, sums to 1."""
    weights = gate_weights.float()
    return weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_WEIGHT)


def is_before(weights: Tensor) -> Tensor:
    """Whether the second of two experts of a token comes before the first, heaviest first.

    Args:
        weights: [T, K].

    Returns:
        [T, K, K] bool; of equal weights the earlier place comes first.
    """
    first, second = weights.unsqueeze(2), weights.unsqueeze(1)
    place = torch.arange(weights.shape[-1], device=weights.device)
    return (second > first) | ((second == first) & (place[None, :] < place[:, None]))


def heaviest(weights: Tensor) -> Tensor:
    """Whether an expert is the one its token weighs most, [T, K] bool."""
    return ~is_before(weights).any(-1)
