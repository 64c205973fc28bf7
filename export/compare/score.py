"""How good anybody's predictions are: the same figures for our own forms and for other files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreroute.estimators import RecallMeter, default_budgets
from foreroute.estimators.calibration import (
    NEAR_DECISION,
    expected_calibration_error,
    membership,
)
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.export.compare.predicted import NOTHING, PredictedExperts
from foreroute.export.compare.truth import TrueRouting

PREDICTIONS_PER_EXPERT = 3
"""Predictions kept per expert that a token uses: as many as the widest budget reported."""


def score(truth: TrueRouting, predicted: PredictedExperts) -> dict[str, Any]:
    """Recall at every budget that the predictions allow, and how honest their confidence is.

    Args:
        truth: What happened.
        predicted: Of the same tokens in the same order; predictions of the next token are of all
            tokens but the first of each sequence.

    Returns:
        JSON-ready: `recall_at_k`, `recall_at_1_5k`, `gate_mass_recall`, `exact_set`, each with
        its 95 % interval by sequence (`_ci`); `ece`, None without confidences;
        `recall_per_layer`; `expected_cost_per_layer`; `held_out_tokens`.

    Raises:
        ValueError: If the two do not belong together.
    """
    truth = aligned(truth, predicted)
    places = truth.positions(predicted.target_layers)
    true_ids = truth.expert_ids[:, places].transpose(0, 1).long()  # [P, T, K]
    gates = truth.gate_weights[:, places].transpose(0, 1)
    ids = predicted.expert_ids.transpose(0, 1).long()  # [P, T, M]
    if int(ids.max()) >= truth.num_experts:
        raise ValueError(f"Expected expert ids below {truth.num_experts}, got {int(ids.max())}.")
    top_k, count = truth.top_k, ids.shape[-1]
    if count < top_k:
        raise ValueError(f"Expected at least {top_k} predictions a layer (top-k), got {count}.")
    budgets = tuple(b for b in default_budgets(top_k, truth.num_experts) if b <= count)
    meter = RecallMeter(len(places), top_k, budgets)
    meter.update(_ranks(ids, truth.num_experts), true_ids, gates, truth.starts)
    is_true = membership(true_ids, truth.num_experts).gather(-1, ids.clamp(min=0)) & (ids >= 0)
    said = predicted.confidence
    near = min(NEAR_DECISION * top_k, count)
    error = None
    if said is not None:
        chances = said.transpose(0, 1)[..., :near]
        errors = expected_calibration_error(chances.flatten(1), is_true[..., :near].flatten(1))
        error = round(float(errors.mean()), 4)
    return _figures(meter, budgets) | {
        "ece": error,
        "expected_cost_per_layer": None if said is None else _costs(said, is_true, top_k),
        "held_out_tokens": meter.num_tokens,
    }


def aligned(truth: TrueRouting, predicted: PredictedExperts) -> TrueRouting:
    """The routing of the tokens that predictions are of: all, or all that follow another.

    Raises:
        ValueError: If the number of tokens is neither.
    """
    found = predicted.expert_ids.shape[0]
    if found == truth.num_tokens:
        return truth
    followers = ~truth.starts
    if found != int(followers.sum()):
        raise ValueError(
            f"Expected predictions of {truth.num_tokens} tokens, or of the {int(followers.sum())} "
            f"that are not the first of their sequence, got {found}."
        )
    return TrueRouting(
        expert_ids=truth.expert_ids[followers],
        gate_weights=truth.gate_weights[followers],
        starts=truth.starts.roll(1)[followers],
        layer_indices=truth.layer_indices,
        num_experts=truth.num_experts,
    )


def _ranks(ids: Tensor, num_experts: int) -> Tensor:
    """Scores under which the predicted experts rank in their order, the others after them.

    Where nothing was predicted, an expert that does not exist stands, [P, T, E + M].
    """
    count = ids.shape[-1]
    scores = torch.full((*ids.shape[:-1], num_experts + count), -1.0)
    places = torch.arange(count, 0, -1.0).expand(ids.shape)
    nobody = torch.arange(num_experts, num_experts + count).expand(ids.shape)
    return scores.scatter_(-1, torch.where(ids == NOTHING, nobody, ids), places)


def _costs(said: Tensor, is_true: Tensor, top_k: int) -> list[float]:
    """Expected cost of each pair; what is not among the predictions is never fetched."""
    is_fetched = said.transpose(0, 1) > FetchCosts().least_probability
    right = (is_fetched & is_true).sum(dim=-1)
    cost = (top_k - right) + (is_fetched & ~is_true).sum(dim=-1)
    return [round(value, 4) for value in cost.float().mean(dim=1).tolist()]


def _figures(meter: RecallMeter, budgets: tuple[int, ...]) -> dict[str, Any]:
    metrics = meter.compute()
    several = meter.num_sequences > 1
    ends = meter.intervals() if several else None
    wider = budgets[1] if len(budgets) > 1 else budgets[0]
    found: dict[str, Any] = {}

    def add(name: str, values: list[float], interval: tuple[float, float] | None) -> None:
        found[name] = round(sum(values) / len(values), 4)
        found[f"{name}_ci"] = None if interval is None else [round(end, 4) for end in interval]

    at_wider = metrics.recall_at_budgets[wider]
    add("recall_at_k", metrics.recall_at_k, ends.recall_at_k if ends else None)
    add("recall_at_1_5k", at_wider, ends.recall_at_budgets[wider] if ends else None)
    add("gate_mass_recall", metrics.gate_mass_recall, ends.gate_mass_recall if ends else None)
    add("exact_set", metrics.exact_set, ends.exact_set if ends else None)
    found["recall_per_layer"] = [round(value, 4) for value in metrics.recall_at_k]
    return found
