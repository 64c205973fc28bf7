"""From router logits to chosen experts and gate weights: one launch in place of five."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 32
"""Experts that all others are compared with at once."""


@triton.jit
def choose_experts(  # noqa: ANN201
    logits,
    num_experts,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PADDED: tl.constexpr,
    RENORMALISE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """What `softmax_top_k` gives for one token: ids [K_PADDED] int32 and gate weights, float32.

    An expert's rank is the number of experts ahead of it, so nothing is searched one by one.
    """
    experts, places = tl.arange(0, EXPERTS), tl.arange(0, K_PADDED)
    is_expert = experts < num_experts
    # not from a core's own cache: other programs of the same launch may have written them
    row = tl.load(logits + experts, mask=is_expert, other=float("-inf"), cache_modifier=".cg")
    row = row.to(tl.float32)
    share = tl.exp(row - tl.max(row, 0))
    rank = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in tl.static_range(0, EXPERTS, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        others = tl.load(
            logits + some, mask=some < num_experts, other=float("-inf"), cache_modifier=".cg"
        ).to(tl.float32)
        is_tie_ahead = (others[None, :] == row[:, None]) & (some[None, :] < experts[:, None])
        rank += tl.sum(((others[None, :] > row[:, None]) | is_tie_ahead).to(tl.int32), 1)
    here = (rank[None, :] == places[:, None]) & is_expert[None, :]  # [K_PADDED, EXPERTS]
    chosen = tl.sum(tl.where(here, experts[None, :], 0), 1)
    gates = tl.sum(tl.where(here & (places < TOP_K)[:, None], share[None, :], 0.0), 1)
    gates = gates / (tl.sum(gates, 0) if RENORMALISE else tl.sum(share, 0))
    return tl.minimum(chosen, num_experts - 1), gates  # logits that are no numbers have no ranks


@triton.jit
def _top_k_kernel(
    logits,
    weights,
    ids,
    num_experts,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PADDED: tl.constexpr,
    RENORMALISE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    token, places = tl.program_id(0).to(tl.int64), tl.arange(0, K_PADDED)
    chosen, gates = choose_experts(
        logits + token * num_experts, num_experts, EXPERTS, TOP_K, K_PADDED, RENORMALISE, AT_ONCE
    )
    where = token * TOP_K + places
    tl.store(ids + where, chosen.to(tl.int64), mask=places < TOP_K)
    tl.store(weights + where, gates.to(weights.dtype.element_ty), mask=places < TOP_K)


def softmax_top_k(
    logits: Tensor, top_k: int, *, renormalise: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The K largest of softmax(logits), largest first; equal ones by lower id.

    Args:
        logits: [T, E], contiguous.
        top_k: K.
        renormalise: Whether the K shares are scaled to sum to one.
        dtype: Of the gate weights; the logits' if None.

    Returns:
        Gate weights, [T, K], and expert ids, [T, K] int64.
    """
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, top_k, dtype=dtype)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    experts = triton.next_power_of_2(num_experts)
    _top_k_kernel[(num_tokens,)](
        logits,
        weights,
        ids,
        num_experts,
        EXPERTS=experts,
        TOP_K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        RENORMALISE=renormalise,
        AT_ONCE=min(AT_ONCE, experts),
        num_warps=4,
    )
    return weights, ids


def softmax_top_k_reference(
    logits: Tensor, top_k: int, *, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """What `softmax_top_k` does, in plain PyTorch."""
    weights, ids = logits.float().softmax(-1).topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), ids
