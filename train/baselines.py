"""What a trained estimator must beat, measured on the same held-out tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import (
    SOURCE_FIELDS,
    TRAINING_FREE_FORM,
    EstimatorSpec,
    InputKind,
)
from foreroute.train.measure import Predictor, predictor_of
from foreroute.train.prepared import PreparedShards
from foreroute.train.ridge import set_to_ridge
from foreroute.train.shards import BASE_SOURCE_FIELDS, PairedShards, RoutingBatch
from foreroute.train.split import SequenceSplit
from foreroute.train.stacks import build_stack

TRAINING_FREE_INPUTS: dict[str, InputKind] = {
    "next-router": "router-input",
    "residual-next-router": "residual",
    "quasi-hidden": "quasi-hidden",
}
"""Baselines that apply the next router to a state of the source layer that all traces hold."""


def build_baselines(
    traces: Traces,
    spec: EstimatorSpec,
    split: SequenceSplit,
    default_vectors: Tensor,
    device: torch.device,
) -> dict[str, Predictor]:
    """All baselines but the random floor, which needs no measuring.

    They are: per-layer frequency, the previous token's experts, the next router on each of
    `training_free_inputs`, and ridge regression on the spec's own input and rank. The last two
    kinds need anchors and are left out without.

    Args:
        traces: Where the fitted ones learn, from training sequences only.
        spec: Target layers, horizon and input; its form does not matter.
        split: Sequences of each part.
        default_vectors: Of all L MoE layers, [L, E, D].
        device: Where they shall compute.
    """
    counts = count_experts(traces, spec, split.train).to(device)
    predictors: dict[str, Predictor] = {
        "frequency": frequency_predictor(counts),
        "previous-token": previous_token_predictor(counts),
    }
    if traces.anchors is None:
        return predictors
    for name, input_kind in training_free_inputs(spec).items():
        free = dataclasses.replace(spec, form=TRAINING_FREE_FORM, input_kind=input_kind)
        predictors[name] = predictor_of(build_stack(traces, free, default_vectors, device))
    ridge = build_stack(traces, dataclasses.replace(spec, form="ridge"), default_vectors, device)
    set_to_ridge(ridge, PreparedShards.streamed(ridge, PairedShards(traces, spec, split.train)))
    predictors["ridge"] = predictor_of(ridge)
    return predictors


def training_free_inputs(spec: EstimatorSpec) -> dict[str, InputKind]:
    """Names of the training-free baselines and what they read.

    At horizon 0 that is the spec's own input alone: the others are known only once the layer has
    routed.
    """
    shared = TRAINING_FREE_INPUTS if spec.horizon else {}
    if spec.input_kind in shared.values():
        return dict(shared)
    return {**shared, spec.input_kind: spec.input_kind}


def baseline_fields(spec: EstimatorSpec) -> tuple[str, ...]:
    """The source fields that the spec's own input and its baselines read."""
    shared = BASE_SOURCE_FIELDS if spec.horizon else ()
    return tuple(dict.fromkeys((*shared, *SOURCE_FIELDS[spec.input_kind])))


def count_experts(traces: Traces, spec: EstimatorSpec, sequences: range) -> Tensor:
    """How often each target layer chose each expert, [P, E], float32."""
    num_experts = traces.geometry.num_experts
    counts = torch.zeros(len(spec.target_layers), num_experts)
    rows_of_shard = PairedShards(traces, spec, sequences).rows
    for shard_idx, rows in rows_of_shard.items():
        for pair, layer_idx in enumerate(spec.target_layers):
            ids = traces.read(layer_idx, shard_idx, ("expert_ids",))["expert_ids"][rows]
            counts[pair] += torch.bincount(ids.flatten(), minlength=num_experts)
    return counts


def frequency_predictor(counts: Tensor) -> Predictor:
    """The experts a layer chose most often, whatever the token.

    Args:
        counts: [P, E], float32.
    """

    def predict(batch: RoutingBatch) -> Tensor:
        num_pairs, num_experts = counts.shape
        return counts.unsqueeze(1).expand(num_pairs, batch.num_tokens, num_experts)

    return predict


def previous_token_predictor(counts: Tensor) -> Predictor:
    """The previous token's experts first, then the most frequent ones.

    Args:
        counts: [P, E], float32.
    """
    by_frequency = frequency_predictor(counts / (counts.sum(dim=-1, keepdim=True) + 1))

    def predict(batch: RoutingBatch) -> Tensor:
        previous = batch.previous_ids
        is_known = (previous >= 0).float()
        return by_frequency(batch).scatter_add(-1, previous.clamp(min=0), is_known)

    return predict
