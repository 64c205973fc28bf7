"""Fits probabilities to predictions, on held-out sequences that nothing else is judged on."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.estimators.calibration import (
    NEAR_DECISION,
    Calibration,
    decision_margins,
    membership,
)

NUM_KNOTS = 64
TAIL = 1e-3
"""Share of margins, near the decision, that lies beyond each end of a table."""
METHODS = ("temperature", "isotonic")
"""What probabilities can be fitted by; each gives a table over the margin."""


class MarginHistogram:
    """How many experts had which margin, and how many of them were used, for P layer pairs.

    The bins are the knots of the tables fitted to it; they are laid out on the first batch.
    """

    def __init__(self, top_k: int) -> None:
        """Start at nothing; the first batch lays out the bins.

        Args:
            top_k: K.
        """
        self.top_k = top_k
        self.first_margin = self.knots_per_margin = torch.empty(0)  # [P]
        self.num_experts = self.num_used = torch.empty(0)  # [P, B]

    def update(self, scores: Tensor, true_ids: Tensor) -> None:
        """Count one batch.

        Args:
            scores: What experts are ranked by, [P, T, E], float.
            true_ids: Experts the routers chose, [P, T, K], integer.
        """
        margins = decision_margins(scores, self.top_k)
        if not self.first_margin.numel():
            self._lay_out(margins)
        first, scale = self.first_margin.view(-1, 1, 1), self.knots_per_margin.view(-1, 1, 1)
        knot = ((margins - first) * scale).round().clamp(0, NUM_KNOTS - 1).long().flatten(1)
        is_used = membership(true_ids, scores.shape[-1]).flatten(1).double()
        self.num_used.scatter_add_(1, knot, is_used)
        self.num_experts.scatter_add_(1, knot, torch.ones_like(is_used))

    def _lay_out(self, margins: Tensor) -> None:
        near = margins.topk(min(NEAR_DECISION * self.top_k, margins.shape[-1]), dim=-1).values
        ordered = near.flatten(1).sort(dim=1).values  # [P, N]
        tail = int(TAIL * ordered.shape[1])
        low, high = ordered[:, tail], ordered[:, -1 - tail]
        self.first_margin = low
        self.knots_per_margin = (NUM_KNOTS - 1) / (high - low).clamp(min=1e-6)
        self.num_experts = torch.zeros(
            len(low), NUM_KNOTS, dtype=torch.float64, device=margins.device
        )
        self.num_used = torch.zeros_like(self.num_experts)

    def fit(self, method: str) -> Calibration:
        """A table of probabilities for every pair.

        Args:
            method: One of `METHODS`.

        Raises:
            ValueError: If nothing was counted.
        """
        if not self.first_margin.numel():
            raise ValueError("No tokens to calibrate on.")
        steps = torch.arange(NUM_KNOTS, device=self.first_margin.device)
        knots = self.first_margin.unsqueeze(1) + steps / self.knots_per_margin.unsqueeze(1)
        solve = {"temperature": solve_temperature, "isotonic": solve_isotonic}[method]
        parts = zip(knots, self.num_experts, self.num_used, strict=True)
        table = torch.stack([solve(*(t.cpu() for t in part)) for part in parts])
        return Calibration(
            self.first_margin, self.knots_per_margin, table.clamp(0, 1).to(knots), self.top_k
        )


def solve_temperature(margins: Tensor, num_experts: Tensor, num_used: Tensor) -> Tensor:
    """Logistic regression on the margin: a temperature and a shift of the threshold.

    Args:
        margins: Of the knots, [B].
        num_experts: Experts counted at each, [B].
        num_used: How many of them were used, [B].

    Returns:
        Probability at each knot, [B], float32.
    """
    from sklearn.linear_model import LogisticRegression

    used, unused = num_used.clone(), num_experts - num_used
    used[-1] += 0.5  # so that there is a solution where all were used, or none
    unused[0] += 0.5
    column = margins.double().unsqueeze(1).numpy()
    features = [*column, *column]
    outcomes = [1] * len(column) + [0] * len(column)
    model = LogisticRegression(C=1e6).fit(features, outcomes, torch.cat([used, unused]).numpy())
    slope = max(float(model.coef_[0, 0]), 0.0)
    return (slope * margins + float(model.intercept_[0])).sigmoid().float()


def solve_isotonic(margins: Tensor, num_experts: Tensor, num_used: Tensor) -> Tensor:
    """The never falling table that is closest to what was counted; see `solve_temperature`."""
    from sklearn.isotonic import IsotonicRegression

    seen = num_experts > 0
    share = num_used[seen] / num_experts[seen]
    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    model.fit(margins[seen].numpy(), share.numpy(), num_experts[seen].numpy())
    fitted = torch.as_tensor(model.predict(margins.numpy())).float()
    return fitted.cummax(dim=0).values  # rounding may have made it fall
