"""Rules on a miss on the device: what runs in the place of a router's choice, before the plan.

The same steps as `on_miss.decide`, which is the reference; no launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.on_miss import MissRule
from foreroute.runtime.on_miss.agreement import WINDOW_LAYER_STEPS
from foreroute.runtime.on_miss.choice import Gates

AGREED, CHOSEN, RECENTLY_AGREED, RECENTLY_CHOSEN, LAYER_STEPS, IS_CLOSED, SPENT, BEHIND = range(8)
NUM_JUDGED = 8
AT_CHOSEN, AT_RECENTLY_AGREED, AT_RECENTLY_CHOSEN, AT_LAYER_STEPS, AT_CLOSED, AT_SPENT = map(
    tl.constexpr, (CHOSEN, RECENTLY_AGREED, RECENTLY_CHOSEN, LAYER_STEPS, IS_CLOSED, SPENT)
)
"""Where a kernel finds them; the agreed ones come first."""
SCORES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
SMALLEST = tl.constexpr(1e-20)


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """A rule on a miss, for one layer on the device."""

    rule: MissRule
    """What to do; what it runs of predictions comes with each choice."""
    gates: Gates
    """How the layer's router weighs experts; its selection bias float32, on the device."""
    judged: Tensor
    """[8] int32, shared by all layers: of the router's experts, how many ran and how many there
    were; the same of the window at hand, and its layer steps; whether agreement fell under the
    floor; experts copied in this step; experts copied behind their layers (`behind.py`)."""
    floor: float
    """Least share of agreement over a window."""
    allowed: float
    """Experts that a token may have copied when this layer is done; read under a budget alone."""
    is_first: bool
    """Whether no earlier layer of a decode step has a rule."""


@dataclass(frozen=True, kw_only=True)
class RuledChoice:
    """A router's choice before and after a rule."""

    logits: Tensor
    """[T, E], contiguous: what experts are ranked and weighed by that the router did not choose."""
    chosen: Tensor
    """[T, K] int64, the router's experts; they are credited."""
    given: Tensor
    """[T, K], its gate weights."""
    expert_ids: Tensor
    """Written, [T, K] int64: what runs, every one to be resident."""
    gate_weights: Tensor
    """Written, [T, K], in the type of the router's."""
    ranked: Tensor | None = None
    """Predicted experts, most likely first, [T, at least K] int64, contiguous; they are wanted in
    place of the router's."""

    @classmethod
    def of(
        cls, logits: Tensor, chosen: Tensor, given: Tensor, ranked: Tensor | None = None
    ) -> RuledChoice:
        """A choice to decide on, with room for what comes of it.

        Args:
            logits: [T, E]; as predicted, where those are to weigh predicted experts.
            chosen: [T, K] int64.
            given: [T, K].
            ranked: [T, at least K] int64, where a rule runs predicted experts.
        """
        chosen = chosen.contiguous()
        return cls(
            logits=logits.contiguous(),
            chosen=chosen,
            given=given.contiguous(),
            expert_ids=torch.empty_like(chosen),
            gate_weights=torch.empty_like(given, memory_format=torch.contiguous_format),
            ranked=None if ranked is None else ranked.contiguous(),
        )


@triton.jit
def _scores(row, is_expert, KIND: tl.constexpr):
    """What a gate family makes of a token's logits, [EXPERTS] float32; 0 beyond the experts."""
    if KIND == 0:
        share = tl.where(is_expert, tl.exp(row - tl.max(row, 0)), 0.0)
        return share / tl.sum(share, 0)
    if KIND == 1:
        return tl.where(is_expert, 1.0 / (1.0 + tl.exp(-row)), 0.0)
    soft = tl.where(row > 20.0, row, tl.log(1.0 + tl.exp(tl.minimum(row, 20.0))))
    return tl.where(is_expert, tl.sqrt(soft), 0.0)


@triton.jit
def _of(values, ids, experts):
    """A value per expert, [EXPERTS], looked up for ids, [K_PADDED]."""
    return tl.sum(tl.where(ids[:, None] == experts[None, :], values[None, :], 0.0), 1)


@triton.jit
def _gate_weights(scores, ids, experts, RENORMALISE: tl.constexpr, SCALE: tl.constexpr):
    """`Gates.weights` of ids, [K_PADDED] float32; -1 stands for none."""
    weights = _of(scores, ids, experts)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, 0), SMALLEST)
    return weights * SCALE


@triton.jit
def _choose_with_bonus(
    true, ranking, here, is_expert, experts, at, BONUS: tl.constexpr, TOP_K: tl.constexpr
):
    """`choose_with_bonus` for one token, [K_PADDED] int32."""
    chosen = tl.max((true[:, None] == experts[None, :]).to(tl.int32), 0)
    high = tl.max(tl.where(is_expert, ranking, float("-inf")), 0)
    low = tl.min(tl.where(is_expert, ranking, float("inf")), 0)
    raised = ranking + BONUS * (high - low) * here.to(tl.float32)
    raised = tl.where(((chosen == 1) | here) & is_expert, raised, float("-inf"))
    picks, num_new = true, 0
    for place in tl.static_range(TOP_K):
        pick = tl.argmax(raised, 0)
        picks = tl.where(at == place, pick, picks)
        num_new += tl.sum(tl.where(experts == pick, 1 - chosen, 0), 0)
        raised = tl.where(experts == pick, float("-inf"), raised)
    return tl.where(num_new > 0, picks, true)


