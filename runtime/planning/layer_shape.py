"""The layer that `foreroute profile` times: its shape, and its products in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BYTES = torch.bfloat16.itemsize
EPS = 1e-6
"""Epsilon of norms."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one MoE layer, all weights bf16."""

    hidden: int
    """D."""
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of an expert."""
    experts: int
    """E."""
    top_k: int
    """K."""
    slots: int
    """S, a multiple of K."""
    context: int
    """Keys that attention reads."""

    @property
    def attention(self) -> list[tuple[int, int]]:
        """Weights of attention's products as (rows, columns): query, key, value, output."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        into = [(rows, self.hidden) for rows in (query, key, key)]
        return [*into, (self.hidden, query)]

    @property
    def expert(self) -> list[tuple[int, int]]:
        """An expert's weights as (rows, columns): gate and up, then down."""
        return [(2 * self.inner, self.hidden), (self.hidden, self.inner)]

    @property
    def expert_bytes(self) -> int:
        """Size of one expert."""
        return BYTES * sum(rows * columns for rows, columns in self.expert)

    @property
    def layer_bytes(self) -> int:
        """Weights that one token reads."""
        shapes = [*self.attention, (self.experts, self.hidden), *self.expert * self.top_k]
        return BYTES * sum(rows * columns for rows, columns in shapes)


REFERENCE = LayerShape(
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    inner=768,
    experts=128,
    top_k=8,
    slots=32,
    context=512,
)
"""One layer of Qwen3-30B-A3B, a quarter of its experts resident."""


def random_weights(*size: int, device: torch.device) -> Tensor:
    """Normal noise, bf16."""
    return torch.randn(*size, device=device).to(torch.bfloat16)


class PlainLayer:
    """The matrix products of one decode step of one layer; small kernels between are left out."""

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        """Make the weights up."""
        shapes = [*shape.attention, (shape.experts, shape.hidden), *shape.expert * shape.top_k]
        self._weights = [random_weights(*size, device=device) for size in shapes]
        widths = {columns for _, columns in shapes}
        self._inputs = {width: random_weights(1, width, device=device) for width in widths}

    def run(self) -> None:
        """All products, one after the other."""
        for weight in self._weights:
            torch.nn.functional.linear(self._inputs[weight.shape[1]], weight)
