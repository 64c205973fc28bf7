"""A state's norm that is taken by whatever launch reads it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foreroute.runtime.device.fusions.deferred import Known, Source
from foreroute.runtime.device.kernels.norm import Norm, normed


class Normed(Source):
    """A state's norm, left to the products that read it."""

    def __init__(self, state: Known, norm: Norm) -> None:
        """Defer it.

        Args:
            state: What is normed.
            norm: How.
        """
        self.before, self.norm, self.counts = state, norm, state.counts
        self.open_products: Any = None
        """The last product of it, where others may still join."""

    def compute(self) -> Tensor:
        """The normed state, [T, D]."""
        return normed(self.before.state, self.norm)
