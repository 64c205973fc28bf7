"""The next router plus a correction of rank r, from ridge regression or from zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.inputs import ALL_PAIRS
from foreroute.estimators.types import EstimatorSpec


class LowRank(EstimatorForm):
    """Anchor logits + features A B + bias, with B and the bias zero until they are set.

    The rank is at most that of a map from D features to E experts.
    """

    is_affine: ClassVar[bool] = True
    correction_parameters: ClassVar[tuple[str, ...]] = ("up", "bias")

    def __init__(
        self, spec: EstimatorSpec, *, num_pairs: int, hidden_size: int, num_experts: int
    ) -> None:
        super().__init__(
            spec, num_pairs=num_pairs, hidden_size=hidden_size, num_experts=num_experts
        )
        rank = min(spec.rank, hidden_size, num_experts)
        self.down = nn.Parameter(torch.randn(num_pairs, hidden_size, rank) * hidden_size**-0.5)
        self.up = nn.Parameter(torch.zeros(num_pairs, rank, num_experts))
        self.bias = nn.Parameter(torch.zeros(num_pairs, 1, num_experts))

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        code = torch.bmm(features, self.down[pairs])  # [P, T, rank]
        return torch.baddbmm(anchor_logits + self.bias[pairs], code, self.up[pairs])
