"""Root-mean-square norms inside the kernels that read them, and by a launch of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROWEST, WIDEST = 1024, 4096
"""Elements of a row that a program reads at once, at least and at most."""
NORM_WARPS = 8


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Root-mean-square norm over the last dimension."""

    factor: Tensor
    """[D], what the normed state is multiplied with."""
    eps: float


@triton.jit
def load_state(  # noqa: ANN201
    state, factor, scale, columns, is_column, HAS_NORM: tl.constexpr
):
    """A token's inputs, [C] float32, normed and rounded as a launch of its own would."""
    x = tl.load(state + columns, mask=is_column, other=0.0)
    if HAS_NORM:
        weight = tl.load(factor + columns, mask=is_column, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * scale * weight).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def norm_scale(state, depth, eps, COLUMNS: tl.constexpr):  # noqa: ANN201
    """What a token's state is multiplied with so that its mean square is one."""
    square = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, depth, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(state + columns, mask=columns < depth, other=0.0).to(tl.float32)
        square += x * x
    return tl.rsqrt(tl.sum(square, 0) / depth + eps)


@triton.jit
def _norm_kernel(state, factor, output, depth, eps, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    scale = norm_scale(state + token * depth, depth, eps, COLUMNS)
    for start in range(0, depth, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = load_state(state + token * depth, factor, scale, columns, columns < depth, True)
        where = output + token * depth + columns
        tl.store(where, x.to(output.dtype.element_ty), mask=columns < depth)


def normed(state: Tensor, norm: Norm) -> Tensor:
    """The state's norm by a launch of its own, bit for bit as `route` takes it.

    Args:
        state: [T, D], contiguous.
        norm: Of D numbers.
    """
    output, depth = torch.empty_like(state), state.shape[-1]
    _norm_kernel[(len(state),)](
        state,
        norm.factor,
        output,
        depth,
        norm.eps,
        COLUMNS=columns_of(depth),
        num_warps=NORM_WARPS,
    )
    return output


def normed_reference(state: Tensor, norm: Norm) -> Tensor:
    """The same in plain PyTorch, of a state of any shape [.., D]."""
    result: Tensor = torch.nn.functional.rms_norm(state, norm.factor.shape, norm.factor, norm.eps)
    return result


def columns_of(depth: int) -> int:
    """Elements of a row that a program reads at once.

    More than there are experts or slots: tiles of one size share a layout inside a kernel, and
    another layout would sum in another order.
    """
    return max(NARROWEST, min(WIDEST, int(triton.next_power_of_2(depth))))
