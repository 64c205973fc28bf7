"""`skip`: absent experts are left out."""

from __future__ import annotations

from torch import Tensor

from foreroute.estimators.selection import SMALLEST_WEIGHT
from foreroute.estimators.types import GateFamily
from foreroute.runtime.on_miss.choice import heaviest


def leave_absent(gate_weights: Tensor, is_absent: Tensor) -> Tensor:
    """Which experts are left out where nobody waits: a token of which none is there waits for one.

    Args:
        gate_weights: [T, K].
        is_absent: [T, K] bool.

    Returns:
        [T, K] bool.
    """
    has_none = is_absent.all(-1, keepdim=True)
    return is_absent & ~(has_none & heaviest(gate_weights))


def with_stand_ins(expert_ids: Tensor, gate_weights: Tensor, is_left: Tensor) -> Tensor:
    """Ids in which another expert of the token stands for those left out.

    Args:
        expert_ids: [T, K].
        gate_weights: [T, K].
        is_left: [T, K] bool, not all of a token's.

    Returns:
        [T, K]: for each one left out, the heaviest that is not.
    """
    best = gate_weights.masked_fill(is_left, -1.0).argmax(-1, keepdim=True)
    return expert_ids.where(~is_left, expert_ids.gather(1, best))


def without_left(gate_weights: Tensor, is_run: Tensor, family: GateFamily) -> Tensor:
    """Gate weights when some experts are left out.

    Models that renormalise their gate weights get the same sum as before; others keep the rest as
    it is (renormalising them multiplies the error).

    Args:
        gate_weights: [T, K].
        is_run: [T, K] bool.
        family: How this model derives gate weights.

    Returns:
        [T, K], zero where left out.
    """
    weights = gate_weights.float()
    kept = weights * is_run
    if family.is_renormalised:
        before, after = weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        kept = kept * (before / after.clamp_min(SMALLEST_WEIGHT))
    return kept.to(gate_weights.dtype)
