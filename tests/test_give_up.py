"""Prefetch rests while it saves less than it takes, and is tried again."""

import pytest
import torch

from foreroute.runtime.device.ledger import TRIAL_STEPS, DeviceLedger
from foreroute.runtime.host.ledger import Early, HostLedger
from foreroute.runtime.policies.give_up import LOOK_AHEAD, ON_DEMAND, PERIOD_STEPS, GiveUp


def variants(used_per_step: list[int], steps: int, cost_ms: float) -> list[int]:
    """What is chosen in each step when so many prefetches of 1 ms are used, period by period."""
    counters = torch.zeros(2, 7, dtype=torch.int32)
    ledger = DeviceLedger(counters, lambda change: float(change[5]), cost_ms)
    give_up = GiveUp(ledger, TRIAL_STEPS)
    chosen = []
    for step in range(steps):
        chosen.append(give_up.next_variant())
        if chosen[-1] == LOOK_AHEAD:
            counters[0, 5] += used_per_step[step // PERIOD_STEPS]
    return chosen


def test_prefetch_that_pays_goes_on() -> None:
    assert set(variants([2, 2], 2 * PERIOD_STEPS, cost_ms=1.5)) == {LOOK_AHEAD}


def test_prefetch_that_does_not_pay_rests_until_the_next_trial(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    chosen = variants([1, 3], 2 * PERIOD_STEPS, cost_ms=1.5)
    trial, rest = chosen[:TRIAL_STEPS], chosen[TRIAL_STEPS:PERIOD_STEPS]
    assert set(trial) == {LOOK_AHEAD}
    assert set(rest) == {ON_DEMAND}
    assert set(chosen[PERIOD_STEPS:]) == {LOOK_AHEAD}  # by then it pays
    off, on = caplog.messages
    assert "Prefetch rests: a step that looks ahead saves 1.000 ms and takes 1.500 ms more" in off
    assert "Prefetch goes on: a step that looks ahead saves 3.000 ms" in on


def test_where_nothing_can_be_saved_nothing_is_tried() -> None:
    give_up = GiveUp(None, TRIAL_STEPS)
    assert {give_up.next_variant() for _ in range(2 * PERIOD_STEPS)} == {ON_DEMAND}


def test_early_experts_save_what_of_their_copies_was_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foreroute.runtime.host.ledger.perf_counter", lambda: 10.0)
    ledger = HostLedger(copy_ms=4.0)
    ledger.open()
    ledger.count_needed(Early(asked_at=9.0, num_copies=2))  # a second ago: both are there
    ledger.count_needed(Early(asked_at=9.998, num_copies=1))  # 2 ms ago: half of it
    ledger.count_needed(Early(asked_at=9.998, num_copies=2))  # half of one of two
    ledger.count_delay(Early(asked_at=9.998, num_copies=1))  # the rest of it is in the way
    ledger.count_delay(Early(asked_at=9.0, num_copies=1))
    assert ledger.balance() is None
    ledger.close(1)
    assert ledger.balance() == pytest.approx((4 + 2 + 1, 2))
    assert ledger.balance() is None
