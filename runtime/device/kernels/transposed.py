"""The expert products for weights stored [in, out]: read along their rows, as they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.activation import ACTIVATIONS, ExpertForm, activate

# Fastest of those tried on an H100 at gpt-oss-20b's shape.
UP_OUTPUTS, UP_DEPTH, UP_WARPS = 64, 128, 4
DOWN_OUTPUTS, DOWN_DEPTH, DOWN_WARPS = 32, 256, 8
JOIN_OUTPUTS = 512


@triton.jit
def _up_kernel(
    hidden,
    weight,
    bias,
    expert_ids,
    slot_of,
    inner,
    num_outputs,
    depth,
    top_k,
    slot_stride,
    depth_stride,
    bias_slot_stride,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    pair = tl.program_id(1)
    slot = tl.load(slot_of + tl.load(expert_ids + pair)).to(tl.int64)
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_at = at < num_outputs
    total = tl.zeros([DEPTH, OUTPUTS], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        is_row = rows < depth
        state = tl.load(hidden + (pair // top_k) * depth + rows, mask=is_row, other=0.0)
        where = weight + slot * slot_stride + rows[:, None] * depth_stride + at[None, :]
        tile = tl.load(where, mask=is_row[:, None] & is_at[None, :], other=0.0)
        total += tile.to(tl.float32) * state.to(tl.float32)[:, None]
    value = tl.sum(total, 0)
    if HAS_BIAS:
        where_bias = bias + slot * bias_slot_stride + at
        value += tl.load(where_bias, mask=is_at, other=0.0).to(tl.float32)
    tl.store(inner + pair * num_outputs + at, value, mask=is_at)


@triton.jit
def _down_kernel(
    inner,
    gate_weights,
    weight,
    bias,
    expert_ids,
    slot_of,
    partial,
    width,
    num_outputs,
    inner_stride,
    step,
    apart,
    slot_stride,
    depth_stride,
    bias_slot_stride,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    pair = tl.program_id(1)
    slot = tl.load(slot_of + tl.load(expert_ids + pair)).to(tl.int64)
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_at = at < num_outputs
    total = tl.zeros([DEPTH, OUTPUTS], dtype=tl.float32)
    for start in range(0, width, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        is_row = rows < width
        from_inner = inner + pair * inner_stride + rows * step
        gate = tl.load(from_inner, mask=is_row, other=0.0)
        up = tl.load(from_inner + apart, mask=is_row, other=0.0) if HAS_GATE else gate
        state = activate(gate, up, alpha, limit, ACTIVATION, HAS_GATE)
        where = weight + slot * slot_stride + rows[:, None] * depth_stride + at[None, :]
        tile = tl.load(where, mask=is_row[:, None] & is_at[None, :], other=0.0)
        total += tile.to(tl.float32) * state[:, None]
    value = tl.sum(total, 0)
    if HAS_BIAS:
        where_bias = bias + slot * bias_slot_stride + at
        value += tl.load(where_bias, mask=is_at, other=0.0).to(tl.float32)
    value *= tl.load(gate_weights + pair).to(tl.float32)
    tl.store(partial + pair * num_outputs + at, value, mask=is_at)


@triton.jit
def _join_kernel(partial, output, num_outputs, TOP_K: tl.constexpr, OUTPUTS: tl.constexpr):
    token = tl.program_id(1)
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_at = at < num_outputs
    total = tl.zeros([OUTPUTS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        where = partial + (token * TOP_K + k) * num_outputs + at
        total += tl.load(where, mask=is_at, other=0.0)
    place = output + token * num_outputs + at
    tl.store(place, total.to(output.dtype.element_ty), mask=is_at)


def transposed_products(
    hidden: Tensor,
    expert_ids: Tensor,
    gate_weights: Tensor,
    slot_of: Tensor,
    weights: dict[str, Tensor],
    form: ExpertForm,
    output: Tensor,
) -> None:
    """What `expert_products` does for weights [S, in, out]; three launches.

    Args:
        hidden: Router input, [T, D], contiguous.
        expert_ids: [T, K], any integer dtype.
        gate_weights: [T, K], float.
        slot_of: [E] int32, all asked experts resident.
        weights: The slots' parameters by name, [S, ...].
        form: How the module computes.
        output: Written, [T, D].
    """
    num_tokens, depth = hidden.shape
    num_pairs, top_k = expert_ids.numel(), expert_ids.shape[-1]
    first, first_bias, second, second_bias = form.split(weights)
    num_inner, width = first.shape[2], second.shape[1]
    inner = hidden.new_empty((num_pairs, num_inner), dtype=torch.float32)
    partial = hidden.new_empty((num_pairs, second.shape[2]), dtype=torch.float32)
    _up_kernel[(triton.cdiv(num_inner, UP_OUTPUTS), num_pairs)](
        hidden,
        first,
        first if first_bias is None else first_bias,
        expert_ids,
        slot_of,
        inner,
        num_inner,
        depth,
        top_k,
        first.stride(0),
        first.stride(1),
        0 if first_bias is None else first_bias.stride(0),
        HAS_BIAS=first_bias is not None,
        OUTPUTS=UP_OUTPUTS,
        DEPTH=UP_DEPTH,
        num_warps=UP_WARPS,
    )
    _down_kernel[(triton.cdiv(partial.shape[1], DOWN_OUTPUTS), num_pairs)](
        inner,
        gate_weights,
        second,
        second if second_bias is None else second_bias,
        expert_ids,
        slot_of,
        partial,
        width,
        partial.shape[1],
        num_inner,
        2 if form.has_gate and form.is_interleaved else 1,
        1 if form.is_interleaved else width,
        second.stride(0),
        second.stride(1),
        0 if second_bias is None else second_bias.stride(0),
        form.alpha,
        form.limit,
        ACTIVATION=ACTIVATIONS.index(form.activation),
        HAS_GATE=form.has_gate,
        HAS_BIAS=second_bias is not None,
        OUTPUTS=DOWN_OUTPUTS,
        DEPTH=DOWN_DEPTH,
        num_warps=DOWN_WARPS,
    )
    _join_kernel[(triton.cdiv(partial.shape[1], JOIN_OUTPUTS), num_tokens)](
        partial, output, partial.shape[1], TOP_K=top_k, OUTPUTS=JOIN_OUTPUTS, num_warps=4
    )
