"""From router logits to chosen experts and gate weights: one launch in place of five."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
):
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, EXPERTS), tl.arange(0, K_PADDED)
    is_expert = experts < num_experts
    row = tl.load(logits + token * num_experts + experts, mask=is_expert, other=float("-inf"))
    row = row.to(tl.float32)
    share = tl.exp(row - tl.max(row, 0))
    total = tl.sum(share, 0)
    chosen = tl.zeros([K_PADDED], dtype=tl.int32)
    gates = tl.zeros([K_PADDED], dtype=tl.float32)
    left = row
    for k in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        here = experts == best
        chosen = tl.where(places == k, best, chosen)
        gates = tl.where(places == k, tl.sum(tl.where(here, share, 0.0), 0), gates)
        left = tl.where(here, float("-inf"), left)
    gates = gates / (tl.sum(gates, 0) if RENORMALISE else total)
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
    _top_k_kernel[(num_tokens,)](
        logits,
        weights,
        ids,
        num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        TOP_K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        RENORMALISE=renormalise,
        num_warps=1,
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
