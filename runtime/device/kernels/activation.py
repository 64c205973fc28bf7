"""How an experts module computes between its two products: forms, their kernel, their reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

SlotWeights = Mapping[str, Any]
"""Parameters of all slots by name, [S, ...]: tensors, or `EncodedWeights`."""
Activation = Literal["silu", "gelu-tanh", "relu-squared", "clamped-swish"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu-tanh", "relu-squared", "clamped-swish")
SILU, GELU_TANH, RELU_SQUARED, CLAMPED_SWISH = map(tl.constexpr, range(len(ACTIVATIONS)))
"""Where they stand in `ACTIVATIONS`, for kernels."""


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """How an experts module computes; enough for every layout transformers has."""

    activation: Activation
    has_gate: bool = True
    """activation(gate) * up; without, activation(up)."""
    is_interleaved: bool = False
    """Rows of gate and up alternate, rather than all gate rows first."""
    is_transposed: bool = False
    """Weights are stored [in, out]."""
    alpha: float = 1.0
    """`clamped-swish`: gate * sigmoid(alpha * gate), times up + 1."""
    limit: float = 0.0
    """`clamped-swish`: gate is at most this, up lies within +-this."""

    @property
    def first(self) -> str:
        """Name of the first product's weight; its bias is called the same and `_bias`."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    def split(self, weights: SlotWeights) -> tuple[Any, Tensor | None, Any, Tensor | None]:
        """Weight and bias of the first product (gate and up), then of the second (down).

        Args:
            weights: By name, as the experts module has them; biases may be missing.
        """
        biases = [weights.get(f"{name}_bias") for name in (self.first, "down_proj")]
        return weights[self.first], biases[0], weights["down_proj"], biases[1]


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr):  # noqa: ANN201
    """One of `ACTIVATIONS` by its index, inside a kernel; float32 tensors of one shape."""
    if ACTIVATION == CLAMPED_SWISH:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = gate * tl.sigmoid(gate * alpha) * (up + 1)
    else:
        source = gate if HAS_GATE else up
        if ACTIVATION == SILU:
            value = source * tl.sigmoid(source)
        elif ACTIVATION == GELU_TANH:
            inner = 0.7978845608028654 * (source + 0.044715 * source * source * source)
            value = source * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh(x)) = sigmoid(2 x)
        else:
            positive = tl.maximum(source, 0.0)
            value = positive * positive
        if HAS_GATE:
            value = value * up
    return value


def activate_reference(inner: Tensor, form: ExpertForm) -> Tensor:
    """The form's activation in plain PyTorch: [.., 2 * I] (or [.., I] ungated) to [.., I]."""
    functional = torch.nn.functional
    gate = up = inner
    if form.has_gate and form.is_interleaved:
        gate, up = inner[..., ::2], inner[..., 1::2]
    elif form.has_gate:
        gate, up = inner.chunk(2, dim=-1)
    if form.activation == "clamped-swish":
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        return gate * torch.sigmoid(form.alpha * gate) * (up + 1)
    activated = {
        "silu": functional.silu,
        "gelu-tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu-squared": lambda x: functional.relu(x).square(),
    }[form.activation](gate)
    return activated * up if form.has_gate else activated
