"""Prefetch rests while it saves less than it costs, and is tried again."""

import torch

from foreroute.runtime.device.give_up import LOOK_AHEAD, ON_DEMAND, REST_STEPS, TRIAL_STEPS, GiveUp

PERIOD = TRIAL_STEPS + REST_STEPS


def variants(used_per_step: list[int], steps: int, cost_ms: float) -> list[int]:
    """What is chosen in each step when so many prefetches of 1 ms are used, period by period."""
    counters = torch.zeros(2, 7, dtype=torch.int32)
    give_up = GiveUp(counters, lambda change: float(change[5]), cost_ms)
    chosen = []
    for step in range(steps):
        chosen.append(give_up.next_variant())
        if chosen[-1] == LOOK_AHEAD:
            counters[0, 5] += used_per_step[step // PERIOD]
    return chosen


def test_prefetch_that_pays_goes_on() -> None:
    assert set(variants([2, 2], 2 * PERIOD, cost_ms=1.5)) == {LOOK_AHEAD}


def test_prefetch_that_does_not_pay_rests_until_the_next_trial() -> None:
    chosen = variants([1, 3], 2 * PERIOD, cost_ms=1.5)
    trial, rest = chosen[:TRIAL_STEPS], chosen[TRIAL_STEPS:PERIOD]
    assert set(trial) == {LOOK_AHEAD}
    assert set(rest) == {ON_DEMAND}
    assert set(chosen[PERIOD:]) == {LOOK_AHEAD}  # by then it pays
