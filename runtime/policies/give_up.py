"""Turns prefetch off while it saves less time than looking ahead takes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)

LOOK_AHEAD, ON_DEMAND = 0, 1
"""Variants of the decode step."""
PERIOD_STEPS = 512
"""Decode steps from one trial to the next."""
WARM_UP_STEPS = 1
"""First steps of a trial that are not counted: kernels may be loaded in them."""


class Balance(NamedTuple):
    """What one decode step that looks ahead saves and takes."""

    saved_ms: float
    """Stall that prefetches saved."""
    spent_ms: float
    """What predicting and prefetching took."""


class Ledger(ABC):
    """Counts what looking ahead saves and takes, without waiting for the device."""

    @abstractmethod
    def open(self) -> None:
        """A trial begins."""

    @abstractmethod
    def close(self, num_steps: int) -> None:
        """The trial has ended, after so many steps."""

    @abstractmethod
    def balance(self) -> Balance | None:
        """A trial's sums over its steps; given once, as soon as they are known after its end."""


class GiveUp:
    """Chooses for every decode step whether it looks ahead.

    Every `PERIOD_STEPS` steps the first ones look ahead whatever came before; what they saved and
    took decides on the rest.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        trial_steps: int = 0,
        forget: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin with a trial.

        Args:
            ledger: None where nothing can be saved: then no step looks ahead.
            trial_steps: Length of a trial, its warm-up included.
            forget: Called when a trial begins: guesses that nothing is begun for any more, as
                earlier ones came to nothing, are tried again too.
        """
        self._ledger, self._trial_steps, self._forget = ledger, trial_steps, forget
        self._step = 0
        self.is_worth_it = ledger is not None

    def next_variant(self) -> int:
        """Called once before every decode step: `LOOK_AHEAD` or `ON_DEMAND`."""
        if self._ledger is None:
            return ON_DEMAND
        at = self._step % PERIOD_STEPS
        self._step += 1
        if at == 0:
            self._forget()
        if at == WARM_UP_STEPS:
            self._ledger.open()
        elif at == self._trial_steps:
            self._ledger.close(at - WARM_UP_STEPS)
        balance = self._ledger.balance()
        if balance is not None:
            self._decide(balance)
        return LOOK_AHEAD if at < self._trial_steps or self.is_worth_it else ON_DEMAND

    def _decide(self, balance: Balance) -> None:
        was_worth_it, self.is_worth_it = self.is_worth_it, balance.saved_ms > balance.spent_ms
        if self.is_worth_it != was_worth_it:
            logger.info(
                "Prefetch %s: a step that looks ahead saves %.3f ms and takes %.3f ms more; "
                "tried every %d steps.",
                "goes on" if self.is_worth_it else "rests",
                balance.saved_ms / (self._trial_steps - WARM_UP_STEPS),
                balance.spent_ms / (self._trial_steps - WARM_UP_STEPS),
                PERIOD_STEPS,
            )
