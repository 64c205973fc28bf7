"""The next router plus a correction by one hidden layer that starts at zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.inputs import ALL_PAIRS
from foreroute.estimators.types import EstimatorSpec


class MLP(EstimatorForm):
    """Anchor logits + GELU(features W1 + b1) W2 + b2, with W2 and b2 zero at the start."""

    correction_parameters: ClassVar[tuple[str, ...]] = ("up", "up_bias")

    def __init__(
        self, spec: EstimatorSpec, *, num_pairs: int, hidden_size: int, num_experts: int
    ) -> None:
        super().__init__(
            spec, num_pairs=num_pairs, hidden_size=hidden_size, num_experts=num_experts
        )
        self.down = nn.Parameter(
            torch.randn(num_pairs, hidden_size, spec.width) * hidden_size**-0.5
        )
        self.down_bias = nn.Parameter(torch.zeros(num_pairs, 1, spec.width))
        self.up = nn.Parameter(torch.zeros(num_pairs, spec.width, num_experts))
        self.up_bias = nn.Parameter(torch.zeros(num_pairs, 1, num_experts))

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        start = anchor_logits + self.up_bias[pairs]
        return torch.baddbmm(start, self.hidden(features, pairs), self.up[pairs])

    def hidden(self, features: Tensor, pairs: slice) -> Tensor:
        """The hidden layer, [P, T, width]."""
        return functional.gelu(torch.baddbmm(self.down_bias[pairs], features, self.down[pairs]))
