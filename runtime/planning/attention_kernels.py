"""Attention of one token on made-up weights, by the engine's own kernels; copies run beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from foreroute.runtime.device.kernels.attention import decode_attention
from foreroute.runtime.device.kernels.cache import store_token
from foreroute.runtime.device.kernels.rotary import rotate
from foreroute.runtime.planning.layer_shape import EPS, LayerShape, random_weights


class AttentionKernels:
    """One layer's attention: as many kernels as a fused decode step has."""

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        """Make weights and cache up."""
        self._shape = shape
        *self._into_heads, self._out_of_heads = (
            random_weights(*size, device=device) for size in shape.attention
        )
        self._norm = random_weights(shape.hidden, device=device)
        self._head_norm = random_weights(shape.head_dim, device=device)
        past = (2, 1, shape.kv_heads, shape.context, shape.head_dim)
        self._keys, self._values = random_weights(*past, device=device)
        self._cos, self._sin = random_weights(2, 1, 1, shape.head_dim, device=device)
        self._mask = torch.ones(1, 1, 1, shape.context, dtype=torch.bool, device=device)
        self._position = torch.tensor([shape.context - 1], device=device)

    def attend(self, state: Tensor) -> Tensor:
        """The residual after attention, [1, D], from the one before, [1, D]."""
        dim = self._shape.head_dim
        normed = rms_norm(state, self._norm.shape, self._norm, EPS)
        query, key, value = (
            linear(normed, weight).view(1, 1, -1, dim) for weight in self._into_heads
        )
        query, key = (
            rms_norm(heads, (dim,), self._head_norm, EPS).transpose(1, 2) for heads in (query, key)
        )
        query, key = rotate(query, key, self._cos, self._sin)  # [1, heads, 1, head_dim]
        store_token(key, value.transpose(1, 2), self._keys, self._values, self._position)
        output = decode_attention(query, self._keys, self._values, self._mask, scaling=dim**-0.5)
        return state + linear(output.view(1, -1), self._out_of_heads)
