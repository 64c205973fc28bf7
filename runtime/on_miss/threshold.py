"""`threshold`: absent experts go, the lightest first, while they weigh little together."""

from __future__ import annotations

from torch import Tensor

from foreroute.runtime.on_miss.choice import is_before


def leave_within(shares: Tensor, may_go: Tensor, mass: float) -> Tensor:
    """Which experts go so that a token misses no more than a part of its gate weights.

    Args:
        shares: Parts of each token's gate weights, [T, K].
        may_go: [T, K] bool.
        mass: 0..1.

    Returns:
        [T, K] bool, never the heaviest.
    """
    before = is_before(shares)  # [T, K, K]
    not_heavier = ~before & may_go.unsqueeze(1)  # itself and all that come after
    together = (shares.unsqueeze(1) * not_heavier).sum(-1)
    return may_go & (together <= mass) & before.any(-1)
