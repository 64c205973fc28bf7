"""Recorded routing in place of a random model's own, with predictions of a chosen recall."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.seam import HANDLER_ATTRIBUTE
from foreroute.runtime import Engine
from foreroute.runtime.prefetch import Prefetcher

STEPS_BETWEEN_SEQUENCES = 17


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


def near_miss_predictions(routes: Tensor, num_experts: int, recall: float) -> Tensor:
    """The true experts with a share replaced by others, drawn from the layer's popularity."""
    generator = torch.Generator().manual_seed(0)
    predictions = routes.clone()
    for layer in range(routes.shape[1]):
        popularity = torch.bincount(routes[:, layer].flatten(), minlength=num_experts) + 0.05
        flat = predictions[:, layer].flatten(0, 1)  # [steps * batch, top_k]
        is_wrong = torch.rand(flat.shape, generator=generator) > recall
        for row in is_wrong.any(-1).nonzero().flatten().tolist():
            weights = popularity.clone()
            weights[flat[row]] = 0
            count = int(is_wrong[row].sum())
            flat[row, is_wrong[row]] = torch.multinomial(weights, count, generator=generator)
        predictions[:, layer] = flat.view(predictions[:, layer].shape)
    return predictions


class Replay:
    """Puts recorded routing (and predictions) in place of the random model's own."""

    def __init__(self, engine: Engine, routes: Tensor, predictions: Tensor | None = None) -> None:
        """Attach to an engine before its first decode step.

        Args:
            engine: Open.
            routes: [steps, layers, batch, top_k].
            predictions: The same shape, for an engine that prefetches; None to leave it alone.
        """
        self._routes = routes.to(engine.device)
        self._ids = self._routes[0].clone()  # [layers, batch, top_k], read by the graph
        position = {layer.layer_idx: i for i, layer in enumerate(engine.layers)}
        for moe_layer, own in zip(engine.offloaded.moe.layers, engine.layers, strict=True):
            handler = self._handler(own, self._ids[position[own.layer_idx]])
            moe_layer.experts.__dict__[HANDLER_ATTRIBUTE] = handler
        self._predictions = None if predictions is None else predictions.to(engine.device)
        if self._predictions is not None:
            self._predicted = self._predictions[0].clone()
            for run in (engine._run, getattr(engine, "_device_run", engine._run)):
                run.prefetcher = _Replayed(run.prefetcher, self._predicted, position)

    def _handler(self, own: Any, ids: Tensor) -> Callable[..., Tensor]:
        def handler(experts: nn.Module, hidden: Tensor, true: Tensor, weights: Tensor) -> Tensor:
            is_decode = len(hidden) == len(ids)
            output: Tensor = own(experts, hidden, ids if is_decode else true, weights)
            return output

        return handler

    def set_step(self, step: int) -> None:
        """Route the next decode step as the recording did."""
        self._ids.copy_(self._routes[step % len(self._routes)])
        if self._predictions is not None:
            self._predicted.copy_(self._predictions[step % len(self._predictions)])


class _Replayed(Prefetcher):
    """Computes the real prediction, then hands out the replayed one."""

    def __init__(self, inner: Any, predicted: Tensor, position: dict[int, int]) -> None:
        self._inner, self._predicted, self._position = inner, predicted, position

    def target_of(self, source_layer: int) -> int | None:
        target: int | None = self._inner.target_of(source_layer)
        return target

    def predict(self, source_layer: int, **states: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = self._inner.predict(source_layer, **states)
        return logits, self._predicted[self._position[self.target_of(source_layer) or 0]]
