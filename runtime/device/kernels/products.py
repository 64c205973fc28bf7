"""The experts' gated MLP for a few tokens, straight from the slots: two launches, no gather.

The first also copies what is missing (`demand.py`).
"""

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
from foreroute.runtime.device.kernels.demand import (
    Demand,
    arrived_slot,
    no_demand,
    serve_demand,
    slot_named,
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
        tiles_each = tl.cdiv(width, ROWS)
        pair = tl.load(places + num_pairs + tile // tiles_each)
        slot = arrived_slot(tl.load(places + pair), arrived, COPIERS)
        inner_rows = (tile % tiles_each) * ROWS + tl.arange(0, ROWS)
        is_row = inner_rows < width
        base = weight + slot * slot_stride + inner_rows[:, None] * row_stride
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
            where += up_offset
            up += tl.sum(tl.load(where, mask=mask, other=0.0).to(tl.float32) * state, 1)
        if HAS_BIAS:
            where_bias = bias + slot * bias_slot_stride + inner_rows * bias_row_stride
            if HAS_GATE:
                gate += tl.load(where_bias, mask=is_row, other=0.0).to(tl.float32)
            up += tl.load(where_bias + bias_up_offset, mask=is_row, other=0.0).to(tl.float32)
        value = activate(gate, up, alpha, limit, ACTIVATION, HAS_GATE)
        tl.store(inner + pair * width + inner_rows, value, mask=is_row)


@triton.jit
def _down_kernel(
    inner,
    gate_weights,
    weight,
    bias,
    places,
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
        slot = slot_named(tl.load(places + pair))
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
    places: Tensor,
    gate_weights: Tensor,
    weights: dict[str, Tensor],
    form: ExpertForm,
    output: Tensor,
    demand: Demand | None = None,
) -> None:
    """Compute a layer's experts; deterministic, sums in float32 in a fixed order.

    Args:
        hidden: Router input, [T, D], contiguous; T is small (each token reads its experts anew).
        places: Where each token's experts are, as `plan` writes it, [2, T * K] int32.
        gate_weights: [T, K], float.
        weights: The slots' parameters by name as the experts module has them, [S, ...].
        form: How the module computes.
        output: Written, [T, D].
        demand: Experts to copy meanwhile; if None, all are resident.
    """
    copying = no_demand(places) if demand is None else demand.arguments()
    if form.is_transposed:
        transposed_products(hidden, places, gate_weights, weights, form, output, copying)
        return
    num_tokens, depth = hidden.shape
    first, first_bias, second, second_bias = form.split(weights)
    num_pairs, width = places.shape[1], second.shape[2]
    top_k = num_pairs // num_tokens
    inner = hidden.new_empty((num_pairs, width), dtype=torch.float32)
    step = 2 if form.is_interleaved else 1
    row_stride = first.stride(1)
    apart = (1 if form.is_interleaved else width) if form.has_gate else 0
    _up_kernel[(copying["COPIERS"] + triton.cdiv(width, UP_ROWS) * num_pairs,)](
        hidden,
        first,
        first if first_bias is None else first_bias,
        places,
        inner,
        num_pairs=num_pairs,
        width=width,
        depth=depth,
        top_k=top_k,
        slot_stride=first.stride(0),
        row_stride=row_stride * step,
        up_offset=row_stride * apart,
        bias_slot_stride=0 if first_bias is None else first_bias.stride(0),
        bias_row_stride=step,
        bias_up_offset=apart,
        alpha=form.alpha,
        limit=form.limit,
        ACTIVATION=ACTIVATIONS.index(form.activation),
        HAS_GATE=form.has_gate,
        HAS_BIAS=first_bias is not None,
        ROWS=UP_ROWS,
        COLUMNS=min(UP_COLUMNS, triton.next_power_of_2(depth)),
        num_warps=UP_WARPS,
        **copying,
    )
    _down_kernel[(triton.cdiv(depth, DOWN_ROWS), num_tokens)](
        inner,
        gate_weights,
        second,
        second if second_bias is None else second_bias,
        places,
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
    places: Tensor,
    gate_weights: Tensor,
    weights: dict[str, Tensor],
    form: ExpertForm,
) -> Tensor:
    """What `expert_products` computes, in plain PyTorch and float32; returns [T, D]."""
    codes = places[0].view(gate_weights.shape).long()  # [T, K]
    slots = torch.where(codes < 0, -1 - codes, codes)
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
