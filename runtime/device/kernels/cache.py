"""Writes one new token's key and value into a static cache: one launch, position on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_kernel(
    key,
    value,
    keys,
    values,
    position,
    num_keys,
    key_dim,
    value_dim,
    key_batch_stride,
    key_head_stride,
    value_batch_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    row = pair * num_keys + tl.load(position)
    at = tl.arange(0, WIDTH)
    from_key = key + batch * key_batch_stride + head * key_head_stride + at
    tl.store(keys + row * key_dim + at, tl.load(from_key, mask=at < key_dim), mask=at < key_dim)
    from_value = value + batch * value_batch_stride + head * value_head_stride + at
    is_value = at < value_dim
    tl.store(values + row * value_dim + at, tl.load(from_value, mask=is_value), mask=is_value)


def store_token(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """Copy a token's key and value to a position that only the device knows.

    Args:
        key: [B, H_kv, 1, d], last dimension contiguous.
        value: [B, H_kv, 1, d_v], last dimension contiguous.
        keys: Written, [B, H_kv, N, d], contiguous.
        values: Written, [B, H_kv, N, d_v], contiguous.
        position: 0..N-1, [1] int64.
    """
    batch, heads, num_keys, key_dim = keys.shape
    value_dim = values.shape[3]
    _store_kernel[(batch * heads,)](
        key,
        value,
        keys,
        values,
        position,
        num_keys,
        key_dim,
        value_dim,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=heads,
        WIDTH=triton.next_power_of_2(max(key_dim, value_dim)),
        num_warps=1,
    )


def store_token_reference(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> None:
    """What `store_token` does, in plain PyTorch."""
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
