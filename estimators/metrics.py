"""How good a prediction is: recall, gate-mass recall and exact sets, as sums that merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

RESAMPLES = 2000
"""Draws behind a confidence interval."""


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


def first_ranked(scores: Tensor, budget: int) -> Tensor:
    """The experts with the highest scores; of equal ones, those with the lower ids.

    `topk` may choose others among equals for another budget, or on another device.

    Args:
        scores: [..., E], float.
        budget: M, at most E.

    Returns:
        Expert ids in order of rank, [..., M], int64.

    Example:
        >>> first_ranked(torch.tensor([0.0, 2.0, 2.0, -0.0]), budget=3)
        tensor([1, 2, 0])
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :budget]


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


@dataclass(frozen=True, kw_only=True)
class RecallIntervals:
    """Where the means over layer pairs lie, lower and upper end each, 0..1."""

    recall_at_budgets: dict[int, tuple[float, float]]
    """By budget (experts per token and layer)."""
    gate_mass_recall: tuple[float, float]
    """At budget K."""
    exact_set: tuple[float, float]
    """At budget K."""

    @property
    def recall_at_k(self) -> tuple[float, float]:
        """The interval at budget K, the least that is measured."""
        return self.recall_at_budgets[min(self.recall_at_budgets)]


class RecallMeter:
    """Adds up recall over batches of tokens, for P layer pairs and all budgets in one topk."""

    def __init__(self, num_pairs: int, top_k: int, budgets: tuple[int, ...] = ()) -> None:
        """Start at nothing.

        Args:
            num_pairs: P, layer pairs measured side by side.
            top_k: K, experts each token is routed to.
            budgets: Experts predicted per token and layer; K itself is always measured.
        """
        self.budgets = tuple(sorted({top_k, *budgets}))
        self.top_k = top_k
        # One row per budget, then gate mass and exact sets, for each of S sequences, [R, P, S].
        self._sums = torch.zeros(len(self.budgets) + 2, num_pairs, 0, dtype=torch.float64)
        self._tokens = torch.zeros(0, dtype=torch.float64)  # [S]

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far."""
        return int(self._tokens.sum())

    @property
    def num_sequences(self) -> int:
        """Sequences counted so far: one, unless `update` was told where they start."""
        return len(self._tokens)

    def update(
        self, scores: Tensor, true_ids: Tensor, gate_weights: Tensor, starts: Tensor | None = None
    ) -> None:
        """Count one batch.

        Args:
            scores: Anything that ranks experts (logits, counts), [P, T, E], float.
            true_ids: Expert ids the routers chose, [P, T, K], integer.
            gate_weights: What each chosen expert's output was multiplied with, [P, T, K].
            starts: Whether each token is the first of its sequence, [T], bool; a sequence may go
                on in the next batch. Without, all tokens belong to the sequence counted last.
        """
        true_ids, gate_weights = true_ids.long(), gate_weights.float()
        share = gate_weights / gate_weights.sum(dim=-1, keepdim=True)
        ranked_ids = first_ranked(scores, self.budgets[-1])  # [P, T, M]
        mass = torch.zeros_like(scores, dtype=torch.float32)  # [P, T, E]
        hits = mass.scatter(-1, true_ids, 1.0).gather(-1, ranked_ids).cumsum(dim=-1)  # [P, T, M]
        first = ranked_ids[..., : self.top_k]
        rows = [hits[..., budget - 1] / self.top_k for budget in self.budgets]
        rows.append(mass.scatter(-1, true_ids, share).gather(-1, first).sum(dim=-1))
        rows.append((hits[..., self.top_k - 1] == self.top_k).float())
        self._add(torch.stack(rows), starts)

    def _add(self, values: Tensor, starts: Tensor | None) -> None:
        """Add values of tokens, [R, P, T], to the sums of their sequences."""
        num_tokens = values.shape[-1]
        if starts is None:
            starts = torch.zeros(num_tokens, dtype=torch.bool)
        sequence = (self.num_sequences - 1 + starts.cpu().long().cumsum(0)).clamp(min=0)  # [T]
        total = max(self.num_sequences, int(sequence[-1]) + 1)
        grown = total - self.num_sequences
        self._sums = functional.pad(self._sums, (0, grown))
        self._tokens = functional.pad(self._tokens, (0, grown))
        place = sequence.to(values.device)
        found = torch.zeros(*values.shape[:-1], total, dtype=torch.float64, device=values.device)
        self._sums += found.index_add_(-1, place, values.double()).cpu()
        self._tokens += torch.bincount(sequence, minlength=total)

    def merge(self, other: RecallMeter) -> None:
        """Add what another meter of the same layers and budgets counted, on other sequences."""
        self._sums = torch.cat([self._sums, other._sums], dim=-1)
        self._tokens = torch.cat([self._tokens, other._tokens])

    def compute(self) -> RecallMetrics:
        """Averages over all tokens counted so far.

        Raises:
            ValueError: If no token was counted.
        """
        if self.num_tokens == 0:
            raise ValueError("No tokens were measured; recall needs at least one.")
        *recall, mass, exact = (self._sums.sum(dim=-1) / self.num_tokens).tolist()
        return RecallMetrics(
            recall_at_budgets=dict(zip(self.budgets, recall, strict=True)),
            gate_mass_recall=mass,
            exact_set=exact,
        )

    def intervals(self, share: float = 0.95) -> RecallIntervals:
        """Confidence intervals of the means over layers, by resampling whole sequences.

        Tokens of one sequence are alike, so that resampling tokens would promise too much.

        Args:
            share: Of resampled means that lie inside, 0..1.

        Raises:
            ValueError: If there are fewer than two sequences.
        """
        if self.num_sequences < 2:
            raise ValueError(
                f"A confidence interval needs at least 2 sequences, not {self.num_sequences}; "
                "say where they start."
            )
        generator = torch.Generator().manual_seed(0)
        even = torch.ones(RESAMPLES, self.num_sequences)
        drawn = even.multinomial(self.num_sequences, replacement=True, generator=generator)
        times = torch.zeros(even.shape, dtype=torch.float64)  # [resamples, S]
        times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        means = times @ self._sums.mean(dim=1).T / (times @ self._tokens).unsqueeze(1)
        tails = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
        low, high = means.quantile(tails, dim=0).tolist()
        *recall, mass, exact = zip(low, high, strict=True)
        return RecallIntervals(
            recall_at_budgets=dict(zip(self.budgets, recall, strict=True)),
            gate_mass_recall=mass,
            exact_set=exact,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
