"""Training-free: the target layer's own router, applied early."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.inputs import ALL_PAIRS


class NextRouter(EstimatorForm):
    """Returns the anchor logits; has no parameters."""

    is_affine: ClassVar[bool] = True

    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """See `EstimatorForm.forward`."""
        return anchor_logits
