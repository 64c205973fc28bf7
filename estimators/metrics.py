"""How good a prediction is: recall, gate-mass recall and exact sets, as sums that merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def recall_at_k(predicted_ids: Tensor, true_ids: Tensor) -> Tensor:
    """Share of the truly routed experts that were predicted, per token.

    Args:
        predicted_ids: Expert ids to prefetch, [tokens, budget], no repeats within a row.
        true_ids: Expert ids the router chose, [tokens, top_k].

    Returns:
        Recall in 0..1, [tokens], float32.

    Raises:
        ValueError: If the two disagree on the number of tokens.

    Example:
        >>> recall_at_k(torch.tensor([[3, 1]]), torch.tensor([[1, 2]]))
        tensor([0.5000])
    """
    return _is_predicted(predicted_ids, true_ids).float().mean(dim=-1)


def gate_mass_recall(predicted_ids: Tensor, true_ids: Tensor, gate_weights: Tensor) -> Tensor:
    """Share of the gate weight that fell on predicted experts, per token.

    Args:
        predicted_ids: Expert ids to prefetch, [tokens, budget], no repeats within a row.
        true_ids: Expert ids the router chose, [tokens, top_k].
        gate_weights: What each chosen expert's output was multiplied with, [tokens, top_k].

    Returns:
        Recall in 0..1, [tokens], float32.

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> gate_mass_recall(
        ...     torch.tensor([[3, 1]]), torch.tensor([[1, 2]]), torch.tensor([[0.75, 0.25]])
        ... )
        tensor([0.7500])
    """
    if gate_weights.shape != true_ids.shape:
        raise ValueError(
            f"Expected gate weights of the ids' shape {list(true_ids.shape)}, "
            f"got {list(gate_weights.shape)}."
        )
    weights = gate_weights.float()
    hit = (weights * _is_predicted(predicted_ids, true_ids)).sum(dim=-1)
    return hit / weights.sum(dim=-1)


def exact_set(predicted_ids: Tensor, true_ids: Tensor) -> Tensor:
    """Whether every truly routed expert was predicted, per token.

    Args:
        predicted_ids: Expert ids to prefetch, [tokens, budget], no repeats within a row.
        true_ids: Expert ids the router chose, [tokens, top_k].

    Returns:
        [tokens], bool.

    Raises:
        ValueError: If the two disagree on the number of tokens.

    Example:
        >>> exact_set(torch.tensor([[3, 1], [2, 1]]), torch.tensor([[1, 2], [1, 2]]))
        tensor([False,  True])
    """
    return _is_predicted(predicted_ids, true_ids).all(dim=-1)


def _is_predicted(predicted_ids: Tensor, true_ids: Tensor) -> Tensor:
    """Whether each true id is among the predicted ones, [tokens, top_k], bool."""
    if predicted_ids.shape[0] != true_ids.shape[0]:
        raise ValueError(
            f"Expected as many rows of predicted as of true ids, "
            f"got {predicted_ids.shape[0]} and {true_ids.shape[0]} tokens."
        )
    return (true_ids.unsqueeze(-1) == predicted_ids.unsqueeze(-2)).any(dim=-1)


def default_budgets(top_k: int, num_experts: int) -> tuple[int, ...]:
    """The budgets every report covers: 1, 1.5, 2 and 3 times top_k, rounded up, at most E.

    Example:
        >>> default_budgets(4, 32)
        (4, 6, 8, 12)
    """
    wanted = {math.ceil(top_k * factor) for factor in (1, 1.5, 2, 3)}
    return tuple(sorted(budget for budget in wanted if budget <= num_experts))


@dataclass(frozen=True, kw_only=True)
class RecallMetrics:
    """What one predictor reached on one set of tokens, per layer pair; means are over pairs."""

    recall_at_budgets: dict[int, list[float]]
    """Budget (experts per token and layer) to recall in 0..1 per pair; the smallest budget is K."""
    gate_mass_recall: list[float]
    """Recall weighted by gate weights at budget K, per pair."""
    exact_set: list[float]
    """Share of tokens with all K experts predicted at budget K, per pair."""

    @property
    def recall_at_k(self) -> list[float]:
        """Recall at budget K, per pair."""
        return self.recall_at_budgets[min(self.recall_at_budgets)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the means, and everything per layer under `per_layer`."""
        budgets = {str(budget): recall for budget, recall in self.recall_at_budgets.items()}
        flat = {
            name: getattr(self, name) for name in ("recall_at_k", "gate_mass_recall", "exact_set")
        }
        return {
            **{name: _mean(values) for name, values in flat.items()},
            "recall_at_budgets": {budget: _mean(values) for budget, values in budgets.items()},
            "per_layer": {**flat, "recall_at_budgets": budgets},
        }

    @classmethod
    def of_chance(
        cls, *, num_pairs: int, top_k: int, num_experts: int, budgets: tuple[int, ...]
    ) -> RecallMetrics:
        """What predicting uniformly random experts gives: the floor, exactly.

        Example:
            >>> RecallMetrics.of_chance(
            ...     num_pairs=1, top_k=1, num_experts=4, budgets=(1, 2)
            ... ).recall_at_budgets
            {1: [0.25], 2: [0.5]}
        """
        return cls(
            recall_at_budgets={m: [m / num_experts] * num_pairs for m in (top_k, *budgets)},
            gate_mass_recall=[top_k / num_experts] * num_pairs,
            exact_set=[1 / math.comb(num_experts, top_k)] * num_pairs,
        )


