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
    SlotWeights,
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
from foreroute.runtime.device.kernels.float4 import float4_sums
from foreroute.runtime.device.kernels.linear import store_output
from foreroute.runtime.device.kernels.lossless import packed_sums
from foreroute.runtime.device.kernels.matrices import (
    KIND_LOSSLESS,
    KIND_MXFP4,
    LOSSLESS,
    MXFP4,
    PLAIN,
    SlotMatrix,
    load_inputs,
    row_sums,
)
from foreroute.runtime.device.kernels.transposed import transposed_products

# Fastest of those tried on an H100 at Qwen3-30B-A3B's shape: few rows, each read all at once.
UP_ROWS, UP_COLUMNS, UP_WARPS = 1, 2048, 2
DOWN_ROWS, DOWN_COLUMNS, DOWN_WARPS = 2, 1024, 4
# The same where experts are stored in fewer bits.
FEW_ROWS, FEW_COLUMNS, FEW_WARPS = 8, 512, 4
# Without loss in 12 bits, in words of eight columns: fastest of those tried, as above.
PACKED_UP_ROWS, PACKED_UP_COLUMNS, PACKED_UP_WARPS = 2, 128, 1
PACKED_DOWN_ROWS, PACKED_DOWN_COLUMNS, PACKED_DOWN_WARPS = 2, 32, 2
# Four-bit floats, likewise; of those tried at gpt-oss-20b's shape.
FLOAT4_UP_ROWS, FLOAT4_UP_COLUMNS, FLOAT4_UP_WARPS, FLOAT4_UP_UNROLL = 1, 32, 1, 12
FLOAT4_DOWN_ROWS, FLOAT4_DOWN_COLUMNS, FLOAT4_DOWN_WARPS, FLOAT4_DOWN_UNROLL = 2, 32, 1, 1


