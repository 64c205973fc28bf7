"""Rotary position embedding of queries and keys together: one launch in place of ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def turn(x1, x2, c1, c2, s1, s2):  # noqa: ANN201
    """Both halves of a head, rotated; products are rounded before they are added, as PyTorch does.

    Args:
        x1: First half.
        x2: Second half.
        c1: Cosines of the first half.
        c2: Cosines of the second half.
        s1: Sines of the first half.
        s2: Sines of the second half.
    """
    out = x1.dtype
    a1, b1 = (x1.to(tl.float32) * c1.to(tl.float32)), (x2.to(tl.float32) * s1.to(tl.float32))
    a2, b2 = (x2.to(tl.float32) * c2.to(tl.float32)), (x1.to(tl.float32) * s2.to(tl.float32))
    y1 = a1.to(out).to(tl.float32) - b1.to(out).to(tl.float32)
    y2 = a2.to(out).to(tl.float32) + b2.to(out).to(tl.float32)
    return y1.to(out), y2.to(out)


@triton.jit
def _rotate_kernel(
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    num_tokens,
    query_heads,
    dim,
    table_width,
    query_batch_stride,
    query_head_stride,
    query_token_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    table_batch_stride,
    table_token_stride,
    HALF: tl.constexpr,
):
    batch, token = tl.program_id(1) // num_tokens, tl.program_id(1) % num_tokens
    head, num_heads = tl.program_id(0), tl.num_programs(0)
    key_heads = num_heads - query_heads
    half = dim // 2
    at = tl.arange(0, HALF)
    is_at = at < half
    table = batch * table_batch_stride + token * table_token_stride + at
    second = table + tl.where(table_width == dim, half, 0)
    c1, c2 = tl.load(cos + table, mask=is_at), tl.load(cos + second, mask=is_at)
    s1, s2 = tl.load(sin + table, mask=is_at), tl.load(sin + second, mask=is_at)
    if head < query_heads:
        source = query + batch * query_batch_stride + head * query_head_stride
        source += token * query_token_stride
        target = query_out + ((batch * query_heads + head) * num_tokens + token) * dim
    else:
        head -= query_heads
        source = key + batch * key_batch_stride + head * key_head_stride
        source += token * key_token_stride
        target = key_out + ((batch * key_heads + head) * num_tokens + token) * dim
    x1, x2 = tl.load(source + at, mask=is_at), tl.load(source + half + at, mask=is_at)
    y1, y2 = turn(x1, x2, c1, c2, s1, s2)
    tl.store(target + at, y1, mask=is_at)
    tl.store(target + half + at, y2, mask=is_at)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate the two halves of each head; takes what transformers' function of this task takes.

    Args:
        q: [B, H, T, d], last dimension contiguous.
        k: [B, H_kv, T, d], last dimension contiguous.
        cos: [B or 1, T, d] with equal halves, or [B or 1, T, d / 2].
        sin: Like cos.
        unsqueeze_dim: 1, heads before tokens; others are not supported.

    Returns:
        Rotated queries and keys, contiguous.

    Raises:
        ValueError: If heads do not come before tokens.
    """
    if unsqueeze_dim != 1:
        raise ValueError(f"unsqueeze_dim must be 1, not {unsqueeze_dim}.")
    batch, query_heads, num_tokens, dim = q.shape
    outputs = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    _rotate_kernel[(query_heads + k.shape[1], batch * num_tokens)](
        q,
        k,
        cos,
        sin,
        *outputs,
        num_tokens,
        query_heads,
        dim,
        cos.shape[-1],
        *q.stride()[:3],
        *k.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1),
        HALF=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )
    return outputs


def rotate_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """What `rotate` does, in plain PyTorch."""
    if cos.shape[-1] != q.shape[-1]:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin
