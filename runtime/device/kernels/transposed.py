"""The expert products for weights stored [in, out]: read along their rows, as they lie."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.activation import (
    ACTIVATIONS,
    ExpertForm,
    SlotWeights,
    activate,
)
from foreroute.runtime.device.kernels.demand import arrived_slot, serve_demand, slot_named
from foreroute.runtime.device.kernels.linear import store_output

# Fastest of those tried on an H100 at gpt-oss-20b's shape.
UP_OUTPUTS, UP_DEPTH, UP_WARPS = 64, 128, 4
DOWN_OUTPUTS, DOWN_DEPTH, DOWN_WARPS = 32, 256, 8
JOIN_OUTPUTS = 512


@triton.jit
def _up_kernel(
    hidden,
    weight,
    bias,
    places,
    inner,
    rows,
    slots,
    copies,
    head_words,
    arrived,
    progress,
    num_copies,
    num_words,
    first_blocks,
    num_pairs,
    num_outputs,
    depth,
    top_k,
    slot_stride,
    depth_stride,
    bias_slot_stride,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    COPIERS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) - COPIERS
    if tile < 0:
        serve_demand(
            rows,
            slots,
            copies,
            head_words,
            arrived,
            progress,
            num_copies,
            num_words,
            first_blocks,
            COPIERS,
            COPIES,
            BLOCK,
        )
    else:
        tiles_each = tl.cdiv(num_outputs, OUTPUTS)
        pair = tl.load(places + num_pairs + tile // tiles_each)
        slot = arrived_slot(tl.load(places + pair), arrived, COPIERS)
        at = (tile % tiles_each) * OUTPUTS + tl.arange(0, OUTPUTS)
        is_at = at < num_outputs
        total = tl.zeros([DEPTH, OUTPUTS], dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            above = start + tl.arange(0, DEPTH)
            is_row = above < depth
            state = tl.load(hidden + (pair // top_k) * depth + above, mask=is_row, other=0.0)
            where = weight + slot * slot_stride + above[:, None] * depth_stride + at[None, :]
            loaded = tl.load(where, mask=is_row[:, None] & is_at[None, :], other=0.0)
            total += loaded.to(tl.float32) * state.to(tl.float32)[:, None]
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
    places,
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
    slot = slot_named(tl.load(places + pair))
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
def _join_kernel(
    partial,
    residual,
    output,
    num_outputs,
    TOP_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    token = tl.program_id(1)
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_at = at < num_outputs
    total = tl.zeros([OUTPUTS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        where = partial + (token * TOP_K + k) * num_outputs + at
        total += tl.load(where, mask=is_at, other=0.0)
    store_output(output, residual, token * num_outputs + at, total, is_at, HAS_RESIDUAL)


def transposed_products(
    hidden: Tensor,
    places: Tensor,
    gate_weights: Tensor,
    weights: SlotWeights,
    form: ExpertForm,
    output: Tensor,
    copying: dict[str, Any],
    residual: Tensor | None = None,
) -> None:
    """What `expert_products` does for weights [S, in, out]; three launches.

    Args:
        hidden: Router input, [T, D], contiguous.
        places: See `expert_products`, [2, T * K] int32.
        gate_weights: [T, K], float.
        weights: The slots' parameters by name, [S, ...].
        form: How the module computes.
        output: Written, [T, D].
        copying: Arguments for `serve_demand`.
        residual: See `expert_products`.
    """
    num_tokens, depth = hidden.shape
    num_pairs = places.shape[1]
    top_k = num_pairs // num_tokens
    first, first_bias, second, second_bias = form.split(weights)
    num_inner, width = first.shape[2], second.shape[1]
    inner = hidden.new_empty((num_pairs, num_inner), dtype=torch.float32)
    partial = hidden.new_empty((num_pairs, second.shape[2]), dtype=torch.float32)
    _up_kernel[(copying["COPIERS"] + triton.cdiv(num_inner, UP_OUTPUTS) * num_pairs,)](
        hidden,
        first,
        first if first_bias is None else first_bias,
        places,
        inner,
        num_pairs=num_pairs,
        num_outputs=num_inner,
        depth=depth,
        top_k=top_k,
        slot_stride=first.stride(0),
        depth_stride=first.stride(1),
        bias_slot_stride=0 if first_bias is None else first_bias.stride(0),
        HAS_BIAS=first_bias is not None,
        OUTPUTS=UP_OUTPUTS,
        DEPTH=UP_DEPTH,
        num_warps=UP_WARPS,
        **copying,
    )
    _down_kernel[(triton.cdiv(partial.shape[1], DOWN_OUTPUTS), num_pairs)](
        inner,
        gate_weights,
        second,
        second if second_bias is None else second_bias,
        places,
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
        partial,
        partial if residual is None else residual,
        output,
        partial.shape[1],
        TOP_K=top_k,
        HAS_RESIDUAL=residual is not None,
        OUTPUTS=JOIN_OUTPUTS,
        num_warps=4,
    )
