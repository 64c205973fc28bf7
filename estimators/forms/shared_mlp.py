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
    """GELU(features W1 + embedding of the pair), further hidden layers, then a linear map.

    All pairs share everything but the embedding, which is one vector per pair. It is added to what
    the first hidden layer gets; a vector added to the features would do the same with more numbers.
    It is random at the start, so that pairs use hidden units of their own; the last map is zero.
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
        self.num_further = spec.depth - 1
        if self.num_further:
            further = torch.randn(1, self.num_further, spec.width, spec.width)
            self.further = nn.Parameter(further * (2 / spec.width) ** 0.5)
            self.further_bias = nn.Parameter(torch.zeros(1, self.num_further, spec.width))
        self.up = nn.Parameter(torch.zeros(1, spec.width, num_experts))
        self.up_bias = nn.Parameter(torch.zeros(1, 1, num_experts))

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        hidden = functional.gelu(torch.matmul(features, self.down[0]) + self.embedding[pairs])
        for layer in range(self.num_further):
            hidden = torch.matmul(hidden, self.further[0, layer]) + self.further_bias[0, layer]
            hidden = functional.gelu(hidden)
        return torch.matmul(hidden, self.up[0]) + self.up_bias
