"""Copies of a model's routers and the norms that feed them, kept only if they give its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreroute.data.adapters.exceptions import is_hash_routed
from foreroute.data.adapters.probe import Observed
from foreroute.estimators.fingerprint import fingerprint_of
from foreroute.estimators.selection import selection_scores
from foreroute.estimators.types import GateFamily, LayerAnchors, NormKind

NORM_TOLERANCE = 1e-2  # bfloat16 models round to three digits
LOGIT_TOLERANCE = 3e-2  # of the largest logit: a product of rounded numbers
SMALLEST_SQUARE = 1e-12
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def build_anchors(
    layers: Sequence[Observed], blocks: Sequence[nn.Module], family: GateFamily
) -> LayerAnchors:
    """The tensors that training-free prediction needs, checked against the probe's own logits.

    Args:
        layers: What the probe saw.
        blocks: Parent of each experts module.
        family: The model's gate rule.

    Raises:
        ValueError: If the routers are not `norm`, then one linear map; says what they are instead.
    """
    if len({seen.num_experts for seen in layers}) > 1:
        raise ValueError("its layers have different numbers of experts")
    weights = torch.stack([_router_weight(seen) for seen in layers])  # [L, E, D]
    biases = torch.stack([_router_bias(seen) for seen in layers])  # [L, E]
    parts = [_norm_parts(seen) for seen in layers]
    kinds, norm_weights, norm_biases, epsilons = zip(*parts, strict=True)
    if len(set(kinds)) > 1 or len(set(epsilons)) > 1:
        raise ValueError("norms of different kinds feed its routers")
    return LayerAnchors(
        router_weight=weights,
        router_bias=biases,
        norm_weight=torch.stack(norm_weights),
        norm_bias=torch.stack(norm_biases),
        norm_kind=kinds[0],
        norm_eps=epsilons[0],
        selection_bias=_selection_biases(layers, blocks, family),
    )


def router_fingerprint(layers: Sequence[Observed]) -> str:
    """Names the checkpoint by its routers' weights, in layer order; see `fingerprint_of`."""
    return fingerprint_of(tensor for seen in layers for tensor in _router_tensors(seen))


def _router_tensors(seen: Observed) -> list[Tensor]:
    weight = _weight_matrix(seen)
    router = seen.router or seen.experts
    return [weight] if weight is not None else [p.detach() for p in router.parameters()]


def _weight_matrix(seen: Observed) -> Tensor | None:
    """The router's [>= E, D] weight, its own or a child's; None if it has none."""
    for module in (seen.router, *(seen.router.children() if seen.router else ())):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) >= seen.num_experts:
            return weight.detach()
    return None


def _router_weight(seen: Observed) -> Tensor:
    weight = _weight_matrix(seen)
    if weight is None or seen.router_logits is None or seen.router is None:
        raise ValueError(f"{type(seen.router).__name__} is not one linear map")
    rows = weight[: seen.num_experts].float().cpu()
    if rows.shape[1] != seen.router_input.shape[-1]:
        raise ValueError(f"{type(seen.router).__name__} is not one linear map of its input")
    given = seen.router_logits.float().cpu()
    computed = seen.router_input.float().cpu() @ rows.T + _router_bias(seen)  # [T, E]
    if not torch.allclose(computed, given, atol=LOGIT_TOLERANCE * float(given.abs().max())):
        raise ValueError(f"the logits of {type(seen.router).__name__} are not linear in its input")
    return rows


def _router_bias(seen: Observed) -> Tensor:
    bias = getattr(seen.router, "bias", None)
    if isinstance(bias, Tensor) and bias.dim() == 1 and len(bias) >= seen.num_experts:
        return bias.detach()[: seen.num_experts].float().cpu()
    return torch.zeros(seen.num_experts)


