"""From projections to attention: head norms, rotation and cache write in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.cache import store_token_reference
from foreroute.runtime.device.kernels.norm import Norm, normed_reference
from foreroute.runtime.device.kernels.rotary import rotate_reference, turn


@dataclass(frozen=True, kw_only=True)
class ProjectedHeads:
    """Queries, keys and values of one new token per sequence, as their product left them."""

    states: Tensor
    """[B, W], contiguous: heads beside each other."""
    starts: tuple[int, int, int]
    """Columns where queries, keys and values begin."""
    query_heads: int
    """H."""
    key_heads: int
    """H_kv, of keys and values."""
    query_norm: Norm | None
    """The norm of each query head, over its d numbers."""
    key_norm: Norm | None
    """The norm of each key head."""
    cos: Tensor
    """[B or 1, 1, d] with equal halves, or [B or 1, 1, d / 2]."""
    sin: Tensor
    """Like `cos`."""


@triton.jit
def _heads_kernel(
    states,
    query_factor,
    key_factor,
    cos,
    sin,
    query_out,
    keys,
    values,
    position,
    width,
    query_start,
    key_start,
    value_start,
    num_keys,
    dim,
    value_dim,
    table_width,
    table_stride,
    query_eps,
    key_eps,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    NORMS_QUERY: tl.constexpr,
    NORMS_KEY: tl.constexpr,
    HALF: tl.constexpr,
    VALUE: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = states + batch * width
    if head >= QUERY_HEADS + KEY_HEADS:
        value_head, place = head - QUERY_HEADS - KEY_HEADS, tl.arange(0, VALUE)
        row = (batch * KEY_HEADS + value_head) * num_keys + tl.load(position)
        from_value = source + value_start + value_head * value_dim + place
        number = tl.load(from_value, mask=place < value_dim)
        tl.store(values + row * value_dim + place, number, mask=place < value_dim)
    else:
        half = dim // 2
        at = tl.arange(0, HALF)
        is_at = at < half
        table = batch * table_stride + at
        second = table + tl.where(table_width == dim, half, 0)
        c1 = tl.load(cos + table, mask=is_at, other=0.0)
        s1 = tl.load(sin + table, mask=is_at, other=0.0)
        c2 = tl.load(cos + second, mask=is_at, other=0.0)
        s2 = tl.load(sin + second, mask=is_at, other=0.0)
        is_query = head < QUERY_HEADS
        key_head = head - QUERY_HEADS
        own = source + tl.where(is_query, query_start + head * dim, key_start + key_head * dim)
        x1 = tl.load(own + at, mask=is_at, other=0.0)
        x2 = tl.load(own + half + at, mask=is_at, other=0.0)
        if is_query:
            if NORMS_QUERY:
                x1, x2 = _normed(x1, x2, query_factor, query_eps, at, is_at, half)
            target = query_out + (batch * QUERY_HEADS + head) * dim
        else:
            if NORMS_KEY:
                x1, x2 = _normed(x1, x2, key_factor, key_eps, at, is_at, half)
            target = keys + ((batch * KEY_HEADS + key_head) * num_keys + tl.load(position)) * dim
        y1, y2 = turn(x1, x2, c1, c2, s1, s2)
        tl.store(target + at, y1, mask=is_at)
        tl.store(target + half + at, y2, mask=is_at)


@triton.jit
def _normed(x1, x2, factor, eps, at, is_at, half):
    first, second = x1.to(tl.float32), x2.to(tl.float32)
    mean = (tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * half)
    scale = tl.rsqrt(mean + eps)
    f1 = tl.load(factor + at, mask=is_at, other=0.0).to(tl.float32)
    f2 = tl.load(factor + half + at, mask=is_at, other=0.0).to(tl.float32)
    return (first * scale * f1).to(x1.dtype), (second * scale * f2).to(x2.dtype)


def place_heads(heads: ProjectedHeads, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Norm and rotate queries and keys, and write keys and values into a static cache; one launch.

    Args:
        heads: As their product left them.
        keys: Written, [B, H_kv, N, d], contiguous; d is even.
        values: Written, [B, H_kv, N, d_v], contiguous.
        position: 0..N-1, [1] int64.

    Returns:
        The queries, [B, H, 1, d], contiguous.
    """
    batch, _, num_keys, dim = keys.shape
    query = heads.states.new_empty(batch, heads.query_heads, 1, dim)
    of_query, of_key = heads.query_norm, heads.key_norm
    _heads_kernel[(heads.query_heads + 2 * heads.key_heads, batch)](
        heads.states,
        heads.states if of_query is None else of_query.factor,
        heads.states if of_key is None else of_key.factor,
        heads.cos,
        heads.sin,
        query,
        keys,
        values,
        position,
        heads.states.shape[1],
        *heads.starts,
        num_keys,
        dim,
        values.shape[3],
        heads.cos.shape[-1],
        heads.cos.stride(0) if len(heads.cos) > 1 else 0,
        0.0 if of_query is None else of_query.eps,
        0.0 if of_key is None else of_key.eps,
        QUERY_HEADS=heads.query_heads,
        KEY_HEADS=heads.key_heads,
        NORMS_QUERY=of_query is not None,
        NORMS_KEY=of_key is not None,
        HALF=triton.next_power_of_2(dim // 2),
        VALUE=triton.next_power_of_2(values.shape[3]),
        num_warps=1,
    )
    return query


def place_heads_reference(
    heads: ProjectedHeads, keys: Tensor, values: Tensor, position: Tensor
) -> Tensor:
    """What `place_heads` does, in plain PyTorch."""

    def taken(start: int, count: int, dim: int, norm: Norm | None) -> Tensor:
        x = heads.states[:, start : start + count * dim].unflatten(1, (count, dim)).unsqueeze(2)
        return x if norm is None else normed_reference(x, norm)

    dim, (at_query, at_key, at_value) = keys.shape[3], heads.starts
    query = taken(at_query, heads.query_heads, dim, heads.query_norm)  # [B, H, 1, d]
    key = taken(at_key, heads.key_heads, dim, heads.key_norm)
    value = taken(at_value, heads.key_heads, values.shape[3], None)
    query, key = rotate_reference(query, key, heads.cos, heads.sin)
    store_token_reference(key, value, keys, values, position)
    return query
