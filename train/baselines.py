"""What a trained estimator must beat, measured on the same held-out tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import (
    TRAINING_FREE_FORM,
    EstimatorSpec,
    EstimatorStack,
    InputKind,
)
from foreroute.train.measure import Predictor, predictor_of
from foreroute.train.shards import PairedShards, RoutingBatch
from foreroute.train.split import SequenceSplit

TRAINING_FREE_INPUTS: dict[str, InputKind] = {
    "next-router": "router-input",
    "residual-next-router": "residual",
    "quasi-hidden": "quasi-hidden",
}
"""Baselines that apply the next router to a state of the source layer."""

RIDGE_TOKENS = 20_000
RIDGE_PENALTY = 3e-3
"""Per token and unit of mean square feature."""


def build_baselines(
    traces: Traces,
    spec: EstimatorSpec,
    split: SequenceSplit,
    default_vectors: Tensor,
    device: torch.device,
) -> dict[str, Predictor]:
    """All baselines but the random floor, which needs no measuring.

    Args:
        traces: Where the fitted ones learn, from training sequences only.
        spec: Target layers and horizon; its form and input do not matter.
        split: Sequences of each part.
        default_vectors: Of all L MoE layers, [L, E, D].
        device: Where they shall compute.
    """
    counts = count_experts(traces, spec, split.train).to(device)
    predictors: dict[str, Predictor] = {
        "frequency": frequency_predictor(counts),
        "previous-token": previous_token_predictor(counts),
    }
    for name, input_kind in TRAINING_FREE_INPUTS.items():
        free = dataclasses.replace(spec, form=TRAINING_FREE_FORM, input_kind=input_kind)
        stack = EstimatorStack.build(traces.geometry, free, traces.anchors, default_vectors)
        predictors[name] = predictor_of(stack.to(device))
    ridge = fit_ridge(traces, spec, split.train, default_vectors)
    predictors["ridge"] = predictor_of(ridge.to(device))
    return predictors


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


def fit_ridge(
    traces: Traces, spec: EstimatorSpec, sequences: range, default_vectors: Tensor
) -> EstimatorStack:
    """Ridge regression from quasi-hidden features to the router logits, one per target layer.

    Args:
        traces: Where to learn, at most `RIDGE_TOKENS` tokens.
        spec: Target layers and horizon.
        sequences: To learn from.
        default_vectors: Of all L MoE layers, [L, E, D].

    Returns:
        A stack of form `linear` that holds the solutions.
    """
    linear = dataclasses.replace(spec, form="linear", input_kind="quasi-hidden")
    stack = EstimatorStack.build(traces.geometry, linear, traces.anchors, default_vectors)
    stack.requires_grad_(False)
    for pair, target_layer in enumerate(spec.target_layers):
        one = dataclasses.replace(linear, target_layers=(target_layer,))
        alone = EstimatorStack.build(traces.geometry, one, traces.anchors, default_vectors)
        features, logits = _ridge_tokens(alone, PairedShards(traces, one, sequences, cache_bytes=0))
        weight, bias = solve_ridge(features, logits)
        stack.form.get_parameter("weight")[pair] = weight
        stack.form.get_parameter("bias")[pair, 0] = bias
    return stack


def solve_ridge(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Solve one ridge regression with scikit-learn.

    Args:
        features: [T, D], float32.
        logits: [T, E], float32.

    Returns:
        Weight [D, E] and bias [E], float32.
    """
    from sklearn.linear_model import Ridge

    penalty = RIDGE_PENALTY * len(features) * features.square().mean().item()
    solved = Ridge(alpha=penalty).fit(features.numpy(), logits.numpy())
    weight = torch.from_numpy(solved.coef_).reshape(logits.shape[1], -1)
    return weight.T.float(), torch.as_tensor(solved.intercept_).float()


def _ridge_tokens(stack: EstimatorStack, shards: PairedShards) -> tuple[Tensor, Tensor]:
    """Features [T, D] and true logits [T, E] of the first training tokens of one pair."""
    features, logits, missing = [], [], RIDGE_TOKENS
    for batch in shards:
        part = batch.select(slice(missing))
        features.append(stack.input.features(part.source)[0])
        logits.append(part.target_logits[0].float())
        missing -= part.num_tokens
        if missing <= 0:
            break
    return torch.cat(features), torch.cat(logits)
