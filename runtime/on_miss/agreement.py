"""When to stop: too few of the experts that ran are the true router's."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

WINDOW_LAYER_STEPS = 256
"""Layers of decode steps that are judged together."""


class AgreementGuard:
    """Ends speculative execution when too few of its experts are the true router's."""

    def __init__(self, floor: float) -> None:
        """Start trusting.

        Args:
            floor: Least share of agreement over a window of layer steps, 0..1.
        """
        self.floor = floor
        self.is_open = True
        self._agreed = self._run = self._layer_steps = 0

    def observe(self, num_agreed: int, num_run: int) -> None:
        """Count one layer's experts for one step; may close the guard for good."""
        if not self.is_open:
            return
        self._agreed += num_agreed
        self._run += num_run
        self._layer_steps += 1
        if self._layer_steps == WINDOW_LAYER_STEPS:
            self.judge(self._agreed, self._run)
            self._agreed = self._run = self._layer_steps = 0

    def judge(self, num_agreed: int, num_run: int) -> None:
        """Close the guard, and say so, if a window's agreement is under the floor."""
        if num_agreed >= self.floor * num_run:
            return
        self.is_open = False
        logger.warning(
            "Speculative execution is off from here: only %.0f %% of the experts run were the "
            "true router's, the floor is %.0f %%.",
            100 * num_agreed / num_run,
            100 * self.floor,
        )
