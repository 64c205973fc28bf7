"""Sorts what people pass to `from_pretrained`: what works here, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from foreroute.data.adapters import resolve_device, resolve_dtype
from foreroute.data.adapters.loading import HubSettings
from foreroute.runtime.store.offload import OffloadedModel, offload

HUB_NAMES = tuple(HubSettings.__annotations__)
MODEL_NAMES = ("attn_implementation", "expert_dtype", "pinned_memory", "share_experts", "tp_plan")
WHEN_TAKEN_OVER = ("expert_dtype", "pinned_memory")
"""Those that can still be had of a model that is loaded."""
NO_OPS = ("low_cpu_mem_usage", "use_safetensors", "weights_only", "offload_state_dict")
"""What they ask for is how models are loaded here anyway."""
INSTEAD = {
    "policy": "give prefetch='none', 'auto' or 'all'",
    "max_memory": "expert_slots says how much of a GPU the experts take: a number, 25% or auto",
    "offload_folder": "experts lie in host memory, none on a disk",
    "offload_buffers": "experts lie in host memory, everything else on the device",
    "quantization_config": "give expert_dtype: lossless, bf16, fp8, int8 or int4",
    "load_in_8bit": "give expert_dtype='int8'",
    "load_in_4bit": "give expert_dtype='int4'",
    "experts_implementation": "the engine computes the experts itself",
    "tp_size": "torchrun says how many processes share a model; see tp_plan",
    "distributed_config": "torchrun says how many processes share a model; see tp_plan",
    "device_mesh": "torchrun says how many processes share a model; see tp_plan",
    "config": "a checkpoint is run with its own config; save a changed one beside the weights",
    "state_dict": "weights are read from safetensors files",
    "variant": "weights are read from model.safetensors; rename the variant's files",
    "gguf_file": "weights are read from safetensors files",
    "from_tf": "weights are read from safetensors files",
    "from_flax": "weights are read from safetensors files",
    "key_mapping": "save the model under the names that transformers gives its tensors",
    "ignore_mismatched_sizes": "every weight must be there, in its size",
    "generation_config": "set engine.model.generation_config, or give it to generate",
    "use_kernels": "the engine brings its own kernels",
    "output_loading_info": "a model that lacks a weight is refused",
}


@dataclass(frozen=True)
class PretrainedArguments:
    """The keyword arguments of one call, each where it belongs."""

    hub: HubSettings
    model: dict[str, Any]
    """What `load_offloaded` takes besides."""
    config: dict[str, Any]
    """Fields of the engine's configuration."""
    device: str | torch.device
    dtype: str | torch.dtype


def sort_arguments(
    settings: dict[str, Any],
    config_names: Collection[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> PretrainedArguments:
    """Tell apart what says where files are, how to load, and how to run.

    Args:
        settings: Keyword arguments of `Engine.from_pretrained`.
        config_names: Fields of an engine's configuration.
        device: Asked for, `auto` if None.
        dtype: Asked for, `auto` if None.

    Raises:
        ValueError: If one has no meaning here; says what to do instead.
    """
    left = dict(settings)
    if dtype is None or dtype == "auto":
        dtype = left.pop("torch_dtype", None) or "auto"
    left.pop("torch_dtype", None)
    device = _device(device, left.pop("device_map", None))
    if left.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False: weights are read from safetensors files only.")
    sorted_out: list[dict[str, Any]] = []
    for names in (HUB_NAMES, MODEL_NAMES, config_names):
        sorted_out.append({name: left.pop(name) for name in names if name in left})
    for name, value in left.items():
        if name not in NO_OPS and value not in (None, False):
            raise ValueError(_unknown(name, config_names))
    hub, model, config = sorted_out
    return PretrainedArguments(hub, model, config, device, dtype)  # type: ignore[arg-type]


def _unknown(name: str, config_names: Collection[str]) -> str:
    if name in INSTEAD:
        return f"{name} has no meaning here: {INSTEAD[name]}."
    known = (*config_names, *HUB_NAMES, *MODEL_NAMES, "device", "dtype", "bundle")
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}."
    return f"Unknown argument {name}{hint}"


def _device(asked: str | torch.device | None, device_map: Any) -> str | torch.device:
    """The one device that both name."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    is_given = asked is not None and asked != "auto"
    if device_map in (None, "auto"):
        return asked if is_given and asked is not None else "auto"
    if not isinstance(device_map, str | torch.device) or device_map in ("balanced", "sequential"):
        raise ValueError(
            f"device_map={device_map!r} has no meaning here: experts lie in host memory, all "
            "else on one device; give device='cuda'."
        )
    if is_given and asked is not None and torch.device(asked) != torch.device(device_map):
        raise ValueError(f"device={asked} and device_map={device_map} name different devices.")
    return device_map


def take_over(model: Any, given: PretrainedArguments) -> OffloadedModel:
    """Take the experts out of a model that is loaded already.

    Args:
        model: Transformers causal LM; it runs in one engine only from now on.
        given: How.

    Raises:
        ValueError: If an argument says how to load it, or it is no MoE that is supported.
    """
    asked = [name for name, value in given.model.items() if value not in (None, False, "none")]
    too_late = [*given.hub, *(name for name in asked if name not in WHEN_TAKEN_OVER)]
    if too_late:
        raise ValueError(f"{too_late[0]} says how to load a model; this one is loaded already.")
    if not hasattr(model, "get_experts_implementation"):
        raise ValueError(f"A {type(model).__name__} is no causal language model of transformers.")
    dtype = resolve_dtype(given.dtype)
    model = model.eval().to("cpu")
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    return offload(
        model,
        device=resolve_device(given.device),
        model_name=str(model.name_or_path),
        expert_dtype=given.model.get("expert_dtype", "auto"),
        pinned_memory=given.model.get("pinned_memory"),
    )
