"""What the routing of earlier tokens says of the next: priors for any predictor's scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PriorName = Literal["none", "previous-token", "decayed-frequency"]

HALF_LIFE_TOKENS = 20.0
"""After so many tokens a use counts half: the half-life of the runtime's default eviction."""
UNSEEN = 0.1
"""Uses that every expert is given, so that none has a logarithm of 0."""


def previous_token(previous_ids: Tensor, num_experts: int) -> Tensor:
    """Whether each expert was used by the token before, [P, T, E], float32.

    Args:
        previous_ids: Experts of the token before, [P, T, K], integer; below 0 where unknown.
        num_experts: E.
    """
    known = (previous_ids >= 0).float()
    empty = torch.zeros(*previous_ids.shape[:-1], num_experts, device=previous_ids.device)
    return empty.scatter_add_(-1, previous_ids.clamp(min=0), known)


def decayed_frequency(previous_ids: Tensor, starts: Tensor, num_experts: int) -> Tensor:
    """Logarithm of how often each expert was used before in the sequence, recent uses more.

    It is what the runtime's default eviction ranks experts by.

    Args:
        previous_ids: Experts of the token before, [P, T, K], integer; below 0 where unknown.
        starts: Whether each token is the first of its sequence, [T], bool.
        num_experts: E.

    Returns:
        [P, T, E], float32, of mean 0 over the experts.

    Example:
        >>> used = decayed_frequency(torch.tensor([[[-1], [1]]]), torch.tensor([True, False]), 2)
        >>> (used[0, 0] == 0).all() and used[0, 1, 1] > 0
        tensor(True)
    """
    uses = previous_token(previous_ids, num_experts).cpu()  # [P, T, E]
    decay = 0.5 ** (1 / HALF_LIFE_TOKENS)
    kept = torch.where(starts.cpu(), 0.0, decay).tolist()
    total = torch.zeros(uses.shape[0], num_experts)
    for token, factor in enumerate(kept):
        total = torch.add(uses[:, token], total, alpha=factor)
        uses[:, token] = total
    logs = uses.add_(UNSEEN).log_()
    return (logs - logs.mean(dim=-1, keepdim=True)).to(previous_ids.device)


def prior_scores(name: PriorName, previous_ids: Tensor, starts: Tensor, num_experts: int) -> Tensor:
    """One of the priors, [P, T, E], float32; arguments as `decayed_frequency` takes them.

    Raises:
        ValueError: If there is none of that name.
    """
    if name == "previous-token":
        return previous_token(previous_ids, num_experts)
    if name == "decayed-frequency":
        return decayed_frequency(previous_ids, starts, num_experts)
    raise ValueError(f"Unknown prior {name!r}; known: previous-token, decayed-frequency.")
