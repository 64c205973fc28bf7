"""Recall of any number of predictors on the same held-out tokens, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from foreroute.estimators import EstimatorStack, MoEGeometry, RecallMeter, RecallMetrics
from foreroute.train.datamodule import BatchStream
from foreroute.train.shards import PairedShards, RoutingBatch

Predictor = Callable[[RoutingBatch], Tensor]
"""Gives scores that rank the target layers' experts, [P, T, E], for a batch."""

MEASURE_BATCH = 2048


def predictor_of(stack: EstimatorStack) -> Predictor:
    """A stack as a predictor."""

    def predict(batch: RoutingBatch) -> Tensor:
        logits: Tensor = stack(batch.source)
        return logits

    return predict


@torch.inference_mode()
def measure(
    predictors: Mapping[str, Predictor],
    held_out: PairedShards,
    geometry: MoEGeometry,
    budgets: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> dict[str, RecallMetrics]:
    """Measure predictors side by side.

    Args:
        predictors: By name.
        held_out: The tokens, with every source field the predictors read.
        geometry: The model's routing.
        budgets: Experts predicted per token and layer; K is always measured.
        device: Where the predictors live.

    Returns:
        By name, one figure per layer pair.
    """
    num_pairs = len(held_out.target_layers)
    meters = {name: RecallMeter(num_pairs, geometry.top_k, budgets) for name in predictors}
    for batch in BatchStream(held_out, MEASURE_BATCH):
        here = batch.to(torch.device(device))
        for name, predict in predictors.items():
            meters[name].update(predict(here), here.target_ids, here.target_gate_weights)
    return {name: meter.compute() for name, meter in meters.items()}
