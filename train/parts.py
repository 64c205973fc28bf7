"""Layers dealt out to processes: each fits and measures some, and one puts them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec, EstimatorStack, MoEGeometry, RecallMetrics
from foreroute.estimators.forms import find_form
from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.ranks import Ranks
from foreroute.train.stacks import build_stack


def part_of(spec: EstimatorSpec, ranks: Ranks) -> EstimatorSpec:
    """The layers of one process: neighbours, as many as the others have.

    Raises:
        ValueError: If there are more processes than layers.
    """
    bounds = _bounds(spec, ranks)
    layers = spec.target_layers[bounds[ranks.rank] : bounds[ranks.rank + 1]]
    return dataclasses.replace(spec, target_layers=layers)


def _bounds(spec: EstimatorSpec, ranks: Ranks) -> list[int]:
    num_layers = len(spec.target_layers)
    if ranks.num_ranks > num_layers:
        raise ValueError(
            f"{ranks.num_ranks} processes cannot share {num_layers} layers: start "
            f"train-estimator with at most {num_layers}."
        )
    return [rank * num_layers // ranks.num_ranks for rank in range(ranks.num_ranks + 1)]


def build_part(
    traces: Traces,
    spec: EstimatorSpec,
    ranks: Ranks,
    seed: int,
    vectors: Tensor,
    device: torch.device,
) -> EstimatorStack:
    """A fresh stack of this process's layers, with the numbers that they have among all layers.

    Args:
        traces: What it will be trained on.
        spec: Of all layers.
        ranks: The processes.
        seed: Of the initial parameters.
        vectors: Default vectors of all L MoE layers, [L, E, D].
        device: Where it shall live.

    Raises:
        ValueError: If the form's layers cannot be trained apart, or there are too few of them.
    """
    torch.manual_seed(seed)
    if ranks.is_alone:
        return build_stack(traces, spec, vectors, device)
    whole = _new_form(spec, traces.geometry)
    num_layers, bounds = len(spec.target_layers), _bounds(spec, ranks)
    if any(len(value) != num_layers for value in whole.state_dict().values()):
        raise ValueError(
            f"Form {spec.form} shares parameters between layers, so that processes cannot train "
            "them apart: start train-estimator without torchrun, or choose another --form."
        )
    stack = build_stack(traces, part_of(spec, ranks), vectors, device)
    mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    stack.form.load_state_dict({name: value[mine] for name, value in whole.state_dict().items()})
    return stack


def _new_form(spec: EstimatorSpec, geometry: MoEGeometry) -> EstimatorForm:
    return find_form(spec.form)(
        spec,
        num_pairs=len(spec.target_layers),
        hidden_size=geometry.hidden_size,
        num_experts=geometry.num_experts,
    )


def join_stacks(
    part: EstimatorStack, traces: Traces, spec: EstimatorSpec, vectors: Tensor, ranks: Ranks
) -> EstimatorStack:
    """The stack of all layers, on the CPU, from every process's part; all of them call it.

    Args:
        part: This process's.
        traces: What it was trained on.
        spec: Of all layers.
        vectors: Default vectors of all L MoE layers, [L, E, D].
        ranks: The processes.
    """
    if ranks.is_alone:
        return part
    parts = ranks.gather({name: value.cpu() for name, value in part.form.state_dict().items()})
    stack = build_stack(traces, spec, vectors, torch.device("cpu"))
    stack.form.load_state_dict({name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    return stack.eval().requires_grad_(False)


def join_metrics(parts: Sequence[dict[str, RecallMetrics]]) -> dict[str, RecallMetrics]:
    """What all processes have measured, by predictor, in the order of the layers."""
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(parts: Sequence[RecallMetrics]) -> RecallMetrics:
    budgets = parts[0].recall_at_budgets
    return RecallMetrics(
        recall_at_budgets={
            budget: [value for part in parts for value in part.recall_at_budgets[budget]]
            for budget in budgets
        },
        gate_mass_recall=[value for part in parts for value in part.gate_mass_recall],
        exact_set=[value for part in parts for value in part.exact_set],
    )
