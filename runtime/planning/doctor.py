"""Says what foreroute can do with a model, from its config alone."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from foreroute.data.adapters import MoELayer, MoEModel
from foreroute.data.adapters.discovery import discover_outline, layer_index
from foreroute.data.adapters.exceptions import is_hash_routed, why_not_captured
from foreroute.estimators.forms import FREE_FORMS
from foreroute.runtime.device.expert_form import why_no_form
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.host_store import RowLayout

YES = "yes"
FREE_FORMS_ONLY = f"only estimators without an anchor ({', '.join(FREE_FORMS)}) can be trained"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found in a model without weights."""

    name: str
    """What the user calls it."""
    model_type: str
    num_layers: int
    """Decoder layers."""
    moe_layers: tuple[int, ...]
    """Decoder layer index of each MoE layer."""
    num_experts: int
    top_k: int
    dtype: str = ""
    """Dtype of the parameters, or how a low-bit checkpoint stores its experts."""
    hash_routed: tuple[int, ...]
    """Decoder layer index of each layer whose experts follow from the token alone."""
    expert_bytes: int
    """Size of one expert, in that dtype."""
    all_experts_bytes: int
    """What the host holds."""
    other_bytes: int
    """Everything but the experts: what the device holds besides the slots."""
    router: str
    """Class of the router, and how gate weights follow from its logits."""
    norm: str
    """Class of the norm that feeds it."""
    recording: str
    """`yes`, or why not; so are the next three."""
    exact: str
    speculative: str
    graph: str
    joined: str = ""
    """Parts of the model that the graph's launches join; empty without a graph, as is the next."""
    left: str = ""
    """Parts that stay as the model has them, each with the reason."""

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Decoder layers without experts."""
        return tuple(i for i in range(self.num_layers) if i not in self.moe_layers)


def diagnose(
    name: str, *, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> Diagnosis:
    """Build a model without weights and find its MoE layers.

    Args:
        name: `bundled`, a folder with at least a config.json, or a Hub id.
        dtype: In which sizes are given; `auto` is the config's.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that came with the checkpoint.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If its config cannot be read, or it is no MoE that is supported.
    """
    checkpoint = Checkpoint.open(
        name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if checkpoint.asked_dtype is None:  # only the files say it, and they may not be here
        # what is quantised keeps the rest in bfloat16 (gpt-oss, whose config is silent)
        usual = torch.float32 if checkpoint.quantization is None else torch.bfloat16
        checkpoint = replace(checkpoint, asked_dtype=usual)
    experts = checkpoint.experts
    sizes = _sizes(checkpoint.outline, experts)
    sizes["graph"] = _graph(checkpoint.outline, experts.values())  # before layers are dropped
    moe = discover_outline(checkpoint.outline, name)
    if sizes["graph"] == YES:
        sizes |= _fusions(checkpoint.outline, moe)
    found = _diagnosis(name, moe, sizes)
    dtype_name = str(checkpoint.dtype).removeprefix("torch.")
    method = (checkpoint.quantization or {}).get("quant_method")
    if checkpoint.encoder is None:
        return replace(found, dtype=dtype_name + (f", decoded from {method}" if method else ""))
    return replace(
        found,
        dtype=str(method or checkpoint.expert_dtype),
        expert_bytes=RowLayout.of(next(iter(experts.values())), checkpoint.encoder).row_bytes,
        all_experts_bytes=checkpoint.stored_bytes,
    )


def report(found: Diagnosis, packed: str = "") -> Table:
    """The diagnosis as a table.

    Args:
        found: The diagnosis.
        packed: What `packed_share` says of the weights.
    """
    table = Table(title=found.name, box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    gib = 2**30
    rows = {
        "model type": found.model_type,
        "layers": f"{found.num_layers}: {len(found.moe_layers)} MoE ({_ranges(found.moe_layers)}), "
        f"{len(found.dense_layers)} without experts ({_ranges(found.dense_layers) or '-'})",
        "experts": f"{found.num_experts} a layer, top-{found.top_k}",
        "one expert": f"{found.expert_bytes / 1e6:.2f} MB in {found.dtype}",
        "all experts": f"{found.all_experts_bytes / gib:.2f} GiB in host memory",
        "everything else": f"{found.other_bytes / gib:.2f} GiB on the device",
        "router": found.router
        + (f"; layers {_ranges(found.hash_routed)} by token" if found.hash_routed else ""),
        "norm": found.norm,
        "recording": found.recording,
        "exact": found.exact,
        "speculative": found.speculative,
        "CUDA graph": found.graph,
    }
    if found.joined:
        rows |= {"joined there": found.joined, "left apart": found.left}
    if packed:
        rows["in 12 bits"] = packed
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ranges(numbers: tuple[int, ...]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def _sizes(model: Any, experts: dict[str, nn.Module]) -> dict[str, Any]:
    of_experts = sum(p.nbytes for m in experts.values() for p in m.parameters())
    first = next(iter(experts.values()))
    num_experts = int(first.num_experts)  # type: ignore[arg-type]
    layers = [layer_index(path) for path in experts]
    return {
        "model_type": str(model.config.get_text_config().model_type),
        "num_layers": int(model.config.get_text_config().num_hidden_layers),
        "moe_layers": tuple(dict.fromkeys(layers)),
        "num_experts": num_experts,
        "expert_bytes": sum(p.nbytes for p in first.parameters()) // num_experts,
        "all_experts_bytes": of_experts,
        "other_bytes": sum(p.nbytes for p in model.parameters()) - of_experts,
        "hash_routed": tuple(
            layer
            for layer, path in zip(layers, experts, strict=True)
            if is_hash_routed(model.get_submodule(path.rpartition(".")[0]))
        ),
    }


def _diagnosis(name: str, moe: MoEModel, sizes: dict[str, Any]) -> Diagnosis:
    geometry, last = moe.geometry, moe.layers[-1]
    rule: str = geometry.gate_family
    if rule != "other" and not math.isclose(geometry.gate_scale, 1.0):
        rule += f" x {geometry.gate_scale:g}"
    router = last.router if last.norm else last.residual_source
    problem = moe.anchors_problem or (
        "how gate weights follow from logits is not known"
        if geometry.gate_family == "other"
        else ""
    )
    return Diagnosis(
        name=name,
        top_k=geometry.top_k,
        router=f"{type(router).__name__}, {rule}",
        norm=_norm(last),
        recording=YES
        if not moe.anchors_problem
        else f"{YES}; {FREE_FORMS_ONLY}: {moe.anchors_problem}",
        exact=YES,
        speculative=f"skip only: {problem}" if problem else YES,
        **sizes,
    )


def _norm(layer: MoELayer) -> str:
    if layer.norm is not None:
        return type(layer.norm).__name__
    if layer.residual_source is not layer.router:
        return f"inside {type(layer.residual_source).__name__}"
    return "none: the router reads the residual"


def _graph(model: Any, all_experts: Iterable[nn.Module]) -> str:
    reason = why_no_form(all_experts) or why_not_captured(model)
    return f"no: {reason}" if reason else YES


def _fusions(model: Any, moe: MoEModel) -> dict[str, str]:
    """What the graph joins and leaves, of one layer of each kind with made-up numbers."""
    if importlib.util.find_spec("triton") is None:
        return {"joined": "not known here: triton is not installed"}
    from foreroute.runtime.device.fusions import survey

    parts = survey(model, [layer.router for layer in moe.layers])
    return {"joined": parts.joined_text, "left": parts.left_text}
