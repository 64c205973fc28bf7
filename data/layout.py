"""How traces lie on disk: which files, which tensors in them, how many bytes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from foreroute.estimators.types import MoEGeometry

PREFILL, DECODE = 0, 1
ANCHOR_TENSORS = ("router_weight", "router_bias", "norm_weight", "norm_bias")
SUM_TENSORS = ("expert_output_sum", "expert_count")
HEADER_BYTES = 1024
"""What a safetensors file of ours holds besides its tensors, at most."""


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
        "sequence_offsets": Stored(torch.int64, (num_sequences + 1,)),
    }


def layer_layout(geometry: MoEGeometry, states_dtype: torch.dtype, num_tokens: int) -> Layout:
    """The file of one layer's shard: the fields of `RoutingRecord`, and the expert sums."""
    states = Stored(states_dtype, (num_tokens, geometry.hidden_size))
    return {
        "residual": states,
        "router_input": states,
        "router_logits": Stored(torch.float32, (num_tokens, geometry.num_experts)),
        "expert_ids": Stored(torch.int16, (num_tokens, geometry.top_k)),
        "gate_weights": Stored(torch.float32, (num_tokens, geometry.top_k)),
        "expert_output_sum": Stored(torch.float32, (geometry.num_experts, geometry.hidden_size)),
        "expert_count": Stored(torch.int64, (geometry.num_experts,)),
    }


def anchor_shapes(geometry: MoEGeometry) -> dict[str, tuple[int, ...]]:
    """Shapes of the anchors' tensors."""
    layers, experts, hidden = geometry.num_layers, geometry.num_experts, geometry.hidden_size
    shapes = ((layers, experts, hidden), (layers, experts), (layers, hidden), (layers, hidden))
    return dict(zip(ANCHOR_TENSORS, shapes, strict=True))


def shard_bytes(
    geometry: MoEGeometry, states_dtype: torch.dtype, num_sequences: int, num_tokens: int
) -> int:
    """Bytes that a shard takes at most, all its files together."""
    tokens = token_layout(num_sequences, num_tokens)
    layer = layer_layout(geometry, states_dtype, num_tokens)
    per_layer = HEADER_BYTES + sum(stored.num_bytes for stored in layer.values())
    per_shard = HEADER_BYTES + sum(stored.num_bytes for stored in tokens.values())
    return per_shard + geometry.num_layers * per_layer
