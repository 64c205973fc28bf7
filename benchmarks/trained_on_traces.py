"""What the benchmarks of traces share: estimators trained on one, measured on another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import SOURCE_FIELDS, EstimatorSpec, EstimatorStack
from foreroute.train.fit import train_estimator
from foreroute.train.measure import predictor_of
from foreroute.train.run import FitConfig, load_run
from foreroute.train.shards import PairedShards

BATCH_TOKENS = 2048
NORMAL_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Recall:
    """Recall at budget K of some tokens, and how far chance could have moved it."""

    mean: float
    """Over all layers and tokens, 0..1."""
    margin: float
    """Half of the 95 % confidence interval, from the spread between sequences."""

    @classmethod
    def of(cls, by_sequence: Tensor) -> Recall:
        """From each sequence's own recall, [N]."""
        spread = float(by_sequence.std()) if len(by_sequence) > 1 else 0.0
        return cls(float(by_sequence.mean()), NORMAL_95 * spread * len(by_sequence) ** -0.5)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.margin:.3f}"


@torch.no_grad()
def recall_of_tokens(stack: EstimatorStack, traces: Traces, device: torch.device) -> Tensor:
    """Share of each token's true experts among the K predicted, [sequences, tokens], over layers.

    Args:
        stack: Estimators of some layers.
        traces: Any traces of the same model, sequences of one length.
        device: Where to compute.
    """
    predict, spec = predictor_of(stack.to(device)), stack.spec
    fields = SOURCE_FIELDS[spec.input_kind]
    shards = PairedShards(
        traces, spec, range(traces.num_sequences), source_fields=fields, cache_bytes=0
    )
    found = []
    for shard in shards:
        for start in range(0, shard.num_tokens, BATCH_TOKENS):
            batch = shard.select(slice(start, start + BATCH_TOKENS)).to(device)
            top = predict(batch).topk(batch.target_ids.shape[-1]).indices  # [P, T, K]
            is_there = (batch.target_ids.unsqueeze(-1) == top.unsqueeze(-2)).any(-1)
            found.append(is_there.float().mean(dim=(0, 2)).cpu())
    return torch.cat(found).view(traces.num_sequences, -1)


def trained(traces: Traces, spec: EstimatorSpec, epochs: int, out: Path, device: str) -> Any:
    """Estimators trained on traces as train-estimator does."""
    config = FitConfig(epochs=epochs)
    train_estimator(traces, spec, config, out, device=device)  # type: ignore[arg-type]
    return load_run(out).stack
