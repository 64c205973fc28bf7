"""Where the host decides, prefetch that does not pay ends by itself and changes no token."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from foreroute.estimators import EstimatorStack
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.host.ledger import TRIAL_STEPS
from foreroute.runtime.host.transfers import ImmediateTransfers, Ticket, Transfers
from foreroute.runtime.policies import give_up
from foreroute.runtime.store.offload import OffloadedModel, offload

PERIOD, TOKENS, SOURCES = 40, 91, 3
LAYER_S, COPY_S = 1e-3, 2e-3
AUTO = {"expert_slots": "3", "prefetch": "auto"}


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Landing(Ticket):
    """Copies that have landed at a time."""

    def __init__(self, clock: Clock, at: float) -> None:
        self._clock, self._at = clock, at

    def is_done(self) -> bool:
        return self._clock.now >= self._at

    def wait(self) -> None:
        self._clock.now = max(self._clock.now, self._at)


class SlowLink(Transfers):
    """One copy after the other, beside what computes."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._free = clock, 0.0

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Ticket:
        for host_row, slot in pairs:
            slot.copy_(host_row)
        self._free = max(self._free, self._clock.now) + COPY_S * len(pairs)
        return Landing(self._clock, self._free)


class Guesses(EstimatorStack):
    """Predicts what it is told to, and takes its time."""

    def predict(self, source_layer: int, *, router_input: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        self.clock.now += self.predict_s
        if not self.future:
            return torch.rand(len(router_input), 8)
        expected: Tensor = self.future[self.target_of(source_layer)].pop(0)
        return torch.full((len(expected), 8), -9.0).scatter_(1, expected, 9.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("foreroute.runtime.host.ledger.perf_counter", made)
    monkeypatch.setattr(give_up, "PERIOD_STEPS", PERIOD)
    return made


@pytest.fixture
def slow_link(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "for_device", lambda *_: SlowLink(clock))


@pytest.fixture
def offloaded(tiny_moe: Any, clock: Clock) -> OffloadedModel:
    """The tiny model; each of its layers takes a while."""
    model = copy.deepcopy(tiny_moe.model)
    found = offload(model, device=torch.device("cpu"), model_name="tiny")
    for layer in found.moe.layers:
        layer.router.register_forward_pre_hook(
            lambda *_: setattr(clock, "now", clock.now + LAYER_S)
        )
    return found


def guesses(tiny: Any, clock: Clock, predict_s: float) -> Guesses:
    stack = Guesses.training_free(tiny.moe.geometry, tiny.moe.anchors)
    stack.clock, stack.predict_s, stack.calls, stack.future = clock, predict_s, 0, {}
    return stack


def generate(engine: Any, count: int = TOKENS) -> Tensor:
    tokens = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    output: Tensor = engine.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return output


def on_demand(offloaded: OffloadedModel, clock: Clock) -> tuple[Tensor, float, dict[int, Any]]:
    """Tokens, seconds and routing of decode steps."""
    ids: dict[int, list[Tensor]] = {layer.layer_idx: [] for layer in offloaded.moe.layers}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, output, idx=layer.layer_idx: ids[idx].append(output[2])
        )
        for layer in offloaded.moe.layers
    ]
    start = clock.now
    with Engine(offloaded, EngineConfig(expert_slots="3")) as engine:
        tokens = generate(engine)
    for hook in hooks:
        hook.remove()
    return tokens, clock.now - start, {idx: rows[1:] for idx, rows in ids.items()}


@pytest.mark.usefixtures("slow_link")
def test_a_predictor_that_never_helps_is_asked_in_trials_alone(
    tiny_moe: Any, offloaded: OffloadedModel, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    expected, _, _ = on_demand(offloaded, clock)
    useless = guesses(tiny_moe, clock, predict_s=5e-3)
    with Engine(offloaded, EngineConfig(**AUTO), useless) as engine:
        assert torch.equal(generate(engine), expected)
        stats = engine.stats()
        engine.check_integrity()
    assert stats.decode.forwards == TOKENS - 1
    in_trials = 2 * TRIAL_STEPS + (TOKENS - 1 - 2 * PERIOD)  # the third has just begun
    assert stats.steps_ahead == in_trials
    assert useless.calls == in_trials * SOURCES
    assert stats.share_ahead == in_trials / (TOKENS - 1)
    assert len([text for text in caplog.messages if text.startswith("Prefetch rests")]) == 1


@pytest.mark.usefixtures("slow_link")
def test_a_predictor_that_helps_is_asked_all_the_time_and_saves_time(
    tiny_moe: Any, offloaded: OffloadedModel, clock: Clock
) -> None:
    expected, seconds, future = on_demand(offloaded, clock)
    oracle = guesses(tiny_moe, clock, predict_s=1e-5)
    oracle.future = future
    start = clock.now
    with Engine(offloaded, EngineConfig(**AUTO), oracle) as engine:
        assert torch.equal(generate(engine), expected)
        stats = engine.stats()
    assert stats.steps_ahead == stats.decode.forwards
    assert stats.decode.late > 0
    assert clock.now - start < 0.95 * seconds


@pytest.mark.usefixtures("slow_link")
@pytest.mark.parametrize(
    "settings", [{"prefetch": "all"}, {"on_miss": "predicted", "agreement_floor": 0.0}]
)
def test_forced_and_speculative_prefetch_never_gives_up(
    tiny_moe: Any, offloaded: OffloadedModel, clock: Clock, settings: dict[str, Any]
) -> None:
    useless = guesses(tiny_moe, clock, predict_s=5e-3)
    with Engine(offloaded, EngineConfig(**(AUTO | settings)), useless) as engine:
        generate(engine)
        assert engine.stats().share_ahead == 1
    assert useless.calls == (TOKENS - 1) * SOURCES


def test_where_copies_hide_behind_nothing_nothing_is_predicted(
    tiny_moe: Any, offloaded: OffloadedModel, clock: Clock
) -> None:
    assert not ImmediateTransfers.can_hide
    expected, _, _ = on_demand(offloaded, clock)
    unused = guesses(tiny_moe, clock, predict_s=0.0)
    with Engine(offloaded, EngineConfig(**AUTO), unused) as engine:
        assert torch.equal(generate(engine), expected)
        assert engine.stats().share_ahead == 0
        assert engine.stats().decode.prefetches == 0
    assert unused.calls == 0
