"""`substitute`: the best resident experts, by the live router's scores, take absent ones' place."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.runtime.on_miss.choice import RouterChoice, is_before


def leave_light(shares: Tensor, is_absent: Tensor, share: float) -> Tensor:
    """Which absent experts weigh too little to be waited for.

    Args:
        shares: Parts of each token's gate weights, [T, K].
        is_absent: [T, K] bool.
        share: F: those under F / K may go, but never the heaviest.

    Returns:
        [T, K] bool.
    """
    is_light = shares < share / shares.shape[-1]
    return is_absent & is_light & is_before(shares).any(-1)


def with_substitutes(
    choice: RouterChoice, expert_ids: Tensor, shares: Tensor, is_left: Tensor, is_here: Tensor
) -> Tensor:
    """Ids in which residents take the place of those left: the heaviest gets the best.

    Args:
        choice: The router's.
        expert_ids: What is wanted, [T, K].
        shares: Parts of each token's gate weights, [T, K].
        is_left: [T, K] bool.
        is_here: [E] bool.

    Returns:
        [T, K]; an expert stays where no resident is left to replace it.
    """
    ranking = choice.gates.ranking(choice.logits)  # [T, E]
    free = ranking.masked_fill(~is_here, -torch.inf).scatter(1, expert_ids, -torch.inf)
    count = min(expert_ids.shape[-1], free.shape[-1])
    best = free.topk(count, dim=-1)
    place = (is_before(shares) & is_left.unsqueeze(1)).sum(-1).clamp_max(count - 1)  # [T, K]
    is_there = best.values.gather(1, place) > -torch.inf
    return torch.where(is_left & is_there, best.indices.gather(1, place), expert_ids)
