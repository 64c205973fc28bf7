"""What every estimator form is: P small predictors, evaluated together or one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from foreroute.estimators.inputs import ALL_PAIRS
from foreroute.estimators.types import EstimatorSpec


class EstimatorForm(nn.Module, ABC):
    """Maps source features to the target routers' logits, for P layer pairs at once.

    A subclass creates its parameters in `__init__` with the pairs as first dimension, so that
    `parameter[pairs]` is a view and no form loops over layers. What all pairs share has a first
    dimension of 1.
    """

    is_anchored: ClassVar[bool] = True
    """Whether `forward` reads the anchor logits; a form that does not works for any router."""
    is_closed_form: ClassVar[bool] = False
    """Whether the ridge solution is all of its training."""
    is_affine: ClassVar[bool] = False
    """Whether it is one affine map of the features, which the runtime folds into one matrix: such
    a form costs what the next router costs."""
    correction_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that what is added to the anchor logits is proportional to, taken together, so
    that training can shrink it; none if the form cannot be shrunk that way."""

    def __init__(
        self, spec: EstimatorSpec, *, num_pairs: int, hidden_size: int, num_experts: int
    ) -> None:
        """Make the parameters.

        Args:
            spec: Holds the form's sizes (rank, width).
            num_pairs: P, pairs of source and target layer.
            hidden_size: D.
            num_experts: E.
        """
        super().__init__()

    @abstractmethod
    def forward(self, features: Tensor, anchor_logits: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """Predict the target routers' logits.

        Args:
            features: Source features of the pairs asked for, [P, T, D], float32.
            anchor_logits: What the target routers give for those features, [P, T, E], float32;
                [P, T, 0] if the form is not anchored.
            pairs: Which pairs the first dimension stands for.

        Returns:
            [P, T, E], float32.
        """

    def scale_correction(self, shares: Tensor) -> None:
        """Multiply what is added to the anchor logits, in place; others stay as they are.

        Args:
            shares: One factor per pair, [P].
        """
        for name in self.correction_parameters:
            self.get_parameter(name).mul_(shares.view(-1, 1, 1))
