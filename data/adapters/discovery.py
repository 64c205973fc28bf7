"""Finds the MoE layers of any transformers model by watching one tiny forward pass.

No table of architectures: the experts modules mark themselves, the router is the module whose
output holds the ids the experts get, the norm is the module whose output the router reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foreroute.data.adapters.anchors import build_anchors, router_fingerprint
from foreroute.data.adapters.exceptions import WITHOUT_INTERFACE, back_projection, is_hash_routed
from foreroute.data.adapters.gates import find_gate_rule
from foreroute.data.adapters.made_up import keep_one_layer_of_each_kind, make_up_numbers
from foreroute.data.adapters.probe import Observed, is_same_memory, probe
from foreroute.data.adapters.weightless import experts_by_path
from foreroute.estimators.forms import FREE_FORMS
from foreroute.estimators.types import GateFamily, LayerAnchors, MoEGeometry


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """Handles on one MoE layer of a loaded model."""

    layer_idx: int
    """Decoder layer index, as the model counts."""
    name: str
    """Dotted path of the experts module."""
    experts: nn.Module
    """Holds the expert weights; its forward goes through the seam."""
    block: nn.Module
    """Parent of the experts module."""
    router: nn.Module
    """Gives router logits over the experts; its first argument is the router input."""
    norm: nn.Module | None
    """Its output is the router input, its input the residual; None where the router reads the
    residual itself, or norms it inside."""
    residual_source: nn.Module
    """Its first argument is the residual: the norm, or else the router or the module around it."""
    num_experts: int
    """E of this layer."""
    top_k: int
    """K of this layer."""
    is_hash_routed: bool
    """Whether the ids follow from the token alone."""
    is_input_apart: bool
    """Whether the experts read another tensor than the router (a projection, another norm)."""
    to_hidden: nn.Module | None
    """Maps what the experts put out back to the hidden size, where they work in a latent one."""


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """A loaded model together with what was found in it."""

    model: Any
    """The transformers model, in eval mode."""
    geometry: MoEGeometry
    """Shape of its routing."""
    layers: tuple[MoELayer, ...]
    """Its MoE layers, in order."""
    found_anchors: LayerAnchors | None
    """Copies of its routers and the norms that feed them, float32 on the CPU, if they can be."""
    anchors_problem: str
    """Why there are no anchors; empty if there are."""
    others: tuple[tuple[str, nn.Module], ...] = ()
    """Experts that no text reaches, by dotted path: those of images, beside a layer's own (those of
    ernie4_5_vl_moe)."""

    @property
    def anchors(self) -> LayerAnchors:
        """Copies of its routers and the norms that feed them, float32 on the CPU.

        Raises:
            ValueError: If its routers have another form; one line says which.
        """
        if self.found_anchors is None:
            raise ValueError(
                f"Training-free prediction is not available for {self.geometry.model_name} "
                f"({self.geometry.model_type}): {self.anchors_problem}. Use prefetch=none, or "
                f"the bundle of a form without an anchor ({', '.join(FREE_FORMS)})."
            )
        return self.found_anchors


def discover(model: Any, model_name: str = "") -> MoEModel:
    """Find the MoE layers of a loaded causal LM, its routing's shape and its routers' anchors.

    Args:
        model: Transformers model; its experts may be without weights.
        model_name: What the user calls it, for messages.

    Raises:
        ValueError: If it is no MoE, or one whose parts cannot be found; says what is missing.
    """
    name = _name_of(model, model_name)
    layers, seen, others = _find(model, name)
    family, scale = find_gate_rule(seen)
    anchors, problem = _anchors(seen, [layer.block for layer in layers], family)
    geometry = MoEGeometry(
        model_type=str(model.config.get_text_config().model_type),
        layer_indices=tuple(layer.layer_idx for layer in layers),
        num_experts=max(layer.num_experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        hidden_size=seen[0].router_input.shape[-1],
        router_fingerprint=router_fingerprint(seen),
        gate_family=family,
        gate_scale=scale,
        model_name=name,
    )
    return MoEModel(
        model=model,
        geometry=geometry,
        layers=layers,
        found_anchors=anchors,
        anchors_problem=problem,
        others=others,
    )


def find_moe_layers(model: Any, model_name: str = "") -> tuple[MoELayer, ...]:
    """The MoE layers of a loaded causal LM, by structure: what one forward pass shows.

    Args:
        model: Transformers model; its experts may be without weights.
        model_name: What the user calls it, for messages.

    Raises:
        ValueError: If it is no MoE, or one whose parts cannot be found; says what is missing.
    """
    return _find(model, _name_of(model, model_name))[0]


def discover_outline(model: Any, model_name: str = "") -> MoEModel:
    """Find one MoE layer of each kind in a model on the meta device, by made-up numbers.

    Args:
        model: As `outline` builds it; its later layers are dropped, and all tensors but the experts
            get random numbers, so neither the fingerprint nor the anchors mean anything.
        model_name: What the user calls it, for messages.

    Raises:
        ValueError: As `discover`.
    """
    all_experts = experts_by_path(model)
    if all_experts:
        path = next(iter(all_experts)).split(".")
        up_to_layers = path[: next(i for i, part in enumerate(path) if part.isdigit())]
        keep_one_layer_of_each_kind(model.get_submodule(".".join(up_to_layers)))
        make_up_numbers(model, but_not=all_experts.values())
    try:
        return discover(model, model_name)
    except ValueError:
        raise
    except Exception as error:  # whatever values that cannot be end in
        raise ValueError(
            f"{model_name} ({model.config.model_type}) cannot be followed without its weights: its "
            f"forward pass fails on made-up numbers ({error}). Load it with Engine.from_pretrained."
        ) from error


def _name_of(model: Any, given: str) -> str:
    return given or str(getattr(model.config, "name_or_path", "")) or type(model).__name__


def _find(
    model: Any, name: str
) -> tuple[tuple[MoELayer, ...], list[Observed], tuple[tuple[str, nn.Module], ...]]:
    """The MoE layers, what a pass over text showed of each, and experts that it did not reach."""
    found = experts_by_path(model)
    if not found:
        raise ValueError(_nothing_found(model, name))
    observed = probe(model, list(found.values()))
    reached = {path: experts for path, experts in found.items() if experts in observed}
    others = tuple((path, experts) for path, experts in found.items() if path not in reached)
    for path, _ in others:
        if layer_index(path) not in map(layer_index, reached):
            raise ValueError(f"{name}: the experts at {path} take no part in a forward pass.")
    layers = tuple(
        _layer(model, path, observed[experts], name) for path, experts in reached.items()
    )
    return layers, [observed[experts] for experts in reached.values()], others


def layer_index(path: str) -> int:
    """Decoder layer index in the dotted path of a module of a decoder layer."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def _layer(model: Any, path: str, seen: Observed, name: str) -> MoELayer:
    if seen.router is None:
        raise ValueError(
            f"{name} ({model.config.model_type}) is not supported: at {path} the router that feeds "
            "the experts could not be found."
        )
    block = model.get_submodule(path.rpartition(".")[0])
    hidden_size = seen.router_input.shape[-1]
    return MoELayer(
        layer_idx=layer_index(path),
        name=path,
        experts=seen.experts,
        block=block,
        router=seen.router,
        norm=seen.norm,
        residual_source=seen.residual_source or seen.router,
        num_experts=seen.num_experts,
        top_k=seen.expert_ids.shape[-1],
        is_hash_routed=is_hash_routed(seen.router),
        is_input_apart=not is_same_memory(seen.experts_input, seen.router_input),
        to_hidden=back_projection(block, seen.experts_input.shape[-1], hidden_size),
    )


def _anchors(
    layers: Sequence[Observed], blocks: Sequence[nn.Module], family: GateFamily
) -> tuple[LayerAnchors | None, str]:
    """The anchors, or why there are none."""
    try:
        with torch.no_grad():
            return build_anchors(layers, blocks, family), ""
    except ValueError as error:
        return None, str(error)


def _nothing_found(model: Any, name: str) -> str:
    kind = str(model.config.get_text_config().model_type)
    reason = WITHOUT_INTERFACE.get(kind)
    hints = ("expert", "moe", "router")
    if reason is None and any(
        h in type(m).__name__.lower() for m in model.modules() for h in hints
    ):
        reason = "its experts would have to be marked with @use_experts_implementation"
    if reason is None:
        return f"{name} ({kind}) is not a Mixture-of-Experts model: it has no experts module."
    return (
        f"{name} ({kind}) is an MoE whose experts do not go through transformers' experts "
        f"interface, so it is not supported: {reason}."
    )
