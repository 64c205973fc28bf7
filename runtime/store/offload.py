"""Loads a model so that its experts lie in host memory and everything else on the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from foreroute.data.adapters import MoEModel, discover, resolve_device
from foreroute.data.adapters.loading import HubSettings
from foreroute.runtime.store.checkpoint import Checkpoint, default_expert_dtype
from foreroute.runtime.store.encodings import TooManyExceptions, encoder_named, without
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.loading import load_with_host_experts
from foreroute.runtime.store.row_writer import move_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OffloadedModel:
    """A model without expert weights, and the store that holds them."""

    moe: MoEModel
    store: HostExpertStore
    device: torch.device
    """Where everything but the experts is."""
    expert_dtype: str = "auto"
    """How experts are stored; `auto` is as the model has them."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, as copied."""
        return self.store.layouts[0].row_bytes


def offload(
    model: Any, *, device: torch.device, model_name: str = "", expert_dtype: str = "auto"
) -> OffloadedModel:
    """Take the experts out of a model that was loaded on the CPU, then move the rest.

    Args:
        model: Transformers causal LM; it can only be used through an engine afterwards.
        device: Where to run it.
        model_name: What the user calls it, for messages.
        expert_dtype: How experts are stored: `auto`, lossless, bf16, fp8, int8 or int4; see
            `default_expert_dtype`.

    Raises:
        ValueError: If it is no MoE that is supported; says what is missing.
    """
    if expert_dtype == "auto":
        expert_dtype = default_expert_dtype(model.config, device)
    encoder = encoder_named(expert_dtype)
    moe = discover(model, model_name)
    experts = [layer.experts for layer in moe.layers]
    while True:
        store = HostExpertStore(experts, is_pinned=device.type == "cuda", encoder=encoder)
        try:
            move_weights(experts, store)
            break
        except TooManyExceptions as error:
            assert encoder is not None  # it was the one that met them
            logger.warning("%s stays in bfloat16: %s", error.parameter, error)
            encoder = without(encoder, error.parameter)
    model.to(device)
    return OffloadedModel(moe, store, device, expert_dtype)


def load_offloaded(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    expert_dtype: str = "auto",
    **hub: Unpack[HubSettings],
) -> OffloadedModel:
    """Load `bundled`, a folder or a Hub id with its experts in host memory, and only there.

    Args:
        name: The model.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        expert_dtype: How experts are stored: `auto`, lossless, bf16, fp8, int8 or int4; see
            `default_expert_dtype`.
        **hub: Where the files come from; see `HubSettings`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot be read, is no MoE that is supported, or does not fit in memory.
    """
    target = resolve_device(device)
    checkpoint = Checkpoint.open(name, dtype=dtype, expert_dtype=expert_dtype, device=target, **hub)
    moe, store = load_with_host_experts(checkpoint, target)
    moe.model.to(target)
    return OffloadedModel(moe, store, target, checkpoint.expert_dtype)
