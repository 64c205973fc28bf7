"""`bonus`: residents rank higher than their scores, so that the router chooses more of them."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.runtime.on_miss.choice import RouterChoice


def choose_with_bonus(choice: RouterChoice, is_here: Tensor, bonus: float) -> Tensor:
    """The experts a router would choose if residents scored more.

    Args:
        choice: The router's.
        is_here: [E] bool.
        bonus: Share of the range of the token's scores that residents get on top.

    Returns:
        [T, K], int64; the router's own ids, in its order, where the same experts are chosen.
    """
    ranking = choice.gates.ranking(choice.logits)  # [T, E]
    spread = ranking.amax(-1, keepdim=True) - ranking.amin(-1, keepdim=True)
    chosen = torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, choice.expert_ids, True)
    # an absent expert that the router did not choose cannot overtake one that it did
    raised = (ranking + bonus * spread * is_here).masked_fill(~(chosen | is_here), -torch.inf)
    ids = raised.topk(choice.expert_ids.shape[-1], dim=-1).indices
    is_same = chosen.gather(1, ids).all(-1, keepdim=True)
    return torch.where(is_same, choice.expert_ids, ids)