class RecallMeter:
    """Adds up recall over batches of tokens, for P layer pairs and all budgets in one topk.

    Args:
        num_pairs: P, layer pairs measured side by side.
        top_k: K, experts each token is routed to.
        budgets: Experts predicted per token and layer; K itself is always measured.
    """

    def __init__(self, num_pairs: int, top_k: int, budgets: tuple[int, ...] = ()) -> None:
        self.budgets = tuple(sorted({top_k, *budgets}))
        self.top_k = top_k
        self.num_tokens = 0
        # One row per budget, then gate mass and exact sets, [len(budgets) + 2, P].
        self._sums = torch.zeros(len(self.budgets) + 2, num_pairs, dtype=torch.float64)

    def update(self, scores: Tensor, true_ids: Tensor, gate_weights: Tensor) -> None:
        """Count one batch.

        Args:
            scores: Anything that ranks experts (logits, counts), [P, T, E], float.
            true_ids: Expert ids the routers chose, [P, T, K], integer.
            gate_weights: What each chosen expert's output was multiplied with, [P, T, K].
        """
        true_ids, gate_weights = true_ids.long(), gate_weights.float()
        share = gate_weights / gate_weights.sum(dim=-1, keepdim=True)
        ranked_ids = scores.topk(self.budgets[-1], dim=-1).indices  # [P, T, M]
        mass = torch.zeros_like(scores, dtype=torch.float32)  # [P, T, E]
        hits = mass.scatter(-1, true_ids, 1.0).gather(-1, ranked_ids).cumsum(dim=-1)  # [P, T, M]
        first = ranked_ids[..., : self.top_k]
        rows = [hits[..., budget - 1].sum(dim=-1) / self.top_k for budget in self.budgets]
        rows.append(mass.scatter(-1, true_ids, share).gather(-1, first).sum(dim=(-2, -1)))
        rows.append((hits[..., self.top_k - 1] == self.top_k).sum(dim=-1))
        self._sums += torch.stack([row.double() for row in rows]).cpu()
        self.num_tokens += scores.shape[-2]

    def merge(self, other: RecallMeter) -> None:
        """Add what another meter of the same layers and budgets counted."""
        self._sums += other._sums
        self.num_tokens += other.num_tokens

    def compute(self) -> RecallMetrics:
        """Averages over all tokens counted so far.

        Raises:
            ValueError: If no token was counted.
        """
        if self.num_tokens == 0:
            raise ValueError("No tokens were measured; recall needs at least one.")
        *recall, mass, exact = (self._sums / self.num_tokens).tolist()
        return RecallMetrics(
            recall_at_budgets=dict(zip(self.budgets, recall, strict=True)),
            gate_mass_recall=mass,
            exact_set=exact,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
