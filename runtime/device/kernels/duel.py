"""Eviction that adapts, on the device: shadow slots, who leads, and the scores that follow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.policies.duel import LEAST_LEAD, MOST_LEAD, Duel, Shadow

LEAST, MOST = map(tl.constexpr, (LEAST_LEAD, MOST_LEAD))


@triton.jit
def _shadow_hits(shadow, worth, in_use, num_experts, num_slots, EXPERTS: tl.constexpr):
    """`Shadow.demand` of the experts in use, [E] each."""
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < num_experts
    is_there = tl.load(shadow + experts, mask=is_expert, other=0)
    hits = tl.sum(is_there * in_use, 0)
    is_there = tl.maximum(is_there, in_use)
    others = tl.sum((is_there > in_use).to(tl.int32), 0)
    to_go = tl.minimum(tl.sum(is_there, 0) - num_slots, others)
    while to_go > 0:
        least = tl.argmin(tl.where(is_there > in_use, worth, float("inf")), 0)
        is_there = tl.where(experts == least, 0, is_there)
        to_go -= 1
    tl.store(shadow + experts, is_there, mask=is_expert)
    return hits


@triton.jit
def compete(  # noqa: ANN201
    score,
    rivals,
    shadows,
    lead,
    ahead,
    in_use,
    now,
    decay,
    num_experts,
    num_slots,
    EXPERTS: tl.constexpr,
):
    """Count a step in both rivals, and in the lead; score experts by the one that leads.

    Args:
        score: Of the layer, written.
        rivals: See `ResidencyTables`; so are `shadows` and `lead`.
        shadows: None where the layer has none.
        lead: Written where there are shadows.
        ahead: What it was.
        in_use: 1 for each expert in use, [E].
        now: The step's number.
        decay: Of frequency.
        num_experts: E.
        num_slots: S.
        EXPERTS: E, rounded up to a power of two.
    """
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < num_experts
    frequency = tl.load(rivals + experts, mask=is_expert, other=0.0)
    used_at = tl.load(rivals + num_experts + experts, mask=is_expert, other=0.0)
    if shadows is not None:
        frequent = _shadow_hits(shadows, frequency, in_use, num_experts, num_slots, EXPERTS)
        recent = _shadow_hits(
            shadows + num_experts, used_at, in_use, num_experts, num_slots, EXPERTS
        )
        ahead = tl.minimum(MOST, tl.maximum(-MOST, ahead + recent - frequent))
        tl.store(lead, ahead)
    frequency = frequency * decay + in_use.to(tl.float32)
    used_at = tl.where(in_use == 1, now.to(tl.float32), used_at)
    tl.store(rivals + experts, frequency, mask=is_expert)
    tl.store(rivals + num_experts + experts, used_at, mask=is_expert)
    tl.store(score + experts, tl.where(ahead >= LEAST, used_at, frequency), mask=is_expert)


def compete_reference(tables: ResidencyTables, named: Tensor, decay: float) -> None:
    """What `compete` does, in plain Python, for the experts in use, [N] distinct."""
    assert tables.rivals is not None
    assert tables.lead is not None
    frequency, used_at = tables.rivals
    if tables.shadows is not None:
        duel, ids, hits = Duel(int(tables.lead)), named.tolist(), []
        for there, worth in zip(tables.shadows, tables.rivals, strict=True):
            shadow = Shadow(len(tables.expert_in))
            shadow.experts = set(there.nonzero().flatten().tolist())
            hits.append(shadow.demand(ids, worth.tolist()))
            there.zero_()
            there[sorted(shadow.experts)] = 1
        duel.count(recency_hits=hits[1], frequency_hits=hits[0])
        tables.lead.fill_(duel.lead)
    frequency *= decay
    frequency[named] += 1
    used_at[named] = float(tables.step)
    follow_lead(tables)


def follow_lead(tables: ResidencyTables) -> None:
    """Score experts by the rival that leads; no sync."""
    assert tables.rivals is not None
    assert tables.lead is not None
    frequency, used_at = tables.rivals
    torch.where(tables.lead >= LEAST_LEAD, used_at, frequency, out=tables.score)


def fill_shadows(tables: ResidencyTables) -> None:
    """Make resident in each shadow what its rival finds worth most, none never used; no sync."""
    if tables.shadows is None:
        return
    assert tables.rivals is not None
    order = tables.rivals.argsort(dim=1, descending=True, stable=True)
    best = order[:, : len(tables.expert_in)]
    is_used = (tables.rivals.gather(1, best) > 0).to(tables.shadows.dtype)
    tables.shadows.zero_().scatter_(1, best, is_used)
