"""A free linear map from the source features, without the target router as an anchor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.inputs import ALL_PAIRS
from foreroute.estimators.types import EstimatorSpec


class Linear(EstimatorForm):
    """Features W + bias, both zero at the start."""

    is_anchored: ClassVar[bool] = False
    is_affine: ClassVar[bool] = True

    def __init__(
        self, spec: EstimatorSpec, *, num_pairs: int, hidden_size: int, num_experts: int
    ) -> None:
        super().__init__(
            spec, num_pairs=num_pairs, hidden_size=hidden_size, num_experts=num_experts
        )
        self.weight = nn.Parameter(torch.zeros(num_pairs, hidden_size, num_experts))
        self.bias = nn.Parameter(torch.zeros(num_pairs, 1, num_experts))

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        return torch.baddbmm(self.bias[pairs], features, self.weight[pairs])
