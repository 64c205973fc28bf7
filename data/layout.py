"""How traces lie on disk: which files, which tensors in them, how many bytes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from foreroute.estimators.types import MoEGeometry

PREFILL, DECODE = 0, 1
STATE_FIELDS = ("residual", "router_input", "layer_input", "readout")
"""Fields of `RoutingRecord` that are stored in the traces' states dtype."""
OPTIONAL_FIELDS = ("layer_input", "readout")
"""Those that are recorded only where asked for."""
SCALE_SUFFIX = "_scale"
"""A state in int8 lies beside its scales, [T] float32, under its name and this."""
ANCHOR_TENSORS = ("router_weight", "router_bias", "norm_weight", "norm_bias")
READOUT_VECTORS = "readout_vectors"
SUM_TENSORS = ("expert_output_sum", "expert_count")
HEADER_BYTES = 1024
"""What a safetensors file of ours holds besides its tensors, about."""
MOST_HEADER_BYTES = 1 << 14
"""And at most."""


class Stored(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    """As it lies on disk."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = dict[str, Stored]
"""The tensors of one file, in order."""


def tokens_path(shard_idx: int) -> str:
    """Where a shard's tokens lie below the trace folder."""
    return f"tokens/shard_{shard_idx:05d}.safetensors"


def layer_path(layer_idx: int, shard_idx: int) -> str:
    """Where a shard of a decoder layer lies below the trace folder."""
    return f"layer_{layer_idx:03d}/shard_{shard_idx:05d}.safetensors"


def token_layout(num_sequences: int, num_tokens: int) -> Layout:
    """The file of a shard's tokens: the fields of `TokenShard`."""
    return {
        "token_ids": Stored(torch.int64, (num_tokens,)),
        "phases": Stored(torch.uint8, (num_tokens,)),
        "positions": Stored(torch.int32, (num_tokens,)),
        "sequence_offsets": Stored(torch.int64, (num_sequences + 1,)),
    }


def optional_fields(
    geometry: MoEGeometry, recorded: tuple[str, ...], layer_idx: int
) -> tuple[str, ...]:
    """The optional fields that one layer has; the last has no next one to run the attention of."""
    is_last = layer_idx == geometry.layer_indices[-1]
    return tuple(name for name in recorded if not (is_last and name == "readout"))


def layer_layout(
    geometry: MoEGeometry,
    states_dtype: torch.dtype,
    num_tokens: int,
    optional: tuple[str, ...] = (),
) -> Layout:
    """The file of one layer's shard: the fields of `RoutingRecord`, and the expert sums.

    Args:
        geometry: The recorded model's.
        states_dtype: Of the states; int8 states have scales.
        num_tokens: Tokens in the shard.
        optional: Optional fields that this layer has.
    """
    states: Layout = {}
    for name in ("residual", "router_input", *optional):
        states[name] = Stored(states_dtype, (num_tokens, geometry.hidden_size))
        if states_dtype == torch.int8:
            states[name + SCALE_SUFFIX] = Stored(torch.float32, (num_tokens,))
    return states | {
        "router_logits": Stored(torch.float32, (num_tokens, geometry.num_experts)),
        "expert_ids": Stored(torch.int16, (num_tokens, geometry.top_k)),
        "gate_weights": Stored(torch.float32, (num_tokens, geometry.top_k)),
        "expert_output_sum": Stored(torch.float32, (geometry.num_experts, geometry.hidden_size)),
        "expert_count": Stored(torch.int64, (geometry.num_experts,)),
    }


def anchor_shapes(geometry: MoEGeometry, *, has_selection_bias: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the anchors' tensors."""
    layers, experts, hidden = geometry.num_layers, geometry.num_experts, geometry.hidden_size
    biases, norms = (layers, experts), (layers, hidden)
    shapes = ((layers, experts, hidden), biases, norms, norms)
    every = dict(zip(ANCHOR_TENSORS, shapes, strict=True))
    return every | {"selection_bias": biases} if has_selection_bias else every


def shard_layouts(
    geometry: MoEGeometry,
    states_dtype: torch.dtype,
    num_sequences: int,
    num_tokens: int,
    recorded: tuple[str, ...] = (),
    shard_idx: int = 0,
) -> dict[str, Layout]:
    """The files of a shard, by path below the trace folder.

    Args:
        geometry: The recorded model's.
        states_dtype: Of the states.
        num_sequences: Sequences in the shard.
        num_tokens: Tokens in the shard.
        recorded: Optional fields that are recorded.
        shard_idx: 0.. in recording order.
    """
    layouts = {tokens_path(shard_idx): token_layout(num_sequences, num_tokens)}
    for layer_idx in geometry.layer_indices:
        optional = optional_fields(geometry, recorded, layer_idx)
        layout = layer_layout(geometry, states_dtype, num_tokens, optional)
        layouts[layer_path(layer_idx, shard_idx)] = layout
    return layouts


def bytes_of(layout: Layout) -> int:
    """Bytes of a file's tensors, without its header."""
    return sum(stored.num_bytes for stored in layout.values())


def shard_bytes(
    geometry: MoEGeometry,
    states_dtype: torch.dtype,
    num_sequences: int,
    num_tokens: int,
    recorded: tuple[str, ...] = (),
) -> int:
    """Bytes that a shard takes at most, all its files together; arguments as `shard_layouts`."""
    layouts = shard_layouts(geometry, states_dtype, num_sequences, num_tokens, recorded)
    return sum(HEADER_BYTES + bytes_of(layout) for layout in layouts.values())