@triton.jit
def rule_ids(  # noqa: ANN201
    logits,
    chosen,
    given,
    ranked,
    ids,
    gates,
    selection_bias,
    slot_of,
    pending,
    judged,
    floor,
    allowed,
    is_first,
    num_experts,
    BONUS: tl.constexpr,
    IS_LEAVING: tl.constexpr,
    SHARE: tl.constexpr,
    MASS: tl.constexpr,
    HAS_BUDGET: tl.constexpr,
    REPLACES: tl.constexpr,
    KIND: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    RANKED: tl.constexpr,
    TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """What `decide` does for a few tokens, inside the one program that plans for them."""
    experts, at = tl.arange(0, EXPERTS), tl.arange(0, K_PADDED)
    is_expert, is_id = experts < num_experts, at < TOP_K
    here = tl.load(slot_of + experts, mask=is_expert, other=-1) >= 0
    here = here & (experts != tl.load(pending))  # a head alone is not an expert
    is_open = tl.load(judged + AT_CLOSED) == 0
    spent = tl.where(is_first != 0, 0, tl.load(judged + AT_SPENT))
    allowance = 0
    if HAS_BUDGET:
        room = allowed - spent.to(tl.float32) / TOKENS + 1e-6
        allowance = tl.maximum(room, 0.0).to(tl.int32)
    num_agreed = 0
    copied = tl.zeros([EXPERTS], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        where = token * TOP_K + at
        # not from a core's own cache: other programs of the same launch may have written them
        row = tl.load(
            logits + token * num_experts + experts,
            mask=is_expert,
            other=float("-inf"),
            cache_modifier=".cg",
        ).to(tl.float32)
        true = tl.load(chosen + where, mask=is_id, other=-1).to(tl.int32)
        own = tl.load(given + where, mask=is_id, other=0.0).to(tl.float32)
        scores = tl.zeros([EXPERTS], dtype=tl.float32)
        ranking = row
        if (BONUS > 0) | REPLACES | (RANKED > 0):
            scores = _scores(row, is_expert, KIND)
        if HAS_SELECTION_BIAS:
            ranking = scores + tl.load(selection_bias + experts, mask=is_expert, other=0.0)
        wanted, weights = true, own
        if RANKED > 0:
            wanted = tl.load(ranked + token * RANKED + at, mask=is_id, other=-1).to(tl.int32)
            made = _gate_weights(scores, wanted, experts, RENORMALISE, SCALE)
            weights = made.to(gates.dtype.element_ty).to(tl.float32)
        asked, asked_weights = wanted, weights
        if BONUS > 0:
            wanted = _choose_with_bonus(true, ranking, here, is_expert, experts, at, BONUS, TOP_K)
            is_other = tl.max((wanted != true).to(tl.int32), 0) > 0
            made = _gate_weights(scores, wanted, experts, RENORMALISE, SCALE)
            made = made.to(gates.dtype.element_ty).to(tl.float32)
            weights = tl.where(is_other, made, own)
        shares = weights / tl.maximum(tl.sum(weights, 0), SMALLEST)
        # [i, j]: whether j comes before i, heaviest first
        before = (shares[None, :] > shares[:, None]) | (
            (shares[None, :] == shares[:, None]) & (at[None, :] < at[:, None])
        )
        before = before & is_id[None, :] & is_id[:, None]
        is_behind = tl.sum(before.to(tl.int32), 1) > 0
        is_absent = is_id & (_of(here.to(tl.float32), wanted, experts) == 0)
        left = at < 0  # none
        if IS_LEAVING:
            left = is_absent
            if HAS_BUDGET:
                rank = tl.sum((before & is_absent[None, :]).to(tl.int32), 1)
                left = left & (rank >= allowance)
            if not (REPLACES | (SHARE > 0) | (MASS > 0)):  # it waits for one where none is there
                has_none = tl.sum(is_absent.to(tl.int32), 0) == TOP_K
                left = left & ((has_none == 0) | is_behind)
            if SHARE > 0:
                left = left & (shares < SHARE) & is_behind
            if MASS > 0:
                after = (before == 0) & left[None, :]
                together = tl.sum(tl.where(after, shares[None, :], 0.0), 1)
                left = left & (together <= MASS) & is_behind
        runs = is_id
        run = wanted
        if REPLACES:
            is_wanted = tl.max((wanted[:, None] == experts[None, :]).to(tl.int32), 0)
            free = tl.where(here & is_expert & (is_wanted == 0), ranking, float("-inf"))
            num_free = tl.sum((free > float("-inf")).to(tl.int32), 0)
            rank = tl.sum((before & left[None, :]).to(tl.int32), 1)
            rank = tl.where(left & (rank < num_free), rank, TOP_K)
            for place in tl.static_range(TOP_K):
                best = tl.argmax(free, 0)
                run = tl.where(rank == place, best, run)
                free = tl.where(experts == best, float("-inf"), free)
            is_other = tl.max((run != asked).to(tl.int32), 0) > 0
            made = _gate_weights(scores, run, experts, RENORMALISE, SCALE)
            weights = tl.where(is_other, made, asked_weights)
        elif IS_LEAVING:
            runs = is_id & (left == 0)
            best = tl.argmax(tl.where(runs, weights, -1.0), 0)
            run = tl.where(left, tl.sum(tl.where(at == best, wanted, 0), 0), wanted)
            kept = tl.where(runs, weights, 0.0)
            if RENORMALISE:
                kept = kept * (tl.sum(weights, 0) / tl.maximum(tl.sum(kept, 0), SMALLEST))
            weights = tl.where(tl.max(left.to(tl.int32), 0) > 0, kept, weights)
        run = tl.where(is_open, run, true)
        weights = tl.where(is_open, weights, own)
        tl.store(ids + where, run.to(tl.int64), mask=is_id)
        tl.store(gates + where, weights.to(gates.dtype.element_ty), mask=is_id)
        is_same = (true[:, None] == run[None, :]) & runs[None, :] & is_id[:, None]
        num_agreed += tl.sum(tl.max(is_same.to(tl.int32), 1), 0)
        is_run = tl.max(((run[:, None] == experts[None, :]) & is_id[:, None]).to(tl.int32), 0)
        copied = tl.maximum(copied, tl.where(here, 0, is_run))
    tl.store(judged + AT_SPENT, spent + tl.sum(copied, 0))
    if is_open:
        num_chosen: tl.constexpr = TOKENS * TOP_K
        tl.store(judged, tl.load(judged) + num_agreed)
        tl.store(judged + AT_CHOSEN, tl.load(judged + AT_CHOSEN) + num_chosen)
        steps = tl.load(judged + AT_LAYER_STEPS) + 1
        is_new = steps == 1  # a window begins
        agreed = tl.where(is_new, 0, tl.load(judged + AT_RECENTLY_AGREED)) + num_agreed
        total = tl.where(is_new, 0, tl.load(judged + AT_RECENTLY_CHOSEN)) + num_chosen
        tl.store(judged + AT_RECENTLY_AGREED, agreed)
        tl.store(judged + AT_RECENTLY_CHOSEN, total)
        is_over = steps == WINDOW
        is_low = agreed.to(tl.float32) < floor * total.to(tl.float32)
        tl.store(judged + AT_CLOSED, (is_over & is_low).to(tl.int32))
        tl.store(judged + AT_LAYER_STEPS, tl.where(is_over, 0, steps))


def rule_arguments(layer: LayerRule | None, choice: RuledChoice | None) -> dict[str, Any]:
    """What a kernel that calls `rule_ids` takes besides the router's choice.

    Args:
        layer: The rule; None to do as the router says, which compiles to nothing.
        choice: What it decides on, and writes.
    """
    if layer is None or choice is None:
        return dict.fromkeys(_TENSORS) | {"HAS_RULE": False} | dict.fromkeys(_CONSTANTS, 0)
    rule, gates = layer.rule, layer.gates
    (num_tokens, top_k), kind = choice.chosen.shape, gates.family.scores
    ranked, ids, weights = choice.ranked, choice.expert_ids, choice.gate_weights
    tensors = (ranked, ids, weights, gates.selection_bias, layer.judged)
    numbers = (layer.floor, layer.allowed, int(layer.is_first))
    constants = (
        rule.bonus,
        rule.is_leaving,
        0.0 if rule.share is None else rule.share / top_k,
        rule.mass or 0.0,
        rule.has_budget,
        rule.is_replacing,
        SCORES[kind] if kind else 0,
        gates.family.is_renormalised,
        gates.scale,
        gates.selection_bias is not None,
        WINDOW_LAYER_STEPS,
        0 if ranked is None else ranked.shape[1],
        num_tokens,
        top_k,
        triton.next_power_of_2(top_k),
    )
    return {
        **dict(zip(_TENSORS, (*tensors, *numbers), strict=True)),
        "HAS_RULE": True,
        **dict(zip(_CONSTANTS, constants, strict=True)),
    }


_TENSORS = (
    "ranked",
    "ruled",
    "ruled_gates",
    "selection_bias",
    "judged",
    "floor",
    "allowed",
    "is_first",
)
_CONSTANTS = (
    "BONUS",
    "IS_LEAVING",
    "SHARE",
    "MASS",
    "HAS_BUDGET",
    "REPLACES",
    "KIND",
    "RENORMALISES",
    "SCALE",
    "HAS_SELECTION_BIAS",
    "WINDOW",
    "RANKED",
    "RULED_TOKENS",
    "RULED_K",
    "RULED_PADDED",
)
