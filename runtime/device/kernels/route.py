"""A router's norm, product and top-k, and the plan of what its choice needs: one launch.

Each program computes a few logits; the one that comes last ranks them all, and plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.linear import products_reference
from foreroute.runtime.device.kernels.miss import (
    LayerRule,
    RuledChoice,
    rule_arguments,
    rule_ids,
)
from foreroute.runtime.device.kernels.norm import (
    NORM_WARPS,
    Norm,
    columns_of,
    load_state,
    norm_scale,
    normed_reference,
)
from foreroute.runtime.device.kernels.plan import (
    no_plan,
    plan_arguments,
    plan_ids,
    plan_reference,
)
from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.device.kernels.top_k import (
    AT_ONCE,
    choose_experts,
    softmax_top_k_reference,
)
from foreroute.runtime.policies.eviction import ScoreRule

ROWS = 1  # fastest of those tried on an H100


@dataclass(frozen=True, kw_only=True)
class RouterProduct:
    """A router's weights, and what follows its product."""

    weight: Tensor
    """[E, D], contiguous."""
    bias: Tensor | None
    """[E]."""
    top_k: int
    renormalise: bool
    """Whether the K shares are scaled to sum to one."""
    dtype: torch.dtype
    """The type of the gate weights."""
    arrivals: Tensor
    """[1] int32, zero between launches: programs that have written their logits."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a router gives for a few tokens."""

    router_input: Tensor
    """[T, D], normed."""
    logits: Tensor
    """[T, E]."""
    gate_weights: Tensor
    """[T, K]; after a rule on a miss, of what runs."""
    expert_ids: Tensor
    """[T, K] int64, likewise."""
    chosen: Tensor
    """[T, K] int64, the router's own."""


@dataclass(frozen=True, kw_only=True)
class DemandPlan:
    """What is planned for the chosen experts; see `plan`."""

    tables: ResidencyTables
    rule: ScoreRule
    copies: Tensor
    """Written, [3, T * K] int32."""
    places: Tensor
    """Written, [2, T * K] int32."""
    expert_ids: Tensor | None = None
    """Planned for in place of the router's own choice, [T, K]; a replayed recording's."""
    on_miss: LayerRule | None = None
    """What is made of that choice before; not where another one is planned for."""


@triton.jit
def _route_kernel(
    state,
    factor,
    weight,
    bias,
    normed,
    logits,
    gates,
    ids,
    arrivals,
    depth,
    eps,
    expert_ids,
    slot_of,
    expert_in,
    score,
    is_unused_prefetch,
    step,
    counters,
    pending,
    pending_confidence,
    trust,
    driven_out,
    arrived,
    progress,
    rivals,
    shadows,
    lead,
    copies,
    places,
    num_experts,
    num_slots,
    decay,
    memory,
    credited,
    ranked,
    ruled,
    ruled_gates,
    selection_bias,
    judged,
    floor,
    allowed,
    is_first,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PLAN: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PADDED: tl.constexpr,
    RENORMALISE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_RECENCY: tl.constexpr,
    IS_PREFETCH: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    COPIERS: tl.constexpr,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_RULE: tl.constexpr,
    BONUS: tl.constexpr,
    IS_LEAVING: tl.constexpr,
    SHARE: tl.constexpr,
    MASS: tl.constexpr,
    HAS_BUDGET: tl.constexpr,
    REPLACES: tl.constexpr,
    KIND: tl.constexpr,
    RENORMALISES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    RANKED: tl.constexpr,
    RULED_TOKENS: tl.constexpr,
    RULED_K: tl.constexpr,
    RULED_PADDED: tl.constexpr,
):
    block, token, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_row = rows < num_experts
    where = weight + rows.to(tl.int64)[:, None] * depth + columns[None, :]
    # on its way while the norm is taken
    tile = tl.load(where, mask=is_row[:, None] & (columns < depth)[None, :], other=0.0)
    scale = 1.0
    if HAS_NORM:
        scale = norm_scale(state + token * depth, depth, eps, COLUMNS)
    own = tl.cdiv(depth, num_blocks)  # columns of the normed state that each program writes
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, depth, COLUMNS):
        here = start + columns
        if start > 0:
            mask = is_row[:, None] & (here < depth)[None, :]
            tile = tl.load(where + start, mask=mask, other=0.0)
        x = load_state(state + token * depth, factor, scale, here, here < depth, HAS_NORM)
        total += tl.sum(tile.to(tl.float32) * x[None, :], 1)
        if HAS_NORM:
            is_own = (here >= block * own) & (here < (block + 1) * own) & (here < depth)
            tl.store(normed + token * depth + here, x.to(normed.dtype.element_ty), mask=is_own)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)
    value = total.to(logits.dtype.element_ty)
    tl.store(logits + token * num_experts + rows, value, mask=is_row)
    tl.debug_barrier()  # every thread has written
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_blocks * TOKENS - 1:
        tl.store(arrivals, 0)
        at = tl.arange(0, K_PADDED)
        for one in tl.static_range(TOKENS):
            chosen, shares = choose_experts(
                logits + one * num_experts,
                num_experts,
                EXPERTS,
                TOP_K,
                K_PADDED,
                RENORMALISE,
                AT_ONCE,
            )
            tl.store(ids + one * TOP_K + at, chosen.to(tl.int64), mask=at < TOP_K)
            share = shares.to(gates.dtype.element_ty)
            tl.store(gates + one * TOP_K + at, share, mask=at < TOP_K)
        if HAS_RULE:
            tl.debug_barrier()  # the rule reads the ids
            rule_ids(
                logits,
                ids,
                gates,
                ranked,
                ruled,
                ruled_gates,
                selection_bias,
                slot_of,
                pending,
                judged,
                floor,
                allowed,
                is_first,
                num_experts,
                BONUS,
                IS_LEAVING,
                SHARE,
                MASS,
                HAS_BUDGET,
                REPLACES,
                KIND,
                RENORMALISES,
                SCALE,
                HAS_SELECTION_BIAS,
                WINDOW,
                RANKED,
                RULED_TOKENS,
                RULED_K,
                RULED_PADDED,
                EXPERTS,
            )
        if HAS_PLAN:
            tl.debug_barrier()  # the plan reads the ids
            plan_ids(
                expert_ids,
                slot_of,
                expert_in,
                score,
                is_unused_prefetch,
                step,
                counters,
                pending,
                pending_confidence,
                trust,
                driven_out,
                arrived,
                progress,
                rivals,
                shadows,
                lead,
                copies,
                places,
                num_experts,
                num_slots,
                decay,
                memory,
                credited,
                IS_RECENCY,
                IS_PREFETCH,
                HAS_PLACES,
                COPIERS,
                NUM_IDS,
                IDS,
                SLOTS,
                EXPERTS,
            )


