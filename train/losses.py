"""What training makes small: how far predicted logits are from what the true routers did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

from foreroute.estimators import EstimatorStack, selection_scores
from foreroute.estimators.calibration import decision_margins
from foreroute.estimators.types import GateFamily
from foreroute.train.prepared import PreparedBatch

LossName = Literal["kl", "boundary", "gate-mass"]
BOUNDARY_WIDTH = 0.2
"""Softness of the boundary between chosen and other experts, in standard deviations of scores."""


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How the target routers choose experts by their logits."""

    family: GateFamily
    """How scores follow from logits."""
    selection_bias: Tensor | None
    """Added to the scores where experts are chosen, [P, 1, E]; None if there is none."""

    @classmethod
    def of(cls, stack: EstimatorStack) -> RouterRule:
        """The rule of a stack's target layers, on its device."""
        bias = stack.input.selection_bias
        return cls(
            family=stack.geometry.gate_family,
            selection_bias=None if bias is None else bias.unsqueeze(1),
        )

    def ranking(self, logits: Tensor) -> Tensor:
        """Scores in whose order the routers choose, [P, T, E], float32."""
        if self.selection_bias is None:
            return logits
        return selection_scores(logits, self.family, self.selection_bias)


Loss = Callable[[Tensor, PreparedBatch, RouterRule], Tensor]
"""Of predicted logits [P, T, E] float32, on tokens: mean over tokens, [P], float32."""


def kl_to_router(predicted_logits: Tensor, router_logits: Tensor) -> Tensor:
    """Divergence of the predicted from the true routing distribution, per layer pair.

    Args:
        predicted_logits: [P, T, E], float.
        router_logits: True logits, [P, T, E], float.

    Returns:
        KL(softmax(true) || softmax(predicted)) in nats, mean over tokens, [P], float32.
    """
    predicted = functional.log_softmax(predicted_logits.float(), dim=-1)
    true = functional.log_softmax(router_logits.float(), dim=-1)
    divergence = functional.kl_div(predicted, true, reduction="none", log_target=True)
    return divergence.sum(dim=-1).mean(dim=-1)


def kl_to_scores(predicted_logits: Tensor, router_logits: Tensor) -> Tensor:
    """Divergence of each expert's predicted from its true sigmoid score, per layer pair.

    Scores that are right rank right, whatever selection bias is added to both.

    Args:
        predicted_logits: [P, T, E], float.
        router_logits: True logits, [P, T, E], float.

    Returns:
        Sum over experts of KL(Bernoulli(true) || Bernoulli(predicted)) in nats, mean over tokens,
        [P], float32.
    """
    return _bernoulli_kl(predicted_logits.float(), router_logits.float())


def _bernoulli_kl(predicted: Tensor, true: Tensor) -> Tensor:
    """Of the sigmoids of both, summed over experts, mean over tokens, [P]."""
    excess = functional.softplus(predicted) - functional.softplus(true)
    return (excess - true.sigmoid() * (predicted - true)).sum(dim=-1).mean(dim=-1)


def kl(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Divergence from the routers' softmax, or from each sigmoid score where routers have those."""
    divergence = kl_to_scores if rule.family.startswith("sigmoid") else kl_to_router
    return divergence(predicted_logits, target.target_logits)


def boundary(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Divergence of predicted from true soft membership in the top K, plus `kl`.

    Membership is the sigmoid of how far an expert's score lies above the middle of the K-th and the
    next one's, in units of `BOUNDARY_WIDTH` standard deviations of the layer's true scores. Experts
    far from the boundary weigh nothing there, on either side, and ties are not forced apart; `kl`
    keeps their logits the router's.
    """
    top_k = target.target_ids.shape[-1]
    true = rule.ranking(target.target_logits.float())
    width = BOUNDARY_WIDTH * true.std(dim=(1, 2), keepdim=True)  # [P, 1, 1]
    wanted = decision_margins(true, top_k) / width
    margins = decision_margins(rule.ranking(predicted_logits), top_k) / width
    return _bernoulli_kl(margins, wanted) + kl(predicted_logits, target, rule)


def gate_mass(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Divergence of the predicted softmax from the gate weights of the top K, made to sum to 1.

    Experts that were not chosen have no share in the target.
    """
    weights = target.target_gate_weights.float()
    share = weights / weights.sum(dim=-1, keepdim=True)
    predicted = functional.log_softmax(predicted_logits, dim=-1)
    chosen = predicted.gather(-1, target.target_ids.long())  # [P, T, K]
    return functional.kl_div(chosen, share, reduction="none").sum(dim=-1).mean(dim=-1)


LOSSES: dict[LossName, Loss] = {"kl": kl, "boundary": boundary, "gate-mass": gate_mass}
