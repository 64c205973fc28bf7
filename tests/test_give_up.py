"""Prefetch rests while it saves less than it takes, and is tried again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from foreroute.runtime.device.kernels.tables import (
    MISSES,
    NUM_COUNTERS,
    PREFETCHES,
    REGRETS,
    TAILS,
)
from foreroute.runtime.device.ledger import (
    BLOCK_STEPS,
    COLD_STEPS,
    LONGEST_PERIOD_STEPS,
    TRIAL_STEPS,
    Trials,
)
from foreroute.runtime.host.ledger import Early, HostLedger
from foreroute.runtime.policies.give_up import (
    LOOK_AHEAD,
    ON_DEMAND,
    PERIOD_STEPS,
    GiveUp,
)


@dataclass
class Moment:
    """A made-up device's clock and counters."""

    ms: float
    counters: list[int]
    is_there: bool = True

    def is_past(self) -> bool:
        return self.is_there

    def ms_since(self, earlier: Any) -> float:
        return self.ms - float(earlier.ms)


def trials_of(now: Moment, forget: Callable[[], object] = lambda: None) -> Trials:
    def mark(_: int) -> Moment:
        return Moment(now.ms, list(now.counters), now.is_there)

    return Trials(mark, base_ms=2.0, forget=forget)


def variants(
    steps: int,
    saved_ms: float,
    spent_ms: float,
    cold_steps: int = 0,
    text_steps: int = 0,
    disturbed: tuple[int, ...] = (),
) -> list[int]:
    """What is chosen where a step needs 0 to 6 absent experts, of 1 ms each, and 2 without any.

    The first `cold_steps` need 100 more, which take .9 ms each. Looking ahead takes `spent_ms`, and
    saves `saved_ms` of the first of them; the second comes early as a whole. After every
    `text_steps` a text ends, and another one's prompt takes 1000 ms. Each step of the `disturbed`
    blocks of the first trial takes 10 ms more.
    """
    now = Moment(0.0, [0] * NUM_COUNTERS)
    trials = trials_of(now)
    chosen = []
    for step in range(steps):
        if text_steps and step and step % text_steps == 0:
            trials.break_off()
            now.ms += 1000.0
        chosen.append(trials.next_variant())
        needed = step * 5 % 7
        now.ms += 2.0 + needed
        if step >= COLD_STEPS and (step - COLD_STEPS) // BLOCK_STEPS in disturbed:
            now.ms += 10.0
        if step < cold_steps:
            now.ms += 0.9 * 100
            now.counters[MISSES] += 100
        if chosen[-1] == LOOK_AHEAD:
            begun, early = min(needed, 1), int(needed > 1)
            now.ms += spent_ms - saved_ms * begun - early
            now.counters[TAILS] += begun
            now.counters[PREFETCHES] += early
            needed -= begun + early
        now.counters[MISSES] += needed
    return chosen


def test_prefetch_that_pays_goes_on() -> None:
    chosen = variants(2 * PERIOD_STEPS, saved_ms=0.8, spent_ms=1.0)
    assert set(chosen[COLD_STEPS + TRIAL_STEPS : PERIOD_STEPS]) == {LOOK_AHEAD}
    assert chosen[: 2 * BLOCK_STEPS] == [LOOK_AHEAD] * BLOCK_STEPS + [ON_DEMAND] * BLOCK_STEPS


def test_prefetch_that_does_not_pay_is_tried_ever_more_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    chosen = variants(2 * LONGEST_PERIOD_STEPS, saved_ms=0.3, spent_ms=1.2)
    assert set(chosen[COLD_STEPS + TRIAL_STEPS + 1 : PERIOD_STEPS]) == {ON_DEMAND}
    tried = chosen.count(LOOK_AHEAD) / len(chosen)
    assert 0 < tried <= 5 * TRIAL_STEPS / (2 * LONGEST_PERIOD_STEPS)
    (message,) = caplog.messages
    assert "Prefetch rests: a step that looks ahead takes" in message


def test_what_slots_cost_while_they_fill_is_not_put_down_to_later_misses() -> None:
    chosen = variants(PERIOD_STEPS, saved_ms=0.3, spent_ms=1.3, cold_steps=BLOCK_STEPS)
    assert set(chosen[COLD_STEPS + TRIAL_STEPS + 1 :]) == {ON_DEMAND}


