"""What predictions cost under the runtime's rule of prefetching, in copies of one expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FetchCosts:
    """What one prefetch gains if it is right and loses if it is wrong, in copies of one expert.

    An absent expert is prefetched when `probability * saved > (1 - probability) * delay`, the
    comparison that `PrefetchRule.is_worth` makes in the runtime. Which experts are absent depends
    on the cache, not on the estimator: every expert is counted as if it were.
    """

    saved: float = 1.0
    """Share of a copy that a prefetch in time hides: 1 where a whole copy fits the window."""
    delay: float = 1.0
    """Link time that a wrong guess takes from a copy in demand, with what it evicts."""

    def __post_init__(self) -> None:
        """Check both numbers.

        Raises:
            ValueError: If one is not above 0.
        """
        if min(self.saved, self.delay) <= 0:
            raise ValueError(
                f"saved and delay must be above 0 copies, not {self.saved} and {self.delay}."
            )

    @property
    def least_probability(self) -> float:
        """Above it, a prefetch pays."""
        return self.delay / (self.saved + self.delay)


def expected_cost(probabilities: Tensor, is_true: Tensor, costs: FetchCosts) -> Tensor:
    """Stall that was not saved, and delay by what was fetched for nothing.

    Args:
        probabilities: Of each expert to be used, [..., E], float.
        is_true: Whether it was, [..., E], bool.
        costs: What a prefetch gains and loses.

    Returns:
        Cost of each token, [...], float32, in copies of one expert; without any prefetch it is
        K times `costs.saved`, with perfect prediction 0.

    Example:
        >>> expected_cost(
        ...     torch.tensor([0.9, 0.6, 0.2]), torch.tensor([True, False, True]), FetchCosts()
        ... )
        tensor(2.)
    """
    is_fetched = probabilities > costs.least_probability
    missed = (is_true & ~is_fetched).sum(dim=-1)
    wasted = (is_fetched & ~is_true).sum(dim=-1)
    return torch.add(costs.saved * missed.float(), wasted.float(), alpha=costs.delay)
