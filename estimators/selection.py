"""How a router ranks experts: by its logits, or by scores with a bias that only selection sees."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from foreroute.estimators.types import GateFamily

SMALLEST_WEIGHT = 1e-20


def router_scores(router_logits: Tensor, family: GateFamily) -> Tensor:
    """What a gate family makes of router logits before it chooses experts.

    Args:
        router_logits: [*, E], float.
        family: The model's rule.

    Returns:
        [*, E], float32, above 0.

    Raises:
        ValueError: If the family is `other`: the rule is not known.
    """
    logits, kind = router_logits.float(), family.scores
    if kind is None:
        raise ValueError(
            "How this model derives its gate weights from router logits is not known, so no "
            "expert can be weighed that it did not choose. Use on_miss=fetch or skip."
        )
    if kind == "sigmoid":
        return logits.sigmoid()
    if kind == "sqrtsoftplus":
        return functional.softplus(logits).sqrt()
    return logits.softmax(dim=-1)


def gate_weights(
    router_logits: Tensor, expert_ids: Tensor, family: GateFamily, scale: float = 1.0
) -> Tensor:
    """Gate weights a router would give to these experts, whether or not it would choose them.

    A bias that only takes part in choosing the experts (`e_score_correction_bias`) plays no role
    here, and a softmax over the chosen logits is the renormalised softmax over all of them.

    Args:
        router_logits: [T, E].
        expert_ids: [T, K], int64.
        family: The model's rule.
        scale: Factor on all weights.

    Returns:
        [T, K], float32.

    Raises:
        ValueError: If the family is `other`: the rule is not known.
    """
    chosen = router_scores(router_logits, family).gather(-1, expert_ids)  # [T, K]
    if family.is_renormalised:
        chosen = chosen / chosen.sum(-1, keepdim=True).clamp_min(SMALLEST_WEIGHT)
    return chosen * scale


def nearly_chosen(router_logits: Tensor, top_k: int) -> Tensor:
    """How near a router came to choosing each expert: a guess at what the next token will use.

    Args:
        router_logits: [*, E], float.
        top_k: K, experts of a token.

    Returns:
        [*, E], float32, 0..1: K times the softmax's share, at most 1.

    Example:
        >>> import torch
        >>> nearly_chosen(torch.tensor([1.0, 1.0, 1.0, 1.0]), top_k=2)
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return router_logits.float().softmax(dim=-1).mul(top_k).clamp(max=1)


def selection_scores(router_logits: Tensor, family: GateFamily, selection_bias: Tensor) -> Tensor:
    """What the experts of a model with a selection bias are chosen by (DeepSeek-V3 and its kin).

    Routers that choose within groups of experts (`topk_group`) are ranked as if ungrouped.

    Args:
        router_logits: [*, E], float.
        family: The model's rule.
        selection_bias: [E], or anything that broadcasts with the logits, float.

    Returns:
        [*, E], float32; the top-K of it are the experts of a token.

    Example:
        >>> import torch
        >>> logits, bias = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.5])
        >>> selection_scores(logits, GateFamily.SIGMOID, bias)
        tensor([0.8808, 1.0000])
    """
    return router_scores(router_logits, family) + selection_bias
