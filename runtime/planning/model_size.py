"""How large a model's parts are, from its configuration alone: no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from foreroute.data.adapters import discover
from foreroute.data.adapters.loading import HubSettings
from foreroute.data.adapters.seam import is_experts_module
from foreroute.data.adapters.weightless import outline
from foreroute.runtime.parallel import SliceRanks, cut, narrowed
from foreroute.runtime.policies.slots import cache_values
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.encodings import EXPERT_DTYPES, Encoder, encoder_named
from foreroute.runtime.store.host_store import RowLayout


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Counts of parameters and of the MoE shape."""

    name: str
    """What the user called the model."""
    revision: str | None = None
    """Branch, tag or commit of it, if one was asked for."""
    num_layers: int
    """L, MoE layers."""
    num_experts: int
    """E, experts per MoE layer."""
    top_k: int
    """K, experts per token."""
    expert_params: int
    """Parameters of one expert."""
    expert_bytes: Mapping[str, int]
    """One expert as copied, by what `--expert-dtype` can be: what it is on a GPU unless said
    (`auto`), then the other ones that are no larger than the checkpoint's."""
    other_params: int
    """Parameters of everything but the experts; they stay on the device."""
    layer_params: int
    """Those of them that a token reads in one decoder layer."""
    output_head_params: int
    """Those of them that a token reads once: the output head."""
    cache_values: int
    """Keys and values kept per token of context, in all layers."""
    dtype_bytes: int
    """Per value, as the checkpoint has it."""
    num_gpus: int = 1
    """GPUs with a slice of every expert each; `expert_bytes` are of one slice."""

    def bytes_as(self, expert_dtype: str) -> int:
        """One expert as copied, stored that way.

        Raises:
            ValueError: If that makes this model's experts no smaller; lists what does.
        """
        if expert_dtype not in self.expert_bytes:
            known = ", ".join(self.expert_bytes)
            raise ValueError(
                f"Experts of {self.name} are not counted as {expert_dtype!r}; known: {known}."
            )
        return self.expert_bytes[expert_dtype]


def measure_model(name: str, num_gpus: int = 1, **hub: Unpack[HubSettings]) -> ModelSize:
    """Build a model without memory and count.

    Args:
        name: `bundled`, a folder, a config.json, or a Hub id.
        num_gpus: GPUs that share it, each with a slice of every expert.
        **hub: Where its files come from; see `HubSettings`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot be read, has no experts that can be taken over, or none that so
            many GPUs can share.
    """
    checkpoint = Checkpoint.open(model_folder(name), device=torch.device("cuda"), **hub)
    config = checkpoint.config
    dtype = config.dtype or config.get_text_config().dtype or torch.bfloat16
    model = outline(config, dtype, trust_remote_code=hub.get("trust_remote_code", False))
    text = config.get_text_config()
    experts = [module for module in model.modules() if is_experts_module(module)]
    stacked = [m for m in experts if any(p.ndim >= 2 for p in m.parameters(recurse=False))]
    if not stacked:
        discover(model, name)  # says why there are none
    rows = [list(module.parameters(recurse=False)) for module in stacked]
    num_experts = max(p.shape[0] for p in rows[0])
    expert_params = max(sum(p.numel() for p in row) // num_experts for row in rows)
    if not expert_params:
        raise ValueError(f"{name} ({config.model_type}) cannot be planned for: experts of size 0.")
    in_experts = sum(p.numel() for row in rows for p in row)
    other = sum(p.numel() for p in model.parameters()) - in_experts
    embedding = _params(model.get_input_embeddings())
    head = model.get_output_embeddings()
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    output_head_params = _params(head) or embedding
    outside = embedding + (0 if is_tied else _params(head))
    layers = int(getattr(text, "num_hidden_layers", len(stacked)))
    return ModelSize(
        name=model_folder(name),
        revision=hub.get("revision"),
        num_layers=len(stacked),
        num_experts=num_experts,
        top_k=_top_k(text),
        expert_params=expert_params,
        expert_bytes=_expert_bytes(stacked, checkpoint, SliceRanks(0, num_gpus)),
        other_params=other,
        layer_params=max(0, other - outside) // layers,
        output_head_params=output_head_params,
        cache_values=cache_values(text, layers),
        dtype_bytes=_dtype_bytes(config),
        num_gpus=num_gpus,
    )


def _expert_bytes(
    modules: Sequence[nn.Module], checkpoint: Checkpoint, ranks: SliceRanks
) -> dict[str, int]:
    """Bytes of one expert, or of a process' slice of it, by expert dtype; the largest layer's."""
    is_stored = checkpoint.prepared is not None
    sizes = {"auto": _row_bytes(modules, checkpoint.encoder, ranks, is_stored=is_stored)}
    if checkpoint.quantization is not None or is_stored:
        return sizes  # it keeps its own way
    plain = _row_bytes(modules, None, ranks)
    for name in EXPERT_DTYPES:
        try:
            size = _row_bytes(modules, encoder_named(name), ranks)
        except ValueError:  # it has no form for matrices, or slices, of this shape
            continue
        if size <= plain:
            sizes[name] = size
    return sizes


def _row_bytes(
    modules: Sequence[nn.Module],
    encoder: Encoder | None,
    ranks: SliceRanks,
    *,
    is_stored: bool = False,
) -> int:
    with narrowed(cut(modules, ranks, encoder, is_stored=is_stored)):
        return max(RowLayout.of(module, encoder).row_bytes for module in modules)


def model_folder(name: str) -> str:
    """What a user calls a model, where a config.json stands for its folder."""
    path = Path(name).expanduser()
    return str(path.parent) if path.is_file() and path.name == "config.json" else name


def _params(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def _top_k(text: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"The configuration of {text.model_type} does not say how many experts a token uses."
    )


def _dtype_bytes(config: Any) -> int:
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2
