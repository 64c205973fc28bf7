"""What a rule makes of a router's choice, in plain PyTorch: the reference of `kernels/miss.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.runtime.on_miss.bonus import choose_with_bonus
from foreroute.runtime.on_miss.budget import leave_after
from foreroute.runtime.on_miss.choice import RouterChoice, Ruling, shares_of
from foreroute.runtime.on_miss.rule import MissRule
from foreroute.runtime.on_miss.skip import leave_absent, with_stand_ins, without_left
from foreroute.runtime.on_miss.substitute import leave_light, with_substitutes
from foreroute.runtime.on_miss.threshold import leave_within


def decide(rule: MissRule, choice: RouterChoice, is_here: Tensor, allowance: int = 0) -> Ruling:
    """Apply a rule to a few tokens.

    Tokens are decided one by one. Where a rule changes nothing, ids and gate weights are the
    router's own to the bit.

    Args:
        rule: The rule.
        choice: The router's, or `predicted_choice`.
        is_here: Which experts are resident, [E] bool.
        allowance: Experts that each token may fetch; only for rules with a budget.
    """
    ids, weights = choice.expert_ids, choice.gate_weights
    if rule.bonus:
        ids = choose_with_bonus(choice, is_here, rule.bonus)
        weights = _weights(choice, ids)
    is_left = _left(rule, weights, ~is_here[ids], allowance)
    if rule.is_replacing:
        ids = with_substitutes(choice, ids, shares_of(weights), is_left, is_here)
        everything = torch.ones_like(is_left)
        return Ruling(expert_ids=ids, gate_weights=_weights(choice, ids), is_run=everything)
    if not rule.is_leaving:
        return Ruling(expert_ids=ids, gate_weights=weights, is_run=~is_left)
    return Ruling(
        expert_ids=with_stand_ins(ids, weights, is_left),
        gate_weights=without_left(weights, ~is_left, choice.gates.family),
        is_run=~is_left,
    )


def _left(rule: MissRule, weights: Tensor, is_absent: Tensor, allowance: int) -> Tensor:
    """Which absent experts nobody waits for, [T, K] bool."""
    if not rule.is_leaving:
        return torch.zeros_like(is_absent)
    shares = shares_of(weights)
    if rule.has_budget:
        is_left = leave_after(shares, is_absent, allowance)
        return is_left if rule.is_replacing else leave_absent(shares, is_absent) & is_left
    if rule.waits_for_none:
        return leave_absent(shares, is_absent)
    may_go = is_absent
    if rule.share is not None:
        may_go = leave_light(shares, may_go, rule.share)
    return may_go if rule.mass is None else leave_within(shares, may_go, rule.mass)


def _weights(choice: RouterChoice, ids: Tensor) -> Tensor:
    """The gate weights of these experts; the router's own for tokens whose experts are its own."""
    own = choice.gate_weights
    is_changed = (ids != choice.expert_ids).any(-1, keepdim=True)
    return torch.where(is_changed, choice.gates.weights(choice.logits, ids).to(own.dtype), own)
