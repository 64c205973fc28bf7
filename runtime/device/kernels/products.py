"""The experts' gated MLP for a few tokens, straight from the slots: two launches, no gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.activation import (
    ACTIVATIONS,
    ExpertForm,
    activate,
    activate_reference,
)
from foreroute.runtime.device.kernels.transposed import transposed_products

# Fastest of those tried on an H100 at Qwen3-30B-A3B's shape: few rows, each read all at once.
UP_ROWS, UP_COLUMNS, UP_WARPS = 1, 2048, 2
DOWN_ROWS, DOWN_COLUMNS, DOWN_WARPS = 2, 1024, 4


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
        where = base + columns[None, :]
        if HAS_GATE:
            gate += tl.sum(tl.load(where, mask=mask, other=0.0).to(tl.float32) * state, 1)
        up += tl.sum(tl.load(where + up_offset, mask=mask, other=0.0).to(tl.float32) * state, 1)
    if HAS_BIAS:
        where_bias = bias + slot * bias_slot_stride + rows * bias_row_stride
        if HAS_GATE:
            gate += tl.load(where_bias, mask=is_row, other=0.0).to(tl.float32)
        up += tl.load(where_bias + bias_up_offset, mask=is_row, other=0.0).to(tl.float32)
    value = activate(gate, up, alpha, limit, ACTIVATION, HAS_GATE)
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
            weights = tl.load(base + columns[None, :], mask=mask, other=0.0)
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
        output: Written, [T, D].
    """
    if form.is_transposed:
        transposed_products(hidden, expert_ids, gate_weights, slot_of, weights, form, output)
        return
    num_tokens, depth = hidden.shape
    first, first_bias, second, second_bias = form.split(weights)
    top_k, width = expert_ids.shape[-1], second.shape[2]
    inner = hidden.new_empty((expert_ids.numel(), width), dtype=torch.float32)
    step = 2 if form.is_interleaved else 1
    row_stride = first.stride(1)
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
        row_stride * apart,
        0 if first_bias is None else first_bias.stride(0),
        step,
        apart,
        form.alpha,
        form.limit,
        ACTIVATION=ACTIVATIONS.index(form.activation),
        HAS_GATE=form.has_gate,
        HAS_BIAS=first_bias is not None,
        ROWS=UP_ROWS,
        COLUMNS=min(UP_COLUMNS, triton.next_power_of_2(depth)),
        num_warps=UP_WARPS,
    )
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
        second.stride(1),
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
    first, first_bias, second, second_bias = form.split(weights)
    first, second = first[slots].float(), second[slots].float()
    if form.is_transposed:
        first, second = first.transpose(-1, -2), second.transpose(-1, -2)
    inner = torch.einsum("tkio,to->tki", first, hidden.float())
    if first_bias is not None:
        inner = inner + first_bias[slots].float()
    inner = activate_reference(inner, form)
    outputs = torch.einsum("tkoi,tki->tko", second, inner)
    if second_bias is not None:
        outputs = outputs + second_bias[slots].float()
    return (outputs * gate_weights.float().unsqueeze(-1)).sum(1)
