"""Any number of predictors on the same held-out tokens, in one pass: recall, calibration, cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.estimators import EstimatorStack, MoEGeometry, RecallMeter, RecallMetrics
from foreroute.estimators.calibration import (
    expected_calibration_error,
    membership,
    near_decision,
    reliability,
)
from foreroute.estimators.expected_cost import FetchCosts, expected_cost
from foreroute.train.calibrate import MarginHistogram
from foreroute.train.datamodule import BatchStream
from foreroute.train.shards import PairedShards, RoutingBatch

Predictor = Callable[[RoutingBatch], Tensor]
"""Gives scores that rank the target layers' experts, [P, T, E], for a batch."""

Probabilities = Callable[[Tensor], Tensor]
"""Turns ranking scores [P, T, E] into probabilities of being among the top K: a calibration."""

MEASURE_BATCH = 2048


def predictor_of(stack: EstimatorStack) -> Predictor:
    """A stack as a predictor."""

    def predict(batch: RoutingBatch) -> Tensor:
        return stack.ranking(stack(batch.source))

    return predict


def measure(
    predictors: Mapping[str, Predictor],
    held_out: PairedShards,
    geometry: MoEGeometry,
    budgets: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> dict[str, RecallMetrics]:
    """Measure predictors side by side; see `count`.

    Returns:
        By name, one figure per layer pair.
    """
    meters = count(predictors, held_out, geometry, budgets, device)
    return {name: meter.compute() for name, meter in meters.items()}


@torch.inference_mode()
def count(
    predictors: Mapping[str, Predictor],
    held_out: PairedShards,
    geometry: MoEGeometry,
    budgets: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> dict[str, RecallMeter]:
    """Count hits of predictors side by side, sequences apart.

    Args:
        predictors: By name.
        held_out: The tokens, with every source field the predictors read.
        geometry: The model's routing.
        budgets: Experts predicted per token and layer; K is always measured.
        device: Where the predictors live.

    Returns:
        By name, what was counted.
    """
    num_pairs = len(held_out.target_layers)
    meters = {name: RecallMeter(num_pairs, geometry.top_k, budgets) for name in predictors}
    for batch in BatchStream(held_out, MEASURE_BATCH):
        here = batch.to(torch.device(device))
        for name, predict in predictors.items():
            scores = predict(here)
            meters[name].update(scores, here.target_ids, here.target_gate_weights, here.starts)
    return meters


@torch.inference_mode()
def count_margins(
    predictors: Mapping[str, Predictor],
    held_out: PairedShards,
    geometry: MoEGeometry,
    device: torch.device | str = "cpu",
) -> dict[str, MarginHistogram]:
    """Count how often experts of each margin were used: what probabilities are fitted to.

    Args:
        predictors: By name.
        held_out: Tokens to calibrate on, with every source field the predictors read.
        geometry: The model's routing.
        device: Where the predictors live.
    """
    histograms = {name: MarginHistogram(geometry.top_k) for name in predictors}
    for batch in BatchStream(held_out, MEASURE_BATCH):
        here = batch.to(torch.device(device))
        for name, predict in predictors.items():
            histograms[name].update(predict(here), here.target_ids)
    return histograms


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How good the probabilities of one predictor were, per layer pair."""

    expected_cost: list[float]
    """Per token, in copies of one expert; see `foreroute.estimators.expected_cost`."""
    calibration_error: list[float]
    """Over the candidates of each token, 0 is perfect."""
    expected: list[list[float]]
    """Mean probability in each bin of the reliability diagram, [P][B]."""
    observed: list[list[float]]
    """Share of each bin that came true, [P][B]."""


@torch.inference_mode()
def judge(
    predictors: Mapping[str, tuple[Predictor, Mapping[str, Probabilities]]],
    held_out: PairedShards,
    geometry: MoEGeometry,
    costs: FetchCosts,
    device: torch.device | str = "cpu",
) -> dict[tuple[str, str], Judgement]:
    """Judge the probabilities of predictors side by side, under any number of calibrations each.

    Args:
        predictors: By name, with their calibrations by name.
        held_out: The tokens, with every source field the predictors read.
        geometry: The model's routing.
        costs: Of the rule of prefetching.
        device: Where predictors and calibrations live.

    Returns:
        By names of predictor and calibration.
    """
    keys = [(name, method) for name, (_, methods) in predictors.items() for method in methods]
    spent: dict[tuple[str, str], list[Tensor]] = {key: [] for key in keys}
    near: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {key: [] for key in keys}
    for batch in BatchStream(held_out, MEASURE_BATCH):
        here = batch.to(torch.device(device))
        is_true = membership(here.target_ids, geometry.num_experts)
        for name, (predict, methods) in predictors.items():
            scores = predict(here)
            for method, calibration in methods.items():
                chance = calibration(scores)
                found = near_decision(chance, here.target_ids, scores, geometry.top_k)
                near[name, method].append(found)
                spent[name, method].append(expected_cost(chance, is_true, costs))
    return {key: _judged(spent[key], near[key]) for key in keys}


def _judged(spent: list[Tensor], near: list[tuple[Tensor, Tensor]]) -> Judgement:
    probabilities, is_true = (torch.cat(parts, dim=1) for parts in zip(*near, strict=True))
    expected, observed = reliability(probabilities, is_true)
    return Judgement(
        expected_cost=torch.cat(spent, dim=1).mean(dim=1).tolist(),
        calibration_error=expected_calibration_error(probabilities, is_true).tolist(),
        expected=expected.tolist(),
        observed=observed.tolist(),
    )
