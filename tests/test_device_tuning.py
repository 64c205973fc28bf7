"""What a captured step measures of its machine, on a driver whose kernels are interpreted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from interpreted import decide_as_on_a_gpu
from step_cases import quicken
from tiny_models import tiny_model

from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.config import PrefetchMode
from foreroute.runtime.device import driver as driver_module
from foreroute.runtime.device.kernels.fetch import fetch
from foreroute.runtime.device.ledger import COLD_STEPS
from foreroute.runtime.device.timing import ms_of_one_more
from foreroute.runtime.policies.give_up import LOOK_AHEAD, ON_DEMAND
from foreroute.runtime.policies.prefetching import PRIOR_PREFETCHES
from foreroute.runtime.store.offload import OffloadedModel, offload

LAUNCH_MS, EXPERT_MS, LAYER_MS = 0.05, 0.04, 0.076


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> OffloadedModel:
    """Two layers of a tiny model; engines on it are driven as on a GPU, whose clock is made up."""
    quicken(monkeypatch)
    decide_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(driver_module, "milliseconds", lambda _: LAYER_MS)
    monkeypatch.setattr(driver_module, "DeviceMarks", lambda *_: lambda _: None)
    model = tiny_model("qwen3_moe", num_hidden_layers=2).eval()
    return offload(model, device=torch.device("cpu"), model_name="tiny")


def test_room_for_early_copies_is_that_of_the_link_not_of_a_launch(
    offloaded: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:

    def made_up(run: Any) -> float:
        run()  # what is timed is there, and runs
        if isinstance(run, partial):
            assert run.func is fetch
            return LAUNCH_MS + EXPERT_MS * run.args[2].shape[1]
        return 2 * LAYER_MS

    monkeypatch.setattr(driver_module, "milliseconds", made_up)
    monkeypatch.setattr(driver_module, "TUNING_REPLAYS", 1)
    with Engine(offloaded, EngineConfig(expert_slots="4", prefetch="auto")) as engine:
        driver: Any = engine.driver
        rooms: list[float] = []
        monkeypatch.setattr(driver.run, "set_room", lambda room, _: rooms.append(room))
        driver.graph_for(1, 32)
        engine.check_integrity()
    assert rooms == [pytest.approx((LAYER_MS - driver_module.PREDICTION_MS) / EXPERT_MS)]


def test_a_trial_is_told_when_a_text_ends(
    offloaded: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(driver_module.Trials, "break_off", lambda trials: ends.append(trials._at))
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with Engine(offloaded, EngineConfig(expert_slots="4", prefetch="auto")) as engine:
        for _ in range(2):
            engine.generate(torch.tensor([[5, 6, 7]]), **settings)
    assert ends == [1 - COLD_STEPS, 2 - COLD_STEPS]


@pytest.mark.parametrize("prefetch", ["auto", "all"])
def test_only_auto_ever_rests_and_trusts_anew(
    offloaded: OffloadedModel, prefetch: PrefetchMode
) -> None:
    with Engine(offloaded, EngineConfig(expert_slots="4", prefetch=prefetch)) as engine:
        driver: Any = engine.driver
        driver.graph_for(1, 32)
        variants = {driver._choose_variant() for _ in range(COLD_STEPS)}
        driver.run.trust.zero_()
        driver._choose_variant()
        assert driver.run.trust.tolist() == [PRIOR_PREFETCHES * (prefetch == "auto")] * 2
    assert variants == ({LOOK_AHEAD, ON_DEMAND} if prefetch == "auto" else {LOOK_AHEAD})


def test_a_copy_is_timed_without_its_launch() -> None:
    assert ms_of_one_more(lambda count: LAUNCH_MS + EXPERT_MS * count, 8) == pytest.approx(0.04)
    assert ms_of_one_more(lambda count: LAUNCH_MS + EXPERT_MS * count, 1) == pytest.approx(0.09)
    assert ms_of_one_more(lambda count: 0.5 / count, 2) > 0  # disturbed
