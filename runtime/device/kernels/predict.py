"""Predicts a layer's experts in two launches: logits from an early state, then ranks and chances.

Every estimator that is affine in the normed state comes down to one matrix per layer pair, with the
norm's weight folded in: logits = (A x) / rms(x) + b, where x is the state before the norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fastest of those tried on an H100 at Qwen3-30B-A3B's shape.
ROWS, COLUMNS, WARPS = 2, 2048, 4


@triton.jit
def _logits_kernel(
    state,
    expert_ids,
    gate_weights,
    default_vectors,
    weight,
    bias,
    logits,
    num_experts,
    depth,
    eps,
    TOP_K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_experts
    square = tl.zeros([COLUMNS], dtype=tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, depth, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < depth
        x = tl.load(state + token * depth + columns, mask=is_column, other=0.0).to(tl.float32)
        if HAS_VECTORS:
            for k in tl.static_range(TOP_K):
                expert = tl.load(expert_ids + token * TOP_K + k).to(tl.int64)
                gate = tl.load(gate_weights + token * TOP_K + k).to(tl.float32)
                vector = tl.load(
                    default_vectors + expert * depth + columns, mask=is_column, other=0.0
                )
                x += gate * vector.to(tl.float32)
        if HAS_NORM:
            square += x * x
        where = weight + rows[:, None] * depth + columns[None, :]
        tile = tl.load(where, mask=is_row[:, None] & is_column[None, :], other=0.0)
        total += tile.to(tl.float32) * x[None, :]
    value = tl.sum(total, 1)
    if HAS_NORM:
        value = value / tl.sqrt(tl.sum(square, 0) / depth + eps)
    value += tl.load(bias + rows, mask=is_row, other=0.0)
    tl.store(logits + token * num_experts + rows, value, mask=is_row)


def predict_logits(
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float | None,
    default_vectors: Tensor | None = None,
    expert_ids: Tensor | None = None,
    gate_weights: Tensor | None = None,
) -> Tensor:
    """Router logits of a later layer, as its folded estimator has them; one launch.

    Args:
        state: [T, D], contiguous, any float dtype.
        weight: [E, D], any float dtype, the norm's weight folded in.
        bias: [E], float32.
        eps: Of the root mean square that the state is divided by; None leaves it as it is.
        default_vectors: Added to the state by the layer's own routing, [E, D]; see quasi-hidden.
        expert_ids: That routing, [T, K], integer.
        gate_weights: [T, K], float.

    Returns:
        [T, E], float32.
    """
    (num_tokens, depth), num_experts = state.shape, len(weight)
    logits = torch.empty(num_tokens, num_experts, device=state.device)
    has_vectors = default_vectors is not None
    _logits_kernel[(triton.cdiv(num_experts, ROWS), num_tokens)](
        state,
        expert_ids if has_vectors else state,
        gate_weights if has_vectors else state,
        default_vectors if has_vectors else state,
        weight,
        bias,
        logits,
        num_experts,
        depth,
        eps or 0.0,
        TOP_K=1 if expert_ids is None else expert_ids.shape[-1],
        HAS_NORM=eps is not None,
        HAS_VECTORS=has_vectors,
        ROWS=ROWS,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(depth)),
        num_warps=WARPS,
    )
    return logits


def predict_logits_reference(
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float | None,
    default_vectors: Tensor | None = None,
    expert_ids: Tensor | None = None,
    gate_weights: Tensor | None = None,
) -> Tensor:
    """What `predict_logits` computes, in plain PyTorch."""
    x = state.float()
    if default_vectors is not None:
        assert expert_ids is not None
        assert gate_weights is not None
        x = x + (default_vectors[expert_ids].float() * gate_weights.float().unsqueeze(-1)).sum(1)
    logits = x @ weight.float().T
    if eps is not None:
        logits = logits / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return logits + bias


@triton.jit
def _rank_kernel(
    logits,
    chance_at,
    ids,
    chances,
    num_experts,
    first_margin,
    knots_per_margin,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BUDGET: tl.constexpr,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    KNOTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, EXPERTS), tl.arange(0, PADDED)
    is_expert = experts < num_experts
    left = tl.load(logits + token * num_experts + experts, mask=is_expert, other=float("-inf"))
    chosen = tl.zeros([PADDED], dtype=tl.int32)
    scores = tl.zeros([PADDED], dtype=tl.float32)
    for k in tl.static_range(RANKS):
        best = tl.argmax(left, 0)
        chosen = tl.where(places == k, best, chosen)
        scores = tl.where(places == k, tl.max(left, 0), scores)
        left = tl.where(experts == best, float("-inf"), left)
    edge = (places == TOP_K - 1) | (places == TOP_K)
    margin = scores - tl.sum(tl.where(edge, scores, 0.0), 0) / 2
    place = (margin - tl.load(first_margin)) * tl.load(knots_per_margin)
    place = tl.minimum(tl.maximum(place, 0.0), KNOTS - 1.0)
    knot = tl.minimum(place.to(tl.int32), KNOTS - 2)
    low, high = tl.load(chance_at + knot), tl.load(chance_at + knot + 1)
    chance = low + (high - low) * (place - knot.to(tl.float32))
    where, is_kept = token * BUDGET + places, places < BUDGET
    tl.store(ids + where, chosen.to(tl.int64), mask=is_kept)
    tl.store(chances + where, chance, mask=is_kept)


def rank_experts(
    logits: Tensor,
    first_margin: Tensor,
    knots_per_margin: Tensor,
    chance_at: Tensor,
    *,
    top_k: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """The best experts and how likely each is among the true ones; one launch.

    Args:
        logits: [T, E], float32, contiguous.
        first_margin: Of the calibration's table (`estimators/calibration.py`), [1].
        knots_per_margin: [1].
        chance_at: Probability at each knot, [B].
        top_k: K; E must be larger.
        budget: M, experts ranked.

    Returns:
        Ids [T, M] int64, best first, and their probabilities [T, M] float32.
    """
    num_tokens, num_experts = logits.shape
    ranks = max(budget, top_k + 1)
    ids = torch.empty(num_tokens, budget, dtype=torch.int64, device=logits.device)
    chances = torch.empty(num_tokens, budget, device=logits.device)
    _rank_kernel[(num_tokens,)](
        logits,
        chance_at,
        ids,
        chances,
        num_experts,
        first_margin,
        knots_per_margin,
        EXPERTS=triton.next_power_of_2(num_experts),
        TOP_K=top_k,
        BUDGET=budget,
        RANKS=ranks,
        PADDED=triton.next_power_of_2(ranks),
        KNOTS=len(chance_at),
        num_warps=1,
    )
    return ids, chances


def rank_experts_reference(
    logits: Tensor,
    first_margin: Tensor,
    knots_per_margin: Tensor,
    chance_at: Tensor,
    *,
    top_k: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """What `rank_experts` does, in plain PyTorch."""
    scores, ids = logits.topk(max(budget, top_k + 1), dim=-1)
    margin = scores - scores[:, top_k - 1 : top_k + 1].mean(-1, keepdim=True)
    place = ((margin - first_margin) * knots_per_margin).clamp(0, len(chance_at) - 1)
    knot = place.floor().clamp(max=len(chance_at) - 2).long()
    chances = torch.lerp(chance_at[knot], chance_at[knot + 1], place - knot)
    return ids[:, :budget], chances[:, :budget]
