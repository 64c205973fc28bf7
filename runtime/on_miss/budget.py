"""`budget`: a token's copies are limited; the heaviest of a layer's absent experts come first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foreroute.runtime.on_miss.choice import is_before


def leave_after(shares: Tensor, is_absent: Tensor, allowance: int) -> Tensor:
    """Which absent experts are not fetched because heavier ones are.

    Args:
        shares: Parts of each token's gate weights, [T, K].
        is_absent: [T, K] bool.
        allowance: Experts that each token may fetch.

    Returns:
        [T, K] bool.
    """
    rank = (is_before(shares) & is_absent.unsqueeze(1)).sum(-1)
    return is_absent & (rank >= allowance)


@dataclass
class Allowance:
    """A token's budget, spread over the layers: what early ones leave, later ones may spend."""

    per_token: float
    """Experts."""
    num_layers: int
    """L."""
    spent: int = 0
    """Experts fetched in this step so far, by all tokens."""

    def begin_step(self) -> None:
        """A decode step begins."""
        self.spent = 0

    def at(self, place: int, num_tokens: int) -> int:
        """Experts that each token may fetch.

        Args:
            place: The layer's among the MoE layers, 0..L-1.
            num_tokens: Tokens of the step.
        """
        so_far = self.per_token * (place + 1) / self.num_layers
        return max(0, int(so_far - self.spent / num_tokens + 1e-6))
