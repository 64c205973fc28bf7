"""Products of a few tokens with up to three matrices in one launch, a norm and an addition folded.

What a layer's projections do while decoding: `linear(rms_norm(x), W)` for several W, or
`residual + linear(x, W)`. Values are rounded where the separate launches round them, so that only
the order of the sums differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.norm import (
    Norm,
    columns_of,
    load_state,
    norm_scale,
    normed_reference,
)

MOST_TOKENS = 4
"""More are multiplied faster by matrix products that reuse what they read."""
MOST_MATRICES = 3
# Fastest of those tried on an H100: elements that a program and a thread of it read at once.
TILE, PER_THREAD = 8192, 64


@triton.jit
def store_output(output, residual, at, total, is_at, HAS_RESIDUAL: tl.constexpr):  # noqa: ANN201
    """Store sums, float32, added to a residual where there is one, rounded before and after."""
    value = total.to(output.dtype.element_ty)
    if HAS_RESIDUAL:
        added = tl.load(residual + at, mask=is_at, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + added).to(output.dtype.element_ty)
    tl.store(output + at, value, mask=is_at)


@triton.jit
def _products_kernel(
    state,
    factor,
    weight_1,
    weight_2,
    weight_3,
    bias_1,
    bias_2,
    bias_3,
    residual,
    output,
    rows_1,
    rows_2,
    rows_3,
    depth,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    MATRICES: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, width = tl.program_id(0), rows_1 + rows_2 + rows_3
    weight, bias, num_rows, before = weight_1, bias_1, rows_1, 0
    if MATRICES > 1:
        blocks = tl.cdiv(rows_1, ROWS)
        if block >= blocks:
            block -= blocks
            weight, bias, num_rows, before = weight_2, bias_2, rows_2, rows_1
            if MATRICES > 2:
                blocks = tl.cdiv(rows_2, ROWS)
                if block >= blocks:
                    block -= blocks
                    weight, bias, num_rows, before = weight_3, bias_3, rows_3, rows_1 + rows_2
    row, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_row, tokens = row < num_rows, tl.arange(0, PADDED)
    where = weight + row.to(tl.int64)[:, None] * depth + columns[None, :]
    # on its way while the norm is taken
    tile = tl.load(where, mask=is_row[:, None] & (columns < depth)[None, :], other=0.0)
    scales = tl.zeros([PADDED], dtype=tl.float32)
    if HAS_NORM:
        for token in tl.static_range(TOKENS):
            scale = norm_scale(state + token * depth, depth, eps, COLUMNS)
            scales = tl.where(tokens == token, scale, scales)
    total = tl.zeros([PADDED, ROWS], dtype=tl.float32)
    for start in range(0, depth, COLUMNS):
        is_column = start + columns < depth
        if start > 0:
            tile = tl.load(where + start, mask=is_row[:, None] & is_column[None, :], other=0.0)
        for token in tl.static_range(TOKENS):
            scale = tl.sum(tl.where(tokens == token, scales, 0.0), 0)
            x = load_state(
                state + token * depth, factor, scale, start + columns, is_column, HAS_NORM
            )
            sums = tl.sum(tile.to(tl.float32) * x[None, :], 1)
            total += tl.where((tokens == token)[:, None], sums[None, :], 0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    at = tokens[:, None] * width + before + row[None, :]
    is_at = (tokens < TOKENS)[:, None] & is_row[None, :]
    store_output(output, residual, at, total, is_at, HAS_RESIDUAL)


def can_multiply(state: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `products` takes this matrix for these tokens.

    Args:
        state: [T, D].
        weight: Of the matrix.
        bias: Of its rows, or None.
    """
    return (
        len(state) <= MOST_TOKENS
        and weight.dim() == 2
        and weight.shape[1] == state.shape[1]
        and weight.dtype == state.dtype
        and weight.device == state.device
        and weight.is_contiguous()
        and state.is_contiguous()
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (bias is None or bias.dtype == weight.dtype)
    )


def products(
    state: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply a few tokens with several matrices; deterministic, sums in float32, one launch.

    Args:
        state: [T, D], contiguous; T is at most `MOST_TOKENS`.
        weights: One to three matrices, [R_i, D], contiguous, in the state's dtype.
        biases: [R_i] each, or none at all.
        norm: Taken of the state first.
        residual: Added to the result, [T, R], contiguous; for one matrix only.

    Returns:
        The results beside each other, [T, sum of R_i].
    """
    num_tokens, depth = state.shape
    rows = [len(weight) for weight in weights]
    columns = columns_of(depth)
    rows_each = max(1, TILE // columns)
    spare = [weights[0]] * (MOST_MATRICES - len(weights))
    output = state.new_empty(num_tokens, sum(rows))
    _products_kernel[(sum(triton.cdiv(count, rows_each) for count in rows),)](
        state,
        state if norm is None else norm.factor,
        *weights,
        *spare,
        *(weights if biases is None else biases),
        *spare,
        state if residual is None else residual,
        output,
        *rows,
        *[0] * len(spare),
        depth,
        0.0 if norm is None else norm.eps,
        HAS_NORM=norm is not None,
        HAS_BIAS=biases is not None,
        HAS_RESIDUAL=residual is not None,
        MATRICES=len(weights),
        TOKENS=num_tokens,
        PADDED=triton.next_power_of_2(num_tokens),
        ROWS=rows_each,
        COLUMNS=columns,
        num_warps=max(1, min(8, rows_each * columns // (32 * PER_THREAD))),
    )
    return output


def products_reference(
    state: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What `products` computes, in plain PyTorch."""
    state = state if norm is None else normed_reference(state, norm)
    every = [
        torch.nn.functional.linear(state, weight, None if biases is None else biases[i])
        for i, weight in enumerate(weights)
    ]
    result = torch.cat(every, dim=-1)
    return result if residual is None else residual + result
