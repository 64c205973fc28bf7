"""Loads a model so that its experts lie in host memory and everything else on the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoEModel, discover, resolve_device
from foreroute.data.adapters.loading import HubSettings, loading_alone
from foreroute.data.adapters.seam import ExpertsFunction
from foreroute.data.adapters.weightless import load_awaited_adapter
from foreroute.estimators.byte_sizes import parse_bytes
from foreroute.runtime.parallel import UNSLICED, SliceRanks
from foreroute.runtime.store.checkpoint import Checkpoint, default_expert_dtype
from foreroute.runtime.store.encodings import TooManyExceptions, encoder_named, without
from foreroute.runtime.store.from_host import FromHost
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.lent_weights import LentWeights
from foreroute.runtime.store.loading import load_with_host_experts, places_of
from foreroute.runtime.store.row_writer import move_weights
from foreroute.runtime.store.whole_model import WholeModel

logger = logging.getLogger(__name__)

TP_PLANS = ("none", "auto")
"""Whether processes with a slice of every expert divide everything else as transformers does."""


@dataclass(frozen=True)
class OffloadedModel:
    """A model without expert weights, and the store that holds them."""

    moe: MoEModel
    store: HostExpertStore
    device: torch.device
    """Where everything but the experts is."""
    expert_dtype: str = "auto"
    """How experts are stored; `auto` is as the model has them."""

    ranks: SliceRanks = UNSLICED
    """The processes that hold a slice of each expert each."""
    lent: tuple[LentWeights, ...] = ()
    """The store's weights as the model shows them."""
    others: Mapping[nn.Module, ExpertsFunction] = field(default_factory=dict)
    """What computes experts that no text reaches, from host memory."""
    is_divided: bool = False
    """Whether `ranks` divide everything else too, by transformers' plan."""

    @classmethod
    def whole(
        cls,
        moe: MoEModel,
        store: HostExpertStore,
        others: HostExpertStore,
        device: torch.device,
        expert_dtype: str,
        ranks: SliceRanks = UNSLICED,
    ) -> OffloadedModel:
        """Move the rest of a model to its device, and let it show its experts.

        Args:
            moe: The model, on the CPU, its experts without weights.
            store: Holds its layers'.
            others: Holds those that no text reaches.
            device: Where to run it.
            expert_dtype: How experts are stored.
            ranks: The processes that hold a slice of each expert each; then it shows none.
        """
        _leave_inference_mode(moe.model)
        moe.model.to(device)
        if not ranks.is_alone:
            WholeModel(moe.model, (), device, is_sliced=True)
            return cls(moe, store, device, expert_dtype, ranks)
        layers = [layer.experts for layer in moe.layers]
        beside = [experts for _, experts in moe.others]
        lent = tuple(
            LentWeights(experts, layout, rows)
            for experts, layout, rows in zip(
                [*layers, *beside],
                [*store.layouts, *others.layouts],
                [*store.rows, *others.rows],
                strict=True,
            )
        )
        from_host = zip(beside, others.layouts, others.rows, strict=True)
        functions = {experts: FromHost(layout.weights(rows)) for experts, layout, rows in from_host}
        WholeModel(moe.model, lent, device)
        load_awaited_adapter(moe.model)
        return cls(moe, store, device, expert_dtype, ranks, lent, functions)

    def take_in(self) -> None:
        """Write weights of experts that were replaced (a merge makes new ones) into the store.

        Raises:
            ValueError: If they are stored in fewer bits.
        """
        for weights in self.lent:
            weights.take_in()

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, as copied."""
        return self.store.layouts[0].row_bytes


def offload(
    model: Any,
    *,
    device: torch.device,
    model_name: str = "",
    expert_dtype: str = "auto",
    pinned_memory: str | int | None = None,
) -> OffloadedModel:
    """Take the experts out of a model that was loaded on the CPU, then move the rest.

    Args:
        model: Transformers causal LM; it can only be used through an engine afterwards.
        device: Where to run it.
        model_name: What the user calls it, for messages.
        expert_dtype: How experts are stored: `auto`, lossless, bf16, fp8, int8 or int4; see
            `default_expert_dtype`.
        pinned_memory: See `load_offloaded`.

    Raises:
        ValueError: If it is no MoE that is supported; says what is missing.
    """
    if expert_dtype == "auto":
        expert_dtype = default_expert_dtype(None, device)
    encoder_named(expert_dtype)  # refuses unknown names before anything is taken
    moe = discover(model, model_name)
    with torch.inference_mode(False):
        modules = list(places_of(moe).values())
        every = _moved(modules, expert_dtype, device, _most_pinned_bytes(pinned_memory))
        store, others = every.parted(len(moe.layers))
        return OffloadedModel.whole(moe, store, others, device, expert_dtype)


def _most_pinned_bytes(pinned_memory: str | int | None) -> int | None:
    return None if pinned_memory is None else parse_bytes(pinned_memory)


def _moved(
    experts: list[nn.Module],
    expert_dtype: str,
    device: torch.device,
    most_pinned_bytes: int | None,
) -> HostExpertStore:
    """A store with the weights of modules, each parameter encoded if it can be."""
    encoder = encoder_named(expert_dtype)
    while True:
        store = HostExpertStore(
            experts,
            is_pinned=device.type == "cuda",
            encoder=encoder,
            most_pinned_bytes=most_pinned_bytes,
        )
        try:
            move_weights(experts, store)
        except TooManyExceptions as error:
            assert encoder is not None  # it was the one that met them
            logger.warning("%s stays in bfloat16: %s", error.parameter, error)
            encoder = without(encoder, error.parameter)
        else:
            return store


def load_offloaded(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    expert_dtype: str = "auto",
    ranks: SliceRanks = UNSLICED,
    tp_plan: str = "none",
    share_experts: bool = False,
    attn_implementation: str | None = None,
    pinned_memory: str | int | None = None,
    **hub: Unpack[HubSettings],
) -> OffloadedModel:
    """Load `bundled`, a folder or a Hub id with its experts in host memory, and only there.

    Args:
        name: The model.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        expert_dtype: How experts are stored: `auto`, lossless, bf16, fp8, int8 or int4; see
            `default_expert_dtype`.
        ranks: The processes that hold a slice of each expert each.
        tp_plan: `auto`: those processes divide everything else by transformers' own plan; `none`:
            each has all of it.
        share_experts: Map a prepared model's rows: one copy for all engines of a host.
        attn_implementation: Transformers' name of the attention to run; its own choice if None.
        pinned_memory: Host memory to page-lock for experts, such as 24GiB; as much as the system
            allows if None. The host hands out experts that are not: docs/lossless.md.
        **hub: Where the files come from; see `HubSettings`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot be read, is no MoE that is supported, or does not fit in memory.
    """
    target, most_pinned_bytes = resolve_device(device), _most_pinned_bytes(pinned_memory)
    with loading_alone():
        checkpoint = Checkpoint.open(
            name, dtype=dtype, expert_dtype=expert_dtype, device=target, **hub
        )
        if tp_plan not in TP_PLANS:
            raise ValueError(f"tp_plan is {' or '.join(TP_PLANS)}, not {tp_plan!r}.")
        if tp_plan == "auto":
            checkpoint = checkpoint.divided(ranks)
        if share_experts:
            if pinned_memory is not None:
                raise ValueError("Shared rows are locked whole: leave out pinned_memory.")
            checkpoint = checkpoint.shared(ranks)
        if attn_implementation is not None:
            checkpoint.config._attn_implementation = attn_implementation
        moe, store, others = load_with_host_experts(checkpoint, target, ranks, most_pinned_bytes)
        loaded = OffloadedModel.whole(moe, store, others, target, checkpoint.expert_dtype, ranks)
        return replace(loaded, is_divided=checkpoint.num_parts > 1)


@torch.inference_mode(False)
def _leave_inference_mode(model: nn.Module) -> None:
    """Make tensors of a model that was built under inference mode ordinary ones."""
    ordinary: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if tensor not in ordinary:
                    copied = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    kept = nn.Parameter(copied, requires_grad=tensor.requires_grad)
                    ordinary[tensor] = kept if is_parameter else copied
                tensors[name] = ordinary[tensor]  # type: ignore[assignment]
