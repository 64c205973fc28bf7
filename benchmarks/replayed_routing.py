"""Recorded routing in place of a random model's own, with predictions of a chosen recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.seam import HANDLER_ATTRIBUTE
from foreroute.data.routes import ABSENT, Route, read_route
from foreroute.runtime import Engine
from foreroute.runtime.device.predictor import DevicePredictor, Guess
from foreroute.runtime.host.predictor import HostPredictor
from foreroute.runtime.simulator import SimulatedPredictor

STEPS_BETWEEN_SEQUENCES = 17
LEAST_PROBABILITY = 1e-3


def read_steps(path: Path) -> Tensor:
    """Decode steps of a route file, [steps, layers, k] int64, in the order of the file."""
    route = read_route(path)
    ids = route.expert_ids[route.is_decode]
    is_whole = (ids != ABSENT).all((1, 2))
    return torch.from_numpy(ids[is_whole].astype(np.int64))


def random_routes(num_steps: int, num_layers: int, num_experts: int, top_k: int) -> Tensor:
    """Routes drawn at random, [steps, layers, top_k]: for tests of the scripts alone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num_steps, num_layers, num_experts, generator=generator)
    return noise.topk(top_k, dim=-1).indices


def fit_routes(routes: Tensor, moe: MoEModel, batch: int) -> Tensor:
    """Routes for another shape: layers and ids folded to its own, the first distinct top-k.

    A recording of fewer layers begins again at its first; one of more leaves out its last.

    Returns:
        [steps, layers, batch, top_k]; sequence b starts 17 b steps into the recording.
    """
    geometry = moe.geometry
    layers = routes[:, torch.arange(geometry.num_layers) % routes.shape[1]] % geometry.num_experts
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
    confidence: Tensor
    """How likely each is used, calibrated, of the same shape, float32."""
    scores: Tensor
    """The same as log-odds of every expert, [steps, layers, batch, E] float32."""


def near_miss_predictions(routes: Tensor, num_experts: int, recall: float) -> ReplayedPredictions:
    """Predictions of the simulator's predictor: wrong guesses by the layer's popularity.

    Args:
        routes: The truth, [steps, layers, batch, top_k].
        num_experts: E.
        recall: Share of the true experts that it names.
    """
    parts = []
    for sequence in range(routes.shape[2]):
        expert_ids = routes[:, :, sequence].numpy().astype(np.int16)
        is_decode = np.ones(len(expert_ids), dtype=bool)
        route = Route(
            name="replay", expert_ids=expert_ids, is_decode=is_decode, num_experts=num_experts
        )
        said = SimulatedPredictor(recall=recall, seed=sequence).predict(route, horizon=1)
        confidence, order = torch.from_numpy(said.confidence[0]).sort(dim=-1, descending=True)
        ids = torch.from_numpy(said.expert_ids[0].astype(np.int64)).gather(-1, order)
        of_every = torch.full((*ids.shape[:2], num_experts), LEAST_PROBABILITY)
        of_every.scatter_(-1, ids, confidence.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY))
        parts.append((ids, confidence, of_every.logit()))
    return ReplayedPredictions(*(torch.stack(part, dim=2) for part in zip(*parts, strict=True)))


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
        position = {layer.layer_idx: i for i, layer in enumerate(engine.driver.layers)}
        for moe_layer, own in zip(engine.offloaded.moe.layers, engine.driver.layers, strict=True):
            ids = self._ids[position[own.layer_idx]]
            handler = self._handler(engine.ranks.adding(own), ids)
            moe_layer.experts.__dict__[HANDLER_ATTRIBUTE] = handler
        if predictions is not None:
            recorded = [t.to(engine.device) for t in vars(predictions).values()]
            now = [tensor[0].clone() for tensor in recorded]
            self._sources += zip(now, recorded, strict=True)
            run: Any = engine.driver.run
            if run.predictor is None:
                raise RuntimeError("The engine has no predictor to replay: it does not prefetch.")
            kind = _Replayed if isinstance(run.predictor, HostPredictor) else _ReplayedOnDevice
            run.predictor = kind(run.predictor, ReplayedPredictions(*now), position)

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


class _Replayed(HostPredictor):
    """Computes the real prediction, then hands out the replayed one."""

    def __init__(self, inner: Any, now: ReplayedPredictions, position: dict[int, int]) -> None:
        self._inner, self._now, self._position = inner, now, position
        self.ahead = inner.ahead

    def predict(self, source_layer: int, **states: Tensor) -> tuple[Tensor, Tensor]:
        self._own_logits, _ = self._inner.predict(source_layer, **states)
        target = self._position[self.ahead.target_of(source_layer) or 0]
        return self._now.scores[target], self._now.expert_ids[target]

    def probabilities(self, source_layer: int, logits: Tensor) -> Tensor:
        self._inner.probabilities(source_layer, self._own_logits)
        return logits.sigmoid()


class _ReplayedOnDevice:
    """The same for a predictor that gives ids with their probabilities."""

    def __init__(
        self, inner: DevicePredictor, now: ReplayedPredictions, position: dict[int, int]
    ) -> None:
        self._inner, self._now, self._position = inner, now, position

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def predict(self, source_layer: int, **states: Any) -> Guess:
        own = self._inner.predict(source_layer, **states)
        target = self._position[self._inner.ahead.target_of(source_layer) or 0]
        now = self._now
        return own._replace(expert_ids=now.expert_ids[target], chances=now.confidence[target])