def route(
    state: Tensor,
    router: RouterProduct,
    norm: Norm | None = None,
    demand: DemandPlan | None = None,
) -> Choice:
    """Choose experts by softmax and top-k of a product, and plan for them; one launch.

    Args:
        state: [T, D], contiguous; T is at most `MOST_TOKENS`.
        router: The product.
        norm: Taken of the state first.
        demand: What to plan; nothing if None.
    """
    (num_tokens, depth), num_experts = state.shape, len(router.weight)
    router_input = state if norm is None else torch.empty_like(state)
    logits = state.new_empty(num_tokens, num_experts)
    gates = state.new_empty(num_tokens, router.top_k, dtype=router.dtype)
    ids = torch.empty(num_tokens, router.top_k, dtype=torch.int64, device=state.device)
    ruled = None
    if demand is None:
        plan = no_plan(ids, num_experts)
    elif demand.on_miss is not None:
        ruled = RuledChoice.of(logits, ids, gates)
        plan = _plan_of(demand, ruled.expert_ids, credited=ids)
    else:
        plan = _plan_of(demand, ids if demand.expert_ids is None else demand.expert_ids)
    _route_kernel[(triton.cdiv(num_experts, ROWS), num_tokens)](
        state=state,
        factor=state if norm is None else norm.factor,
        weight=router.weight,
        bias=router.weight if router.bias is None else router.bias,
        normed=router_input,
        logits=logits,
        gates=gates,
        ids=ids,
        arrivals=router.arrivals,
        depth=depth,
        eps=0.0 if norm is None else norm.eps,
        HAS_NORM=norm is not None,
        HAS_BIAS=router.bias is not None,
        HAS_PLAN=demand is not None,
        TOP_K=router.top_k,
        K_PADDED=triton.next_power_of_2(router.top_k),
        RENORMALISE=router.renormalise,
        AT_ONCE=min(AT_ONCE, plan["EXPERTS"]),
        TOKENS=num_tokens,
        ROWS=ROWS,
        COLUMNS=columns_of(depth),
        num_warps=NORM_WARPS,
        **plan,
        **rule_arguments(None if demand is None else demand.on_miss, ruled),
    )
    return Choice(
        router_input=router_input,
        logits=logits,
        gate_weights=gates if ruled is None else ruled.gate_weights,
        expert_ids=ids if ruled is None else ruled.expert_ids,
        chosen=ids,
    )


def _plan_of(demand: DemandPlan, ids: Tensor, credited: Tensor | None = None) -> dict[str, Any]:
    places = demand.places
    return plan_arguments(
        ids, demand.tables, demand.rule, demand.copies, places=places, credited=credited
    )


def route_reference(
    state: Tensor,
    router: RouterProduct,
    norm: Norm | None = None,
    demand: DemandPlan | None = None,
) -> Choice:
    """What `route` does without a rule on a miss, in plain PyTorch."""
    state = state if norm is None else normed_reference(state, norm)
    biases = None if router.bias is None else [router.bias]
    logits = products_reference(state, [router.weight], biases)
    weights, ids = softmax_top_k_reference(
        logits.float(), router.top_k, renormalise=router.renormalise
    )
    if demand is not None:
        planned = ids if demand.expert_ids is None else demand.expert_ids
        plan_reference(planned, demand.tables, demand.rule, demand.copies, places=demand.places)
    return Choice(
        router_input=state,
        logits=logits,
        gate_weights=weights.to(router.dtype),
        expert_ids=ids,
        chosen=ids,
    )
