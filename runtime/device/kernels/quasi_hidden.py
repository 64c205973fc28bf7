"""Adds what a layer's experts are expected to put out to the residual stream, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512


@triton.jit
def _quasi_hidden_kernel(
    residual,
    expert_ids,
    gate_weights,
    default_vectors,
    output,
    depth,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < depth
    at = token * depth + columns
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(expert_ids + token * TOP_K + k).to(tl.int64)
        gate = tl.load(gate_weights + token * TOP_K + k).to(tl.float32)
        vector = tl.load(default_vectors + expert * depth + columns, mask=is_column, other=0.0)
        total += gate * vector.to(tl.float32)
    total += tl.load(residual + at, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=is_column)


def add_expected_output(
    residual: Tensor, expert_ids: Tensor, gate_weights: Tensor, default_vectors: Tensor
) -> Tensor:
    """What `add_expected_output` of `runtime/early_readout.py` gives, in one launch.

    Args:
        residual: [T, D], contiguous, any float dtype.
        expert_ids: [T, K], contiguous, integer.
        gate_weights: [T, K], contiguous, any float dtype.
        default_vectors: [E, D], contiguous, any float dtype.

    Returns:
        [T, D], in the residual's dtype, summed in float32.
    """
    num_tokens, depth = residual.shape
    output = torch.empty_like(residual)
    _quasi_hidden_kernel[(triton.cdiv(depth, COLUMNS), num_tokens)](
        residual,
        expert_ids,
        gate_weights,
        default_vectors,
        output,
        depth,
        TOP_K=expert_ids.shape[-1],
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return output
