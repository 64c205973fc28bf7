"""A toy model's routing, for tests of estimators that need no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from foreroute.data.batch import RecordedBatch
from foreroute.data.manifest import TraceManifest
from foreroute.estimators import LayerAnchors, MoEGeometry
from foreroute.estimators.types import RoutingRecord

if TYPE_CHECKING:
    from foreroute.data.trace_writer import ExpertSums
    from foreroute.train.prepared import PreparedBatch

NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 8, 2, 16


def toy_geometry(*layer_indices: int, **changes: Any) -> MoEGeometry:
    """8 experts, top-2, 16 hidden units; `changes` are other fields of `MoEGeometry`."""
    settings = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN_SIZE}
    return MoEGeometry(
        model_type="toy",
        layer_indices=layer_indices,
        router_fingerprint="f" * 64,
        **(settings | changes),
    )


def random_anchors(num_layers: int, seed: int | None = None, **changes: Any) -> LayerAnchors:
    """Anchors of so many layers; `changes` are other fields of `LayerAnchors`."""
    if seed is not None:
        torch.manual_seed(seed)
    settings = {
        "router_weight": torch.randn(num_layers, NUM_EXPERTS, HIDDEN_SIZE),
        "router_bias": torch.randn(num_layers, NUM_EXPERTS),
        "norm_weight": torch.rand(num_layers, HIDDEN_SIZE) + 0.5,
        "norm_bias": torch.randn(num_layers, HIDDEN_SIZE),
        "norm_kind": "rms",
        "norm_eps": 1e-6,
    }
    return LayerAnchors(**(settings | changes))


def toy_manifest(**changes: Any) -> TraceManifest:
    """Of traces of 3 layers: shards of 2 sequences of 4 tokens."""
    settings = {
        "geometry": toy_geometry(0, 1, 2),
        "model": "toy",
        "dataset": "toy",
        "split": "train",
        "tokens": 24,
        "sequence_length": 4,
        "generated_share": 0.0,
        "dtype": "float32",
        "states_dtype": "float32",
        "device": "cpu",
        "batch_size": 2,
        "shard_sequences": 2,
        "seed": 0,
        "norm_kind": "rms",
        "norm_eps": 1e-6,
        "command": "none",
        "versions": {},
    }
    return TraceManifest(**(settings | changes))


def random_batch(manifest: TraceManifest, seed: int) -> tuple[RecordedBatch, ExpertSums]:
    """What a recorder might have seen of one shard's two sequences."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 2 * manifest.sequence_length

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def record() -> RoutingRecord:
        logits = random(num_tokens, NUM_EXPERTS)
        return RoutingRecord(
            residual=random(num_tokens, HIDDEN_SIZE),
            router_input=random(num_tokens, HIDDEN_SIZE),
            router_logits=logits,
            expert_ids=logits.topk(TOP_K).indices,
            gate_weights=logits.softmax(-1).topk(TOP_K).values,
        )

    layers = manifest.geometry.layer_indices
    sums = random(NUM_EXPERTS, HIDDEN_SIZE), torch.ones(NUM_EXPERTS, dtype=torch.int64)
    return RecordedBatch(
        token_ids=torch.arange(num_tokens).view(2, -1),
        positions=torch.arange(manifest.sequence_length).expand(2, -1),
        num_prompt_tokens=torch.full((2, 1), manifest.sequence_length - 1),
        records={layer: record() for layer in layers},
    ), dict.fromkeys(layers, sums)


class Listed:
    """Prepared tokens in memory, as training reads them."""

    def __init__(self, *batches: PreparedBatch) -> None:
        self.batches = batches
        self.rows = {i: slice(0, batch.num_tokens) for i, batch in enumerate(batches)}

    def read(self, shard_idx: int) -> PreparedBatch:
        """The tokens of one shard."""
        return self.batches[shard_idx]