@triton.jit
def _up_kernel(
    hidden,
    weight,
    scales,
    offsets,
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
    step,
    apart,
    bias_slot_stride,
    alpha,
    limit,
    num_rows,
    num_elements,
    num_steps,
    slot_stride,
    row_stride,
    scale_slot_stride,
    scale_row_stride,
    height,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INNER_BY_PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    COPIERS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0) - COPIERS
    if program < 0:
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
        pair = tl.load(places + num_pairs + program // tiles_each)
        slot = arrived_slot(tl.load(places + pair), arrived, COPIERS)
        at = (program % tiles_each) * ROWS + tl.arange(0, ROWS)
        is_at = at < width
        row = at * step  # the gate's, or the only one
        state = hidden + (pair // top_k) * depth
        matrix = (
            weight,
            scales,
            offsets,
            num_rows,
            slot_stride,
            row_stride,
            scale_slot_stride,
            scale_row_stride,
            height,
        )
        gate = tl.zeros([ROWS], dtype=tl.float32)
        up = tl.zeros([ROWS], dtype=tl.float32)
        if KIND >= KIND_MXFP4:
            one = tl.zeros([1, 1], dtype=tl.int64)
            words = weight + slot * slot_stride + one
            lines = scales + slot * scale_slot_stride + one
            state += one
            parts = tl.arange(0, 2 if HAS_GATE else 1)[:, None]  # the gate's rows, and up's
            of_parts = row[None, :] + (parts if HAS_GATE else 1) * apart
            if KIND == KIND_LOSSLESS:
                sums = packed_sums(words, lines, num_rows, of_parts, state, COLUMNS, AT_ONCE)
            else:
                sums = float4_sums(
                    words, lines, num_rows, of_parts, state, COLUMNS, 8, 1, AT_ONCE, UNROLL
                )
            up = tl.sum(tl.where(parts == parts.shape[0] - 1, sums, 0.0), 0)
            if HAS_GATE:
                gate = tl.sum(tl.where(parts == 0, sums, 0.0), 0)
        else:
            for start in range(0, num_steps, AT_ONCE):
                tile = load_inputs(state, start, num_elements, KIND, GROUP, PADDED, AT_ONCE)
                if HAS_GATE:
                    gate += row_sums(matrix, slot, row, start, tile, KIND, AT_ONCE, SHARED_ROWS)
                up += row_sums(matrix, slot, row + apart, start, tile, KIND, AT_ONCE, SHARED_ROWS)
        if HAS_BIAS:
            where_bias = bias + slot * bias_slot_stride + row
            if HAS_GATE:
                gate += tl.load(where_bias, mask=is_at, other=0.0).to(tl.float32)
            up += tl.load(where_bias + apart, mask=is_at, other=0.0).to(tl.float32)
        value = activate(gate, up, alpha, limit, ACTIVATION, HAS_GATE)
        where_inner = (at % 8) * (width // 8) + at // 8 if INNER_BY_PLANES else at
        tl.store(inner + pair * width + where_inner, value, mask=is_at)


@triton.jit
def _down_kernel(
    inner,
    gate_weights,
    weight,
    scales,
    offsets,
    bias,
    places,
    residual,
    output,
    width,
    depth,
    bias_slot_stride,
    num_rows,
    num_elements,
    num_steps,
    slot_stride,
    row_stride,
    scale_slot_stride,
    scale_row_stride,
    height,
    TOP_K: tl.constexpr,
    MOST_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < depth
    matrix = (
        weight,
        scales,
        offsets,
        num_rows,
        slot_stride,
        row_stride,
        scale_slot_stride,
        scale_row_stride,
        height,
    )
    total = tl.zeros([ROWS], dtype=tl.float32)
    if KIND >= KIND_MXFP4:
        k = tl.arange(0, MOST_K)[:, None]  # all experts side by side
        pair = token * TOP_K + k
        slot = slot_named(tl.load(places + pair, mask=k < TOP_K, other=0))
        words = weight + slot * slot_stride
        lines = scales + slot * scale_slot_stride
        row_of = tl.where(k < TOP_K, row[None, :], num_rows)
        state_of = inner + tl.where(k < TOP_K, pair, 0) * width
        if KIND == KIND_LOSSLESS:
            sums = packed_sums(words, lines, num_rows, row_of, state_of, COLUMNS, AT_ONCE)
        else:
            PLANE: tl.constexpr = COLUMNS // 8
            sums = float4_sums(
                words, lines, num_rows, row_of, state_of, COLUMNS, 1, PLANE, AT_ONCE, UNROLL
            )
        factor = tl.load(gate_weights + pair, mask=k < TOP_K, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(k < TOP_K, factor * sums, 0.0), 0)  # others may be no numbers
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        slot = slot_named(tl.load(places + pair))
        value = tl.zeros([ROWS], dtype=tl.float32)
        if KIND < KIND_MXFP4:
            for start in range(0, num_steps, AT_ONCE):
                state = inner + pair * width
                tile = load_inputs(state, start, num_elements, KIND, GROUP, PADDED, AT_ONCE)
                value += row_sums(matrix, slot, row, start, tile, KIND, AT_ONCE, SHARED_ROWS)
        if HAS_BIAS:
            where_bias = bias + slot * bias_slot_stride + row
            value += tl.load(where_bias, mask=is_row, other=0.0).to(tl.float32)
        if KIND < KIND_MXFP4 or HAS_BIAS:
            total += tl.load(gate_weights + pair).to(tl.float32) * value
    store_output(output, residual, token * depth + row, total, is_row, HAS_RESIDUAL)


def expert_products(
    hidden: Tensor,
    places: Tensor,
    gate_weights: Tensor,
    weights: SlotWeights,
    form: ExpertForm,
    output: Tensor,
    demand: Demand | None = None,
    residual: Tensor | None = None,
) -> None:
    """Compute a layer's experts; deterministic, sums in float32 in a fixed order.

    Args:
        hidden: Router input, [T, D], contiguous; T is small (each token reads its experts anew).
        places: Where each token's experts are, as `plan` writes it, [2, T * K] int32.
        gate_weights: [T, K], float.
        weights: The slots' parameters by name as the experts module has them, [S, ...]; matrices
            may be stored in fewer bits.
        form: How the module computes.
        output: Written, [T, D].
        demand: Experts to copy meanwhile; if None, all are resident.
        residual: Added to the result, [T, D]; both are rounded before, as by launches of their own.
    """
    copying = no_demand(places) if demand is None else demand.arguments()
    first, first_bias, second, second_bias = form.split(weights)
    if form.is_transposed and isinstance(first, Tensor):
        transposed_products(hidden, places, gate_weights, weights, form, output, copying, residual)
        return
    up, down = SlotMatrix.of(first), SlotMatrix.of(second)
    num_tokens, depth = hidden.shape
    num_pairs, width = places.shape[1], down.columns
    top_k = num_pairs // num_tokens
    inner = hidden.new_empty((num_pairs, width), dtype=torch.float32)
    is_alternating = form.has_gate and form.is_interleaved
    rows, tile, num_warps, unroll = _tile(up.kind, is_up=True)
    _up_kernel[(copying["COPIERS"] + triton.cdiv(width, rows) * num_pairs,)](
        hidden=hidden,
        bias=places if first_bias is None else first_bias,
        places=places,
        inner=inner,
        num_pairs=num_pairs,
        width=width,
        depth=depth,
        top_k=top_k,
        step=2 if is_alternating else 1,
        apart=(1 if is_alternating else width) if form.has_gate else 0,
        bias_slot_stride=0 if first_bias is None else first_bias.stride(0),
        alpha=form.alpha,
        limit=form.limit,
        ACTIVATION=ACTIVATIONS.index(form.activation),
        HAS_GATE=form.has_gate,
        HAS_BIAS=first_bias is not None,
        INNER_BY_PLANES=down.kind == MXFP4,
        ROWS=rows,
        num_warps=num_warps,
        UNROLL=unroll,
        **up.arguments(tile),
        **copying,
    )
    rows, tile, num_warps, unroll = _tile(down.kind, is_up=False)
    _down_kernel[(triton.cdiv(depth, rows), num_tokens)](
        inner=inner,
        gate_weights=gate_weights,
        bias=places if second_bias is None else second_bias,
        places=places,
        residual=output if residual is None else residual,
        output=output,
        width=width,
        depth=depth,
        bias_slot_stride=0 if second_bias is None else second_bias.stride(0),
        TOP_K=top_k,
        MOST_K=triton.next_power_of_2(top_k),
        HAS_BIAS=second_bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        num_warps=num_warps,
        UNROLL=unroll,
        **down.arguments(tile),
    )


def _tile(kind: int, *, is_up: bool) -> tuple[int, int, int, int]:
    """Rows, elements of a row and warps of a program; how far `float4_sums` unrolls its loop."""
    if kind == MXFP4:
        up = FLOAT4_UP_ROWS, FLOAT4_UP_COLUMNS, FLOAT4_UP_WARPS, FLOAT4_UP_UNROLL
        down = FLOAT4_DOWN_ROWS, FLOAT4_DOWN_COLUMNS, FLOAT4_DOWN_WARPS, FLOAT4_DOWN_UNROLL
        return up if is_up else down
    if kind == LOSSLESS and is_up:
        return PACKED_UP_ROWS, PACKED_UP_COLUMNS, PACKED_UP_WARPS, 1
    if kind == LOSSLESS:
        return PACKED_DOWN_ROWS, PACKED_DOWN_COLUMNS, PACKED_DOWN_WARPS, 1
    if kind != PLAIN:
        return FEW_ROWS, FEW_COLUMNS, FEW_WARPS, 1
    if is_up:
        return UP_ROWS, UP_COLUMNS, UP_WARPS, 1
    return DOWN_ROWS, DOWN_COLUMNS, DOWN_WARPS, 1


def expert_products_reference(
    hidden: Tensor,
    places: Tensor,
    gate_weights: Tensor,
    weights: SlotWeights,
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
