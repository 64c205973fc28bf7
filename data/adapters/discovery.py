"""Finds the MoE layers of any transformers model by watching one tiny forward pass.

No table of architectures: the experts modules mark themselves, the router is the module whose
output holds the ids the experts get, the norm is the module whose output the experts get.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters.seam import is_experts_module, routed_through
from foreroute.estimators.types import GateFamily, LayerAnchors, MoEGeometry, NormKind

PROBE_TOKENS = 5
NORM_TOLERANCE = 1e-2  # bfloat16 models round to three digits


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """Handles on one MoE layer of a loaded model."""

    layer_idx: int
    """Decoder layer index, as the model counts."""
    name: str
    """Dotted path of the experts module."""
    experts: nn.Module
    """Holds the expert weights; its forward goes through the seam."""
    router: nn.Module
    """Gives router logits over the experts."""
    norm: nn.Module
    """Its output is the router input, its input the residual."""


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """A loaded model together with what was found in it."""

    model: Any
    """The transformers model, in eval mode."""
    geometry: MoEGeometry
    """Shape of its routing."""
    layers: tuple[MoELayer, ...]
    """Its MoE layers, in order."""
    anchors: LayerAnchors
    """Copies of its routers and the norms that feed them, float32 on the CPU."""


@dataclass
class _Observed:
    """What the probe saw at one experts module; held so that its memory is not used again."""

    router_input: Tensor
    expert_ids: Tensor
    gate_weights: Tensor


def router_logits_of(output: Any, num_experts: int) -> Tensor:
    """The logits in a router's output, whatever their place in its tuple.

    Args:
        output: What the router module returned.
        num_experts: E.

    Returns:
        [T, E].

    Raises:
        ValueError: If no part of the output has one number per expert.
    """
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, Tensor) and part.is_floating_point() and part.shape[-1] == num_experts:
            return part.reshape(-1, num_experts)
    raise ValueError(f"The router gives no tensor with {num_experts} logits per token.")


def discover(model: Any, model_name: str = "") -> MoEModel:
    """Find the MoE layers of a loaded causal LM.

    Args:
        model: Transformers model; its experts may be on the meta device (weights held elsewhere).
        model_name: What the user calls it, for messages.

    Raises:
        ValueError: If it is no MoE, or one whose parts cannot be found; says what is missing.
    """
    name = model_name or str(getattr(model.config, "name_or_path", "")) or type(model).__name__
    found = [(path, m) for path, m in model.named_modules() if is_experts_module(m)]
    if not found:
        raise ValueError(_nothing_found(model, name))
    observed, leaf_outputs, routers = _probe(model, [experts for _, experts in found])
    layers = []
    for path, experts in found:
        if experts not in observed:
            raise ValueError(f"{name}: the experts at {path} take no part in a forward pass.")
        seen = observed[experts]
        norm = _source_of(seen.router_input, leaf_outputs)
        router = routers.get(experts)
        missing = [what for what, part in (("router", router), ("norm", norm)) if part is None]
        if router is None or norm is None:
            raise ValueError(
                f"{name} ({model.config.model_type}) is not supported yet: at {path} the "
                f"{' and the '.join(missing)} that feed the experts could not be found."
            )
        layers.append(
            MoELayer(
                layer_idx=_layer_idx(path), name=path, experts=experts, router=router, norm=norm
            )
        )
    seen = observed[layers[0].experts]
    geometry = MoEGeometry(
        model_type=str(model.config.get_text_config().model_type),
        layer_indices=tuple(layer.layer_idx for layer in layers),
        num_experts=int(layers[0].experts.num_experts),  # type: ignore[arg-type]
        top_k=seen.expert_ids.shape[-1],
        hidden_size=seen.router_input.shape[-1],
        router_fingerprint=_fingerprint(layers),
        gate_family=_gate_family(layers[0].router, seen),
        model_name=name,
    )
    return MoEModel(
        model=model, geometry=geometry, layers=tuple(layers), anchors=_anchors(layers, name)
    )


def _nothing_found(model: Any, name: str) -> str:
    kind = model.config.model_type
    hints = ("expert", "moe", "router")
    if any(hint in type(m).__name__.lower() for m in model.modules() for hint in hints):
        return (
            f"{name} ({kind}) is an MoE whose experts do not go through transformers' experts "
            "interface (no @use_experts_implementation); it is not supported yet."
        )
    return f"{name} ({kind}) is not a Mixture-of-Experts model: it has no experts module."


def _layer_idx(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())


@contextlib.contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _probe(
    model: Any, all_experts: list[nn.Module]
) -> tuple[dict[nn.Module, _Observed], list[tuple[nn.Module, Tensor]], dict[nn.Module, nn.Module]]:
    """One forward pass over a few tokens with the experts left out (their weights are not read)."""
    observed: dict[nn.Module, _Observed] = {}
    leaf_outputs: list[tuple[nn.Module, Tensor]] = []
    outputs: list[tuple[nn.Module, Any]] = []
    routers: dict[nn.Module, nn.Module] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not list(module.children()):
            leaf_outputs.append((module, output))
        if isinstance(output, Tensor | tuple):
            outputs.append((module, output))

    def experts_left_out(
        experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        observed[experts] = _Observed(hidden, ids, weights)
        router = _router_of(ids, int(experts.num_experts), outputs)  # type: ignore[arg-type]
        if router is not None:
            routers[experts] = router
        outputs.clear()
        return torch.zeros_like(hidden)

    tokens = torch.arange(3, 3 + PROBE_TOKENS, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    with _hooks() as handles, torch.no_grad():
        handles += [module.register_forward_hook(record) for module in model.modules()]
        with routed_through(model, dict.fromkeys(all_experts, experts_left_out)):
            model(input_ids=tokens, use_cache=False)
    model.train(was_training)
    return observed, leaf_outputs, routers


def _router_of(
    expert_ids: Tensor, num_experts: int, outputs: list[tuple[nn.Module, Any]]
) -> nn.Module | None:
    """The module that returned these very ids, or else (the block routes) E logits per token."""
    for module, output in outputs[::-1]:
        parts = output if isinstance(output, tuple) else (output,)
        same = [p for p in parts if isinstance(p, Tensor) and p.data_ptr() == expert_ids.data_ptr()]
        if same and len(parts) > 1:
            return module
    for module, output in outputs[::-1]:
        if isinstance(output, Tensor) and output.shape[-1] == num_experts:
            return module
    return None


def _source_of(router_input: Tensor, outputs: list[tuple[nn.Module, Tensor]]) -> nn.Module | None:
    """The leaf module whose output is this tensor (same memory, perhaps reshaped)."""
    for module, output in reversed(outputs):
        same_memory = output.data_ptr() == router_input.data_ptr()
        if same_memory and output.numel() == router_input.numel():
            return module
    return None


def _fingerprint(layers: list[MoELayer]) -> str:
    digest = hashlib.sha256()
    for layer in layers:
        weight = _router_weight(layer).to(torch.bfloat16).cpu().contiguous()
        digest.update(weight.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _router_weight(layer: MoELayer) -> Tensor:
    num_experts = layer.experts.num_experts
    for module in (layer.router, *layer.router.children()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == num_experts:
            return weight.detach()
    raise ValueError(
        f"The router at {layer.name} has no [experts, hidden] weight; not supported yet."
    )


def _gate_family(router: nn.Module, seen: _Observed) -> GateFamily:
    """Which rule gives the gate weights the probe saw, tried by computing each."""
    with torch.no_grad():
        logits = router_logits_of(router(seen.router_input), int(_router_rows(router)))
    chosen = logits.float().softmax(-1).gather(-1, seen.expert_ids.long())  # [T, K]
    candidates: dict[GateFamily, Tensor] = {
        "softmax-topk": chosen,
        "softmax-topk-renorm": chosen / chosen.sum(-1, keepdim=True),
    }
    for family, weights in candidates.items():
        if torch.allclose(weights, seen.gate_weights.float(), atol=NORM_TOLERANCE):
            return family
    return "other"


def _router_rows(router: nn.Module) -> int:
    return next(p.shape[0] for p in router.parameters() if p.dim() == 2)


def _anchors(layers: list[MoELayer], name: str) -> LayerAnchors:
    weights = torch.stack([_router_weight(layer).float().cpu() for layer in layers])  # [L, E, D]
    biases = torch.stack([_bias_like(layer.router, weights[0, :, 0]) for layer in layers])
    kinds, norm_weights, norm_biases, epsilons = zip(
        *[_norm_parts(layer, name) for layer in layers], strict=True
    )
    if len(set(kinds)) > 1 or len(set(epsilons)) > 1:
        raise ValueError(f"{name}: norms of different kinds feed its routers; not supported yet.")
    return LayerAnchors(
        router_weight=weights,
        router_bias=biases,
        norm_weight=torch.stack(norm_weights),
        norm_bias=torch.stack(norm_biases),
        norm_kind=kinds[0],
        norm_eps=epsilons[0],
    )


def _bias_like(router: nn.Module, row: Tensor) -> Tensor:
    bias = getattr(router, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == row.shape:
        return bias.detach().float().cpu()
    return torch.zeros_like(row)


def _norm_parts(layer: MoELayer, name: str) -> tuple[NormKind, Tensor, Tensor, float]:
    """Kind, weight, bias and epsilon of a norm, verified against the module itself."""
    norm = layer.norm
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise ValueError(
            f"{name}: the norm at {layer.name} has no weight vector; not supported yet."
        )
    raw = weight.detach().float().cpu()
    bias = _bias_like(norm, raw)
    names = ("variance_epsilon", "eps", "epsilon", "norm_eps")
    epsilon = float(next((getattr(norm, n) for n in names if hasattr(norm, n)), 1e-6))
    sample = torch.randn(3, len(raw), generator=torch.Generator().manual_seed(0))  # [3, D]
    with torch.no_grad():
        expected = norm(sample.to(weight)).float().cpu()
    scale = sample * torch.rsqrt(sample.pow(2).mean(-1, keepdim=True) + epsilon)
    centred = torch.nn.functional.layer_norm(sample, raw.shape, raw, bias, epsilon)
    candidates: list[tuple[NormKind, Tensor, Tensor]] = [
        ("rms", raw, scale * raw + bias),
        ("rms", raw + 1, scale * (raw + 1) + bias),
        ("layer", raw, centred),
    ]
    for kind, factor, result in candidates:
        if torch.allclose(result, expected, atol=NORM_TOLERANCE, rtol=NORM_TOLERANCE):
            return kind, factor, bias, epsilon
    raise ValueError(
        f"{name}: {type(norm).__name__} at {layer.name} is neither an RMS norm nor a LayerNorm; "
        "not supported yet."
    )
