"""How many cache slots each layer of an engine gets, and what fills them before the first token."""

from __future__ import annotations

from pathlib import Path

import torch

from foreroute.data.routes import ReadOptions, Route, read_route
from foreroute.estimators.host_memory import available_host_bytes
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.policies import equal_slots, find_policy, slots_by_misses
from foreroute.runtime.policies.slots import auto_slots, cache_values, parse_slots
from foreroute.runtime.store.offload import OffloadedModel

MOST_TOKENS = 1024
"""Most tokens of a recording, its first, that misses are counted in to share slots."""


def plan_slots(
    offloaded: OffloadedModel, config: EngineConfig, recording: Route | None
) -> list[int]:
    """Slots per MoE layer.

    Args:
        offloaded: The model; everything but its slots is on the device already.
        config: How many, and how shared.
        recording: What `layer_slots=by-misses` counts misses in.

    Raises:
        ValueError: If they do not fit the model or the device.
    """
    geometry, layers = offloaded.moe.geometry, offloaded.moe.layers
    if config.expert_slots.strip() == "auto":
        each = fitting_slots(offloaded, config.context)
    else:
        each = parse_slots(
            config.expert_slots, num_experts=geometry.num_experts, top_k=geometry.top_k
        )
    if config.layer_slots == "equal" or recording is None:
        slots = equal_slots(len(layers), each)
    else:
        slots = slots_by_misses(
            recording.rows()[:MOST_TOKENS],
            find_policy(config.eviction),
            slots_per_layer=each,
            num_experts=geometry.num_experts,
            top_k=geometry.top_k,
        )
    return [min(count, layer.num_experts) for count, layer in zip(slots, layers, strict=True)]


def fitting_slots(offloaded: OffloadedModel, context: int) -> int:
    """Slots per layer that the memory that is free now can hold: `expert_slots=auto`.

    Args:
        offloaded: The model.
        context: Tokens whose keys and values shall fit beside them.

    Raises:
        ValueError: If not even one token's experts fit.
    """
    geometry = offloaded.moe.geometry
    free = _free_bytes(offloaded.device)
    if free is None:
        return geometry.num_experts
    model = offloaded.moe.model
    text = model.config.get_text_config()
    kept = context * cache_values(text, text.num_hidden_layers) * model.dtype.itemsize
    return auto_slots(
        free - kept,
        expert_bytes=offloaded.expert_bytes,
        num_layers=geometry.num_layers,
        num_experts=geometry.num_experts,
        top_k=geometry.top_k,
    )


def _free_bytes(device: torch.device) -> int | None:
    """Memory of the device that can still be taken; None where the system does not say."""
    if device.type != "cuda":
        return available_host_bytes()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def read_recording(offloaded: OffloadedModel, config: EngineConfig) -> Route | None:
    """The recorded routing that `warm_start` names, if it names one.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it cannot be read, or is of another model.
    """
    if config.warm_start in ("none", "prompt"):
        return None
    geometry = offloaded.moe.geometry
    route = read_route(Path(config.warm_start), ReadOptions(num_experts=geometry.num_experts))
    if (route.num_layers, route.num_experts) != (geometry.num_layers, geometry.num_experts):
        raise ValueError(
            f"warm_start {route.describe()} does not fit this model: {geometry.describe()}."
        )
    return route