def _selection_biases(
    layers: Sequence[Observed], blocks: Sequence[nn.Module], family: GateFamily
) -> Tensor | None:
    """What the routers add to their scores where they choose, [L, E]; None if nothing."""
    pairs = zip(layers, blocks, strict=True)
    biases = [_selection_bias(seen, block, family) for seen, block in pairs]
    if all(bias is None for bias in biases):
        return None
    none = torch.zeros(layers[0].num_experts)
    return torch.stack([none if bias is None else bias for bias in biases])


def _selection_bias(seen: Observed, block: nn.Module, family: GateFamily) -> Tensor | None:
    """A tensor `..._bias` of one number per expert which explains the probe's choice, [E]."""
    if family is GateFamily.OTHER or seen.router_logits is None or is_hash_routed(seen.router):
        return None  # what the bias would be added to is not known
    logits, size = seen.router_logits.float().cpu(), seen.num_experts

    def num_chosen(bias: Tensor) -> int:
        ranked = selection_scores(logits, family, bias).topk(seen.expert_ids.shape[-1]).indices
        return int((ranked.unsqueeze(-1) == seen.expert_ids.cpu().unsqueeze(-2)).sum())

    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name.endswith("_bias") and tensor.numel() == size and not tensor.is_meta:
            bias = tensor.detach().flatten().float().cpu()
            if num_chosen(bias) >= num_chosen(torch.zeros(size)):
                return bias
    return None


def _norm_parts(seen: Observed) -> tuple[NormKind, Tensor, Tensor, float]:
    """Kind, weight, bias and epsilon of the norm, verified on what went through it."""
    hidden_size = seen.router_input.shape[-1]
    if seen.norm is None and seen.residual_source is seen.router:
        return "none", torch.ones(hidden_size), torch.zeros(hidden_size), 0.0
    if seen.norm is None:
        return _norm_within(seen)
    raw = getattr(seen.norm, "weight", None)
    if not isinstance(raw, Tensor) or raw.shape != (hidden_size,):
        raise ValueError(f"{type(seen.norm).__name__} is neither an RMS norm nor a LayerNorm")
    weight = raw.detach().float().cpu()
    bias = _norm_bias(seen.norm, weight)
    epsilon = _epsilon(seen.norm)
    residual, expected = seen.residual.float().cpu(), seen.router_input.float().cpu()
    scaled = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + epsilon)
    centred = torch.nn.functional.layer_norm(residual, weight.shape, weight, bias, epsilon)
    candidates: list[tuple[NormKind, Tensor, Tensor]] = [
        ("rms", weight, scaled * weight + bias),
        ("rms", weight + 1, scaled * (weight + 1) + bias),
        ("layer", weight, centred),
    ]
    for kind, factor, result in candidates:
        if torch.allclose(result, expected, atol=NORM_TOLERANCE, rtol=NORM_TOLERANCE):
            return kind, factor, bias, epsilon
    raise ValueError(f"{type(seen.norm).__name__} is neither an RMS norm nor a LayerNorm")


def _norm_within(seen: Observed) -> tuple[NormKind, Tensor, Tensor, float]:
    """The same of a norm inside the router: an RMS norm and constant factors, found by division."""
    assert seen.residual_source is not None  # it holds the router
    residual, expected = seen.residual.float().cpu(), seen.router_input.float().cpu()
    epsilon = _epsilon(seen.residual_source)
    scaled = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + epsilon)  # [T, D]
    factor = (expected * scaled).sum(0) / scaled.square().sum(0).clamp_min(SMALLEST_SQUARE)
    if not torch.allclose(scaled * factor, expected, atol=NORM_TOLERANCE, rtol=NORM_TOLERANCE):
        raise ValueError(f"{type(seen.residual_source).__name__} norms its input in another way")
    return "rms", factor, torch.zeros_like(factor), epsilon


def _epsilon(norm: nn.Module) -> float:
    return float(next((getattr(norm, n) for n in EPSILON_NAMES if hasattr(norm, n)), 1e-6))


def _norm_bias(norm: nn.Module, weight: Tensor) -> Tensor:
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == weight.shape:
        return bias.detach().float().cpu()
    return torch.zeros_like(weight)
