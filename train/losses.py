"""What training makes small: how far predicted logits are from what the true routers did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from foreroute.estimators import EstimatorStack, selection_scores
from foreroute.estimators.types import GateFamily
from foreroute.train.prepared import PreparedBatch

LossName = Literal["kl", "boundary", "gate-mass", "bce"]


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
"""A loss takes predicted logits [P, T, E], float32; it is the mean over tokens, [P], float32."""


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
    predicted, true = predicted_logits.float(), router_logits.float()
    excess = functional.softplus(predicted) - functional.softplus(true)
    return (excess - true.sigmoid() * (predicted - true)).sum(dim=-1).mean(dim=-1)


def kl(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Divergence from the routers' softmax, or from each sigmoid score where routers have those."""
    divergence = kl_to_scores if rule.family.scores == "sigmoid" else kl_to_router
    return divergence(predicted_logits, target.target_logits)


def boundary(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Cross-entropy of soft membership in the top K, summed over experts.

    Experts far from the boundary weigh nothing, on either side, and ties are not forced apart.
    """
    scores = rule.ranking(predicted_logits)
    entropy: Tensor = MembershipEntropy.apply(scores, target.boundary, target.membership)  # type: ignore[no-untyped-call]
    return entropy / target.num_tokens


class MembershipEntropy(torch.autograd.Function):
    """Cross-entropy of membership by score with a target, [P], summed over tokens and experts.

    What autograd would do in a dozen passes over [P, T, E], gradient and all, in half of them.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, boundary: Tensor, membership: Tensor) -> Tensor:
        """Sum the entropy, and keep its gradient.

        Args:
            ctx: Takes the gradient.
            scores: What predicted experts are ranked by, [P, T, E], float32.
            boundary: Score at which membership is a half, and its width, [P, T, 2], float32.
            membership: The target, [P, T, E], float.
        """
        middle, width = boundary[..., :1], boundary[..., 1:]
        distance = (scores - middle).div_(width)
        entropy = functional.softplus(distance).addcmul_(membership, distance, value=-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(distance.sigmoid_().sub_(membership).div_(width))
        return entropy.sum(dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the scores alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].view(-1, 1, 1), None, None


def gate_mass(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Divergence of the predicted softmax from the gate weights of the top K, made to sum to 1.

    Experts that were not chosen have no share in the target.
    """
    weights = target.target_gate_weights.float()
    share = weights / weights.sum(dim=-1, keepdim=True)
    predicted = functional.log_softmax(predicted_logits, dim=-1)
    chosen = predicted.gather(-1, target.target_ids.long())  # [P, T, K]
    return functional.kl_div(chosen, share, reduction="none").sum(dim=-1).mean(dim=-1)


def bce(predicted_logits: Tensor, target: PreparedBatch, rule: RouterRule) -> Tensor:
    """Binary cross-entropy of each expert with whether it was chosen, summed over experts."""
    is_chosen = torch.zeros_like(predicted_logits).scatter_(-1, target.target_ids.long(), 1.0)
    entropy = functional.binary_cross_entropy_with_logits(
        rule.ranking(predicted_logits), is_chosen, reduction="none"
    )
    return entropy.sum(dim=-1).mean(dim=-1)


LOSSES: dict[LossName, Loss] = {
    "kl": kl,
    "boundary": boundary,
    "gate-mass": gate_mass,
    "bce": bce,
}
