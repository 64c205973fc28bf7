"""The experts' gated MLP for a few tokens, straight from the slots: two launches, no gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu-tanh", "relu-squared", "clamped-swish"]
_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu-tanh", "relu-squared", "clamped-swish")
# Fastest of those tried on an H100 at Qwen3-30B-A3B's shape: few rows, each read all at once.
UP_ROWS, UP_COLUMNS, UP_WARPS = 1, 2048, 2
DOWN_ROWS, DOWN_COLUMNS, DOWN_WARPS = 2, 1024, 4


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


@triton.jit
def _activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr):
    if ACTIVATION == 3:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = gate * tl.sigmoid(gate * alpha) * (up + 1)
    else:
        source = gate if HAS_GATE else up
        if ACTIVATION == 0:
            value = source * tl.sigmoid(source)
        elif ACTIVATION == 1:
            inner = 0.7978845608028654 * (source + 0.044715 * source * source * source)
            value = source * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh(x)) = sigmoid(2 x)
        else:
            positive = tl.maximum(source, 0.0)
            value = positive * positive
        if HAS_GATE:
            value = value * up
    return value


@triton.jit
def _up_kernel(
    hidden,
    weight,
    bias,
    expert_ids,
    slot_of,
    inner,
    width,
    depth,
    top_k,
    slot_stride,
    row_stride,
    column_stride,
    up_offset,
    bias_slot_stride,
    bias_row_stride,
    bias_up_offset,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(1)
    slot = tl.load(slot_of + tl.load(expert_ids + pair)).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < width
    base = weight + slot * slot_stride + rows[:, None] * row_stride
    gate = tl.zeros([ROWS], dtype=tl.float32)
    up = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, depth, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < depth
        mask = is_row[:, None] & is_column[None, :]
        state = tl.load(hidden + (pair // top_k) * depth + columns, mask=is_column, other=0.0)
        state = state.to(tl.float32)[None, :]
        where = base + columns[None, :] * column_stride
        if HAS_GATE:
            gate += tl.sum(tl.load(where, mask=mask, other=0.0).to(tl.float32) * state, 1)
        up += tl.sum(tl.load(where + up_offset, mask=mask, other=0.0).to(tl.float32) * state, 1)
    if HAS_BIAS:
        where_bias = bias + slot * bias_slot_stride + rows * bias_row_stride
        if HAS_GATE:
            gate += tl.load(where_bias, mask=is_row, other=0.0).to(tl.float32)
        up += tl.load(where_bias + bias_up_offset, mask=is_row, other=0.0).to(tl.float32)
    value = _activate(gate, up, alpha, limit, ACTIVATION, HAS_GATE)
    tl.store(inner + pair * width + rows, value, mask=is_row)


@triton.jit
def _down_kernel(
    inner,
    gate_weights,
    weight,
    bias,
    expert_ids,
    slot_of,
    output,
    width,
    depth,
    slot_stride,
    row_stride,
    column_stride,
    bias_slot_stride,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < depth
    total = tl.zeros([ROWS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        slot = tl.load(slot_of + tl.load(expert_ids + pair)).to(tl.int64)
        base = weight + slot * slot_stride + rows[:, None] * row_stride
        value = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            is_column = columns < width
            mask = is_row[:, None] & is_column[None, :]
            state = tl.load(inner + pair * width + columns, mask=is_column, other=0.0)[None, :]
            weights = tl.load(base + columns[None, :] * column_stride, mask=mask, other=0.0)
            value += tl.sum(weights.to(tl.float32) * state, 1)
        if HAS_BIAS:
            where_bias = bias + slot * bias_slot_stride + rows
            value += tl.load(where_bias, mask=is_row, other=0.0).to(tl.float32)
        total += tl.load(gate_weights + pair).to(tl.float32) * value
    tl.store(output + token * depth + rows, total.to(output.dtype.element_ty), mask=is_row)


def expert_products(
    hidden: Tensor,
    expert_ids: Tensor,
    gate_weights: Tensor,
    slot_of: Tensor,
    weights: dict[str, Tensor],
    form: ExpertForm,
    inner: Tensor,
    output: Tensor,
) -> None:
    """Compute experts that are resident; deterministic, sums in float32 in a fixed order.

    Args:
        hidden: Router input, [T, D], contiguous; T is small (each token reads its experts anew).
        expert_ids: [T, K], any integer dtype.
        gate_weights: [T, K], float.
        slot_of: [E] int32, all asked experts resident.
        weights: The slots' parameters by name as the experts module has them, [S, ...].
        form: How the module computes.
        inner: Scratch, [T * K, I] float32.
        output: Written, [T, D].
    """
    num_tokens, depth = hidden.shape
    top_k, width = expert_ids.shape[-1], inner.shape[-1]
    first = weights["gate_up_proj" if form.has_gate else "up_proj"]
    first_bias = weights.get("gate_up_proj_bias" if form.has_gate else "up_proj_bias")
    row, column = (2, 1) if form.is_transposed else (1, 2)
    step = 2 if form.is_interleaved else 1
    row_stride = first.stride(row)
    apart = (1 if form.is_interleaved else width) if form.has_gate else 0
    _up_kernel[(triton.cdiv(width, UP_ROWS), num_tokens * top_k)](
        hidden,
        first,
        first if first_bias is None else first_bias,
        expert_ids,
        slot_of,
        inner,
        width,
        depth,
        top_k,
        first.stride(0),
        row_stride * step,
        first.stride(column),
        row_stride * apart,
        0 if first_bias is None else first_bias.stride(0),
        step,
        apart,
        form.alpha,
        form.limit,
        ACTIVATION=_ACTIVATIONS.index(form.activation),
        HAS_GATE=form.has_gate,
        HAS_BIAS=first_bias is not None,
        ROWS=UP_ROWS,
        COLUMNS=min(UP_COLUMNS, triton.next_power_of_2(depth)),
        num_warps=UP_WARPS,
    )
    second, second_bias = weights["down_proj"], weights.get("down_proj_bias")
    _down_kernel[(triton.cdiv(depth, DOWN_ROWS), num_tokens)](
        inner,
        gate_weights,
        second,
        second if second_bias is None else second_bias,
        expert_ids,
        slot_of,
        output,
        width,
        depth,
        second.stride(0),
        second.stride(row),
        second.stride(column),
        0 if second_bias is None else second_bias.stride(0),
        TOP_K=top_k,
        HAS_BIAS=second_bias is not None,
        ROWS=DOWN_ROWS,
        COLUMNS=min(DOWN_COLUMNS, triton.next_power_of_2(width)),
        num_warps=DOWN_WARPS,
    )


def expert_products_reference(
    hidden: Tensor,
    expert_ids: Tensor,
    gate_weights: Tensor,
    slot_of: Tensor,
    weights: dict[str, Tensor],
    form: ExpertForm,
) -> Tensor:
    """What `expert_products` computes, in plain PyTorch and float32; returns [T, D]."""
    slots = slot_of[expert_ids.long()].long()  # [T, K]
    first = weights["gate_up_proj" if form.has_gate else "up_proj"][slots].float()
    second = weights["down_proj"][slots].float()
    if form.is_transposed:
        first, second = first.transpose(-1, -2), second.transpose(-1, -2)
    inner = torch.einsum("tkio,to->tki", first, hidden.float())
    first_bias = weights.get("gate_up_proj_bias" if form.has_gate else "up_proj_bias")
    if first_bias is not None:
        inner = inner + first_bias[slots].float()
    inner = activate_reference(inner, form)
    outputs = torch.einsum("tkoi,tki->tko", second, inner)
    if "down_proj_bias" in weights:
        outputs = outputs + weights["down_proj_bias"][slots].float()
    return (outputs * gate_weights.float().unsqueeze(-1)).sum(1)


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
