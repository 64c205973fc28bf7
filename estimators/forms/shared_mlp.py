"""The paper's form (arXiv 2603.19289): one network for all layers, told which layer it predicts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.inputs import ALL_PAIRS
from foreroute.estimators.types import EstimatorSpec


class SharedMLP(EstimatorForm):
    """GELU(features W1 + embedding of the pair) W2 + b2, with W1, W2 and b2 shared by all pairs.

    The embedding, one vector per pair, is added in the hidden layer: as adding it to the features,
    whatever it is there, but for its size. It is random at the start, so that layers use hidden
    units of their own; W2 and b2 are zero.
    """

    is_anchored: ClassVar[bool] = False

    def __init__(
        self, spec: EstimatorSpec, *, num_pairs: int, hidden_size: int, num_experts: int
    ) -> None:
        super().__init__(
            spec, num_pairs=num_pairs, hidden_size=hidden_size, num_experts=num_experts
        )
        self.down = nn.Parameter(torch.randn(1, hidden_size, spec.width) * hidden_size**-0.5)
        self.embedding = nn.Parameter(torch.randn(num_pairs, 1, spec.width))
        self.up = nn.Parameter(torch.zeros(1, spec.width, num_experts))
        self.up_bias = nn.Parameter(torch.zeros(1, 1, num_experts))

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        hidden = functional.gelu(torch.matmul(features, self.down[0]) + self.embedding[pairs])
        return torch.matmul(hidden, self.up[0]) + self.up_bias