def test_a_gain_that_may_be_chance_is_none() -> None:
    for saved_ms, variant in ((0.3, ON_DEMAND), (0.5, LOOK_AHEAD)):  # .5 % of a step, and 4 %
        chosen = variants(PERIOD_STEPS, saved_ms=saved_ms, spent_ms=0.985)
        assert set(chosen[COLD_STEPS + TRIAL_STEPS + 1 :]) == {variant}


@pytest.mark.parametrize("disturbed", [(0,), (1,), (6,), (7,), (2, 3), (5, 6)])
def test_blocks_that_are_disturbed_are_no_evidence(disturbed: tuple[int, ...]) -> None:
    for saved_ms, spent_ms, variant in ((0.8, 1.0, LOOK_AHEAD), (0.3, 1.2, ON_DEMAND)):
        chosen = variants(PERIOD_STEPS, saved_ms, spent_ms, disturbed=disturbed)
        assert set(chosen[COLD_STEPS + TRIAL_STEPS + 1 :]) == {variant}


@pytest.mark.parametrize("text_steps", [24, 30, 40, 46, 70])
def test_prompts_between_texts_are_put_down_to_no_step(text_steps: int) -> None:
    for saved_ms, spent_ms, variant in ((0.8, 1.0, LOOK_AHEAD), (0.3, 1.2, ON_DEMAND)):
        chosen = variants(PERIOD_STEPS, saved_ms, spent_ms, text_steps=text_steps)
        assert set(chosen[PERIOD_STEPS // 2 :]) == {variant}


def test_a_trial_that_is_never_read_does_not_keep_the_next_one_from_being_read() -> None:
    now = Moment(0.0, [0] * NUM_COUNTERS)
    trials = trials_of(now)
    now.is_there = False
    for step in range(3 * PERIOD_STEPS):
        now.is_there = step > PERIOD_STEPS
        now.ms += 3.0 if trials.next_variant() == LOOK_AHEAD else 2.0
    assert not trials.is_worth_it


@pytest.mark.parametrize(("regrets", "variant"), [(0, LOOK_AHEAD), (1, ON_DEMAND)])
def test_what_is_missed_for_what_came_early_is_put_down_to_that(regrets: int, variant: int) -> None:
    now = Moment(0.0, [0] * NUM_COUNTERS)
    trials = trials_of(now)
    chosen = []
    for step in range(PERIOD_STEPS):
        chosen.append(trials.next_variant())
        misses = 2 + step % 3
        if chosen[-1] == LOOK_AHEAD:  # one comes early, and perhaps one more must come
            now.counters[PREFETCHES] += 1
            now.counters[REGRETS] += regrets
            misses += regrets - 1
        now.counters[MISSES] += misses
        now.ms += 2.0 + misses
    assert set(chosen[COLD_STEPS + TRIAL_STEPS + 1 :]) == {variant}


def test_every_trial_begins_with_what_earlier_guesses_came_to_forgotten() -> None:
    forgotten: list[int] = []
    now = Moment(0.0, [0] * NUM_COUNTERS, is_there=False)
    trials = trials_of(now, lambda: forgotten.append(int(now.ms)))
    give_up = GiveUp(HostLedger(1.0), TRIAL_STEPS, lambda: forgotten.append(-int(now.ms)))
    while now.ms < 2 * PERIOD_STEPS:
        trials.next_variant()
        give_up.next_variant()
        now.ms += 1.0
    assert forgotten == [0, COLD_STEPS, -PERIOD_STEPS, COLD_STEPS + PERIOD_STEPS]


@pytest.mark.parametrize("text_steps", [5, 20])
def test_a_trial_that_texts_break_off_begins_once(text_steps: int) -> None:
    now, forgotten = Moment(0.0, [0] * NUM_COUNTERS), list[float]()
    trials = trials_of(now, lambda: forgotten.append(now.ms))
    for step in range(PERIOD_STEPS):
        if step % text_steps == 0:
            trials.break_off()
        trials.next_variant()
        now.ms += 1.0
    assert forgotten == [COLD_STEPS]


def test_where_nothing_can_be_saved_nothing_is_tried() -> None:
    give_up = GiveUp(None)
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
