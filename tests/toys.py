"""A toy model's routing, for tests of estimators that need no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from foreroute.estimators import LayerAnchors, MoEGeometry

if TYPE_CHECKING:
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


def random_anchors(num_layers: int, **changes: Any) -> LayerAnchors:
    """Anchors of so many layers; `changes` are other fields of `LayerAnchors`."""
    settings = {
        "router_weight": torch.randn(num_layers, NUM_EXPERTS, HIDDEN_SIZE),
        "router_bias": torch.randn(num_layers, NUM_EXPERTS),
        "norm_weight": torch.rand(num_layers, HIDDEN_SIZE) + 0.5,
        "norm_bias": torch.randn(num_layers, HIDDEN_SIZE),
        "norm_kind": "rms",
        "norm_eps": 1e-6,
    }
    return LayerAnchors(**(settings | changes))


class Listed:
    """Prepared tokens in memory, as training reads them."""

    def __init__(self, *batches: PreparedBatch) -> None:
        self.batches = batches
        self.rows = {i: slice(0, batch.num_tokens) for i, batch in enumerate(batches)}

    def read(self, shard_idx: int) -> PreparedBatch:
        """The tokens of one shard."""
        return self.batches[shard_idx]
