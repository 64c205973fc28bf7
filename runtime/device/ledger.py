"""Whether looking ahead pays on the device: by the steps' time and counters, without waiting."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import NamedTuple

from foreroute.runtime.device.kernels.tables import MISSES, PREFETCHES, REGRETS, TAILS, WASTED
from foreroute.runtime.device.marks import Mark
from foreroute.runtime.policies.give_up import LOOK_AHEAD, ON_DEMAND, PERIOD_STEPS, Balance

logger = logging.getLogger(__name__)

BLOCK_STEPS, BLOCKS = 8, 8
"""A trial's steps look ahead for a block, decide on demand for the next one, and so on."""
TRIAL_STEPS = BLOCK_STEPS * BLOCKS
NUM_MARKS = 2 * BLOCKS
"""Before and after every block of a trial."""
COLD_STEPS = 2 * BLOCK_STEPS
"""Before the first trial they take turns too, uncounted: while slots fill, many experts come at
once, each for less than a miss takes later."""
LEAST_GAIN = 1.01
"""A trial is of few steps, and experts that prefetches drove out look as if they had saved them:
what it finds beyond this is no chance."""
LONGEST_PERIOD_STEPS = 8 * PERIOD_STEPS


class _Block(NamedTuple):
    """What a trial's steps of one variant took, one after the other."""

    ms: float
    counts: list[int]
    """What each counter gained."""


class Trials:
    """Chooses for every decode step whether it looks ahead.

    In a trial both variants take turns. What a step on demand takes beyond one that misses nothing
    is put down to its misses; a step that looks ahead is compared with what its experts would then
    have taken on demand, as tokens differ far more in what they need than the variants in time.
    An expert that something begun early drove out, and that was then missed, would have been there.
    Each block is compared with the next one, and the median counts: a link that others use too is
    slower at times, and steps that are disturbed then are no evidence.
    Trials that find nothing come again after ever longer periods.
    """

    def __init__(
        self, mark: Callable[[int], Mark], *, base_ms: float, forget: Callable[[], object]
    ) -> None:
        """Begin with a trial.

        Args:
            mark: Marks the moment before a step, as one of `NUM_MARKS`; forgets that one's last.
            base_ms: A step on demand that misses nothing.
            forget: Called when a trial begins: guesses that nothing is begun for any more, as
                earlier ones came to nothing, are tried again too.
        """
        self._mark, self._base_ms, self._forget = mark, base_ms, forget
        self._at, self._period = -COLD_STEPS, PERIOD_STEPS
        self._is_new = True
        """Whether the next trial has not begun yet; one that a text's end broke off has."""
        self._begins: list[Mark] = []
        self._ends: list[Mark] = []
        self.is_worth_it = True

    def next_variant(self) -> int:
        """Called once before every decode step: `LOOK_AHEAD` or `ON_DEMAND`."""
        at, self._at = self._at, self._at + 1
        if at == 0 and self._is_new:
            self._is_new = False
            self._forget()
        if 0 <= at <= TRIAL_STEPS and at % BLOCK_STEPS == 0:
            self._turn(at // BLOCK_STEPS)
        if len(self._ends) == BLOCKS and self._ends[-1].is_past():
            self._decide(self._balance())
            self._begins, self._ends = [], []
        if self._at >= self._period:
            self._at, self._is_new = 0, True
        if at < TRIAL_STEPS:
            return ON_DEMAND if at // BLOCK_STEPS % 2 else LOOK_AHEAD
        return LOOK_AHEAD if self.is_worth_it else ON_DEMAND

    def break_off(self) -> None:
        """Called when a text ends: a block that has begun begins anew, after the next prompt."""
        if len(self._ends) < len(self._begins):
            self._begins.pop()
            self._at = BLOCK_STEPS * len(self._begins)

    def _turn(self, block: int) -> None:
        """Mark that a block begins, if it is one of the trial, and that the one before it ends."""
        if len(self._ends) < len(self._begins):
            self._ends.append(self._mark(2 * len(self._ends) + 1))
        if block < BLOCKS:
            del self._begins[block:], self._ends[block:]  # of a trial that was never read
            self._begins.append(self._mark(2 * block))

    def _balance(self) -> Balance:
        """What one step that looks ahead took and saved, from a trial that is over."""
        balances = [self._balance_of(block) for block in range(0, BLOCKS, 2)]
        balances.sort(key=lambda balance: balance.saved_ms - balance.spent_ms)
        saved_ms, spent_ms = zip(*balances[BLOCKS // 4 - 1 : BLOCKS // 4 + 1], strict=True)
        return Balance(statistics.fmean(saved_ms), statistics.fmean(spent_ms))

    def _balance_of(self, block: int) -> Balance:
        """The same of one block that looks ahead, by the one on demand after it."""
        ahead, demand = self._block(block), self._block(block + 1)
        # less than an expert takes on the link, where products of others run meanwhile
        miss_ms = 0.0
        if demand.counts[MISSES]:
            miss_ms = max(0.0, demand.ms - BLOCK_STEPS * self._base_ms) / demand.counts[MISSES]
        both = [a + b for a, b in zip(ahead.counts, demand.counts, strict=True)]
        saved = both[TAILS] + max(0, both[PREFETCHES] - both[WASTED]) - both[REGRETS]
        on_demand_ms = self._base_ms + miss_ms * (ahead.counts[MISSES] + saved) / BLOCK_STEPS
        return Balance(saved_ms=on_demand_ms, spent_ms=ahead.ms / BLOCK_STEPS)

    def _block(self, block: int) -> _Block:
        begin, end = self._begins[block], self._ends[block]
        changes = [b - a for a, b in zip(begin.counters, end.counters, strict=True)]
        return _Block(end.ms_since(begin), changes)

    def _decide(self, balance: Balance) -> None:
        was_worth_it = self.is_worth_it
        self.is_worth_it = balance.saved_ms > LEAST_GAIN * balance.spent_ms
        longer = min(LONGEST_PERIOD_STEPS, 2 * self._period)
        self._period = PERIOD_STEPS if self.is_worth_it else longer
        if self.is_worth_it != was_worth_it:
            logger.info(
                "Prefetch %s: a step that looks ahead takes %.3f ms, on demand %.3f ms; "
                "tried again in %d steps.",
                "goes on" if self.is_worth_it else "rests",
                balance.spent_ms,
                balance.saved_ms,
                self._period - self._at,
            )
