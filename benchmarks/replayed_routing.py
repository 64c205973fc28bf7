"""Recorded routing in place of a random model's own, with predictions of a chosen recall."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.seam import HANDLER_ATTRIBUTE
from foreroute.runtime import Engine
from foreroute.runtime.prefetch import Prefetcher
from foreroute.runtime.simulator import Route, SimulatedPredictor

STEPS_BETWEEN_SEQUENCES = 17
LEAST_PROBABILITY = 1e-3


def read_routes(path: Path) -> Tensor:
    """Decode steps of a route file, [steps, layers, k] int64, most weighted expert first."""
    steps: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        rows = (line for line in file if not line.startswith("#"))
        for row in csv.DictReader(rows):
            if row["phase"] == "1":
                steps[int(row["step"])][int(row["layer"])].append(int(row["expert"]))
    num_layers = max(len(layers) for layers in steps.values())
    whole = [steps[s] for s in sorted(steps) if len(steps[s]) == num_layers]
    return torch.tensor([[step[layer] for layer in sorted(step)] for step in whole])


def random_routes(num_steps: int, num_layers: int, num_experts: int, top_k: int) -> Tensor:
    """Routes drawn at random, [steps, layers, top_k]: for tests of the scripts alone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num_steps, num_layers, num_experts, generator=generator)
    return noise.topk(top_k, dim=-1).indices


def fit_routes(routes: Tensor, moe: MoEModel, batch: int) -> Tensor:
    """Routes for another shape: first layers, ids folded to its experts, the first distinct top-k.

    Returns:
        [steps, layers, batch, top_k]; sequence b starts 17 b steps into the recording.
    """
    geometry = moe.geometry
    layers = routes[:, : geometry.num_layers] % geometry.num_experts
    fitted = torch.empty(*layers.shape[:2], geometry.top_k, dtype=torch.long)
    for step, per_layer in enumerate(layers.tolist()):
        for layer, ids in enumerate(per_layer):
            every = list(dict.fromkeys([*ids, *range(geometry.num_experts)]))
            fitted[step, layer] = torch.tensor(every[: geometry.top_k])
    shifts = range(0, batch * STEPS_BETWEEN_SEQUENCES, STEPS_BETWEEN_SEQUENCES)
    return torch.stack([fitted.roll(-shift, dims=0) for shift in shifts], dim=2)


@dataclass(frozen=True)
class ReplayedPredictions:
    """What a predictor of a chosen recall would have said, most likely expert first."""

    expert_ids: Tensor
    """[steps, layers, batch, top_k] int64."""
    scores: Tensor
    """[steps, layers, batch, E] float32: log-odds that the expert is used, calibrated."""


def near_miss_predictions(routes: Tensor, num_experts: int, recall: float) -> ReplayedPredictions:
    """Predictions of the simulator's predictor: wrong guesses by the layer's popularity.

    Args:
        routes: The truth, [steps, layers, batch, top_k].
        num_experts: E.
        recall: Share of the true experts that it names.
    """
    every_ids, every_score = [], []
    for sequence in range(routes.shape[2]):
        expert_ids = routes[:, :, sequence].numpy().astype(np.int16)
        is_decode = np.ones(len(expert_ids), dtype=bool)
        route = Route(
            name="replay", expert_ids=expert_ids, is_decode=is_decode, num_experts=num_experts
        )
        said = SimulatedPredictor(recall=recall, seed=sequence).predict(route, horizon=1)
        confidence = torch.from_numpy(said.confidence[0])
        confidence, order = confidence.sort(dim=-1, descending=True)
        ids = torch.from_numpy(said.expert_ids[0].astype(np.int64)).gather(-1, order)
        scores = torch.full((*ids.shape[:2], num_experts), LEAST_PROBABILITY)
        scores.scatter_(-1, ids, confidence.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY))
        every_ids.append(ids)
        every_score.append(scores.logit())
    return ReplayedPredictions(torch.stack(every_ids, dim=2), torch.stack(every_score, dim=2))


class Replay:
    """Puts recorded routing (and predictions) in place of the random model's own."""

    def __init__(
        self, engine: Engine, routes: Tensor, predictions: ReplayedPredictions | None = None
    ) -> None:
        """Attach to an engine before its first decode step.

        Args:
            engine: Open.
            routes: [steps, layers, batch, top_k].
            predictions: Of the same steps, for an engine that prefetches; None to leave it alone.
        """
        self._routes = routes.to(engine.device)
        self._ids = self._routes[0].clone()  # [layers, batch, top_k], read by the graph
        self._sources = [(self._ids, self._routes)]
        position = {layer.layer_idx: i for i, layer in enumerate(engine.layers)}
        for moe_layer, own in zip(engine.offloaded.moe.layers, engine.layers, strict=True):
            handler = self._handler(own, self._ids[position[own.layer_idx]])
            moe_layer.experts.__dict__[HANDLER_ATTRIBUTE] = handler
        if predictions is not None:
            recorded = [t.to(engine.device) for t in (predictions.expert_ids, predictions.scores)]
            now = [tensor[0].clone() for tensor in recorded]
            self._sources += zip(now, recorded, strict=True)
            for run in (engine._run, getattr(engine, "_device_run", engine._run)):
                run.prefetcher = _Replayed(run.prefetcher, now[0], now[1], position)

    def _handler(self, own: Any, ids: Tensor) -> Callable[..., Tensor]:
        def handler(experts: nn.Module, hidden: Tensor, true: Tensor, weights: Tensor) -> Tensor:
            is_decode = len(hidden) == len(ids)
            output: Tensor = own(experts, hidden, ids if is_decode else true, weights)
            return output

        return handler

    def set_step(self, step: int) -> None:
        """Route the next decode step as the recording did."""
        for now, recorded in self._sources:
            now.copy_(recorded[step % len(recorded)])


class _Replayed(Prefetcher):
    """Computes the real prediction, then hands out the replayed one."""

    def __init__(
        self, inner: Any, expert_ids: Tensor, scores: Tensor, position: dict[int, int]
    ) -> None:
        self._inner, self._ids, self._scores = inner, expert_ids, scores
        self._position = position

    def target_of(self, source_layer: int) -> int | None:
        target: int | None = self._inner.target_of(source_layer)
        return target

    @property
    def is_calibrated(self) -> bool:
        return True

    def predict(self, source_layer: int, **states: Tensor) -> tuple[Tensor, Tensor]:
        self._own_logits, _ = self._inner.predict(source_layer, **states)
        target = self._position[self.target_of(source_layer) or 0]
        return self._scores[target], self._ids[target]

    def probabilities(self, source_layer: int, logits: Tensor) -> Tensor:
        self._inner.probabilities(source_layer, self._own_logits)
        return logits.sigmoid()
