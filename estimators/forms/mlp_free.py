"""One hidden layer from the source features, without the target router as an anchor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foreroute.estimators.forms.mlp import MLP
from foreroute.estimators.inputs import ALL_PAIRS


class MLPFree(MLP):
    """GELU(features W1 + b1) W2 + b2, with W2 and b2 zero at the start."""

    is_anchored: ClassVar[bool] = False
    correction_parameters: ClassVar[tuple[str, ...]] = ()

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        return torch.baddbmm(self.up_bias[pairs], self.hidden(features, pairs), self.up[pairs])
