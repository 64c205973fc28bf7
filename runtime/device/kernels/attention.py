"""Attention of one new token per sequence over a static cache: two launches, no repeated keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 64
MAX_SPLITS = 32
MIN_ROWS = 16  # least rows of a matrix product on the GPU
MAX_HEAD_DIM = 256
NO_SCORE = tl.constexpr(-1e30)


@triton.jit
def _split_kernel(
    query,
    keys,
    values,
    mask,
    highest,
    total,
    partial,
    scaling,
    softcap,
    num_keys,
    blocks_per_split,
    key_dim,
    value_dim,
    query_batch_stride,
    query_head_stride,
    mask_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # sequence and key head
    batch, head = pair // HEADS, pair % HEADS
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    rows, key_at, value_at = tl.arange(0, ROWS), tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    is_row, is_key_at, is_value_at = rows < GROUP, key_at < key_dim, value_at < value_dim
    where = (head * GROUP + rows[:, None]) * query_head_stride + key_at[None, :]
    is_query = is_row[:, None] & is_key_at[None, :]
    q = tl.load(query + batch * query_batch_stride + where, mask=is_query, other=0.0)
    q = q.to(tl.float32)
    top = tl.full([ROWS], NO_SCORE, dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    output = tl.zeros([ROWS, VALUE_DIM], dtype=tl.float32)
    first = split * blocks_per_split
    for block in range(first, first + blocks_per_split):
        at = block * BLOCK + tl.arange(0, BLOCK)
        is_seen = tl.load(mask + batch * mask_stride + at, mask=at < num_keys, other=0) != 0
        if tl.sum(is_seen.to(tl.int32), 0) > 0:
            row = pair * num_keys + at[:, None]
            is_key = is_seen[:, None] & is_key_at[None, :]
            k = tl.load(keys + row * key_dim + key_at[None, :], mask=is_key, other=0.0)
            scores = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision=PRECISION) * scaling
            if HAS_SOFTCAP:
                # tanh by exp: 1 - 2 / (exp(2x) + 1)
                scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
            scores = tl.where(is_seen[None, :], scores, NO_SCORE)
            new_top = tl.maximum(top, tl.max(scores, 1))
            share = tl.where(is_seen[None, :], tl.exp(scores - new_top[:, None]), 0.0)
            fade = tl.exp(top - new_top)
            is_value = is_seen[:, None] & is_value_at[None, :]
            v = tl.load(values + row * value_dim + value_at[None, :], mask=is_value, other=0.0)
            output = output * fade[:, None]
            rounded = share.to(v.dtype).to(tl.float32)
            output += tl.dot(rounded, v.to(tl.float32), input_precision=PRECISION)
            weight = weight * fade + tl.sum(share, 1)
            top = new_top
    place = (pair * num_splits + split) * GROUP + rows
    tl.store(highest + place, top, mask=is_row)
    tl.store(total + place, weight, mask=is_row)
    where_out = place[:, None] * value_dim + value_at[None, :]
    tl.store(partial + where_out, output, mask=is_row[:, None] & is_value_at[None, :])


@triton.jit
def _join_kernel(
    highest,
    total,
    partial,
    sinks,
    output,
    num_splits,
    value_dim,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    query_head = tl.program_id(0).to(tl.int64)  # over sequences and query heads
    pair, row = query_head // GROUP, query_head % GROUP
    splits, value_at = tl.arange(0, SPLITS), tl.arange(0, VALUE_DIM)
    is_split, is_value_at = splits < num_splits, value_at < value_dim
    place = (pair * num_splits + splits) * GROUP + row
    tops = tl.load(highest + place, mask=is_split, other=NO_SCORE)
    weights = tl.load(total + place, mask=is_split, other=0.0)
    where = place[:, None] * value_dim + value_at[None, :]
    parts = tl.load(partial + where, mask=is_split[:, None] & is_value_at[None, :], other=0.0)
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + (pair % HEADS) * GROUP + row).to(tl.float32)
        top = tl.maximum(top, sink)
    fade = tl.exp(tops - top)
    weight = tl.sum(weights * fade, 0)
    if HAS_SINKS:
        weight += tl.exp(sink - top)
    result = tl.sum(parts * fade[:, None], 0) / weight
    at = query_head * value_dim + value_at
    tl.store(output + at, result.to(output.dtype.element_ty), mask=is_value_at)


def can_attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether `decode_attention` computes this call."""
    return (
        query.shape[2] == 1
        and mask is not None
        and mask.dtype == torch.bool
        and mask.shape[1:3] == (1, 1)
        and mask.shape[3] == keys.shape[2]
        and query.stride(3) == mask.stride(3) == 1
        and keys.is_contiguous()
        and values.is_contiguous()
        and query.dtype == keys.dtype == values.dtype
        and max(keys.shape[3], values.shape[3]) <= MAX_HEAD_DIM
    )


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one token per sequence; deterministic, sums in float32.

    Args:
        query: [B, H, 1, d], last dimension contiguous.
        keys: The whole cache, [B, H_kv, N, d], contiguous.
        values: [B, H_kv, N, d_v], contiguous.
        mask: True where a key is seen, [B, 1, 1, N]; at least one of each sequence is.
        scaling: Factor on the scores.
        softcap: Scores become softcap * tanh(score / softcap).
        sinks: A score per query head that takes weight and gives nothing, [H].

    Returns:
        [B, 1, H, d_v].
    """
    batch, num_heads, _, key_dim = query.shape
    heads, num_keys, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    group = num_heads // heads
    num_blocks = triton.cdiv(num_keys, BLOCK_KEYS)
    blocks_per_split = triton.cdiv(num_blocks, MAX_SPLITS)
    num_splits = triton.cdiv(num_blocks, blocks_per_split)
    scratch = (batch * heads, num_splits, group)
    highest, total = query.new_empty((2, *scratch), dtype=torch.float32)
    partial = query.new_empty((*scratch, value_dim), dtype=torch.float32)
    output = query.new_empty((batch, 1, num_heads, value_dim))
    _split_kernel[(batch * heads, num_splits)](
        query,
        keys,
        values,
        mask,
        highest,
        total,
        partial,
        scaling,
        softcap or 1.0,
        num_keys,
        blocks_per_split,
        key_dim,
        value_dim,
        query.stride(0),
        query.stride(1),
        mask.stride(0),
        HEADS=heads,
        GROUP=group,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
        KEY_DIM=max(MIN_ROWS, triton.next_power_of_2(key_dim)),
        VALUE_DIM=max(MIN_ROWS, triton.next_power_of_2(value_dim)),
        BLOCK=BLOCK_KEYS,
        HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",  # 16-bit floats fit in tf32
        num_warps=4,
    )
    _join_kernel[(batch * num_heads,)](
        highest,
        total,
        partial,
        total if sinks is None else sinks,
        output,
        num_splits,
        value_dim,
        HEADS=heads,
        GROUP=group,
        SPLITS=triton.next_power_of_2(num_splits),
        VALUE_DIM=max(MIN_ROWS, triton.next_power_of_2(value_dim)),
        HAS_SINKS=sinks is not None,
        num_warps=1,
    )
    return output


def decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What `decode_attention` computes, in plain PyTorch and float32."""
    group = query.shape[1] // keys.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = query.float() @ k.transpose(2, 3) * scaling  # [B, H, 1, N]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(len(query), -1, 1, 1)
        shares = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    return (shares @ v).transpose(1, 2)
