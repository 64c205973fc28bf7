"""What the device's layers share, where their kernels are interpreted on a CPU."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from foreroute.runtime import engine
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.device import decode_graph, driver
from foreroute.runtime.device.decode_graph import DecodeGraph
from foreroute.runtime.device.expert_form import find_expert_form
from foreroute.runtime.device.kernels import demand, plan
from foreroute.runtime.device.run_state import DeviceRun
from foreroute.runtime.look_ahead import LookAhead
from foreroute.runtime.policies.eviction import ScoreRule
from foreroute.runtime.store.offload import OffloadedModel


class InOrder:
    """A stream, or an event of one, where every launch is done before the next one comes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """It is like any other."""

    def wait_stream(self, *_: Any) -> None:
        """It is past."""

    wait_event = record = wait_stream


def run_streams_in_order(patch: pytest.MonkeyPatch) -> None:
    """Let code that spreads its launches over streams run on a CPU."""
    patch.setattr(torch.cuda, "current_stream", InOrder)
    patch.setattr(torch.cuda, "Event", InOrder)
    patch.setattr(torch.cuda, "stream", nullcontext)


class Replayed:
    """Stands for a captured graph: the step runs again, and writes where it wrote."""

    def __init__(self, step: DecodeGraph) -> None:
        self.step, self.logits = step, step._step().clone()

    def replay(self) -> None:
        with self.step._fused():
            self.logits.copy_(self.step._step())


def decide_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let engines on a CPU be driven by the device's driver, with steps that count as captured."""
    run_streams_in_order(patch)
    patch.setattr(torch.cuda, "Stream", InOrder)
    patch.setattr(torch.cuda, "synchronize", lambda _: None)
    for module in (decode_graph, driver):
        patch.setattr(module, "borrow_stream", InOrder)
    for module in (demand, plan):
        patch.setattr(module, "DEMAND_PROGRAMS", 2)

    def capture(step: DecodeGraph) -> tuple[Replayed, Tensor]:
        graph = Replayed(step)
        return graph, graph.logits

    def make(
        offloaded: OffloadedModel, config: EngineConfig, slots: Sequence[int], stack: Any
    ) -> driver.DeviceDriver:
        ahead = LookAhead.for_engine(offloaded, config, stack)
        return driver.DeviceDriver(offloaded, config, slots, ahead)

    patch.setattr(DecodeGraph, "_capture", capture)
    patch.setattr(engine, "_make_driver", make)


def run_on_cpu(offloaded: OffloadedModel, config: EngineConfig, rule: ScoreRule) -> DeviceRun:
    """Nothing is predicted, no prompt is counted, and a decode step is what comes."""
    form = find_expert_form(offloaded.moe.layers[0].experts)
    assert form is not None
    stream: Any = InOrder()
    run = DeviceRun(
        config=config,
        rule=rule,
        form=form,
        predictor=None,
        ahead=stream,
        behind=stream,
        head_words=torch.zeros(1, dtype=torch.int32),
        num_whole=torch.zeros(1, dtype=torch.int32),
        trust=torch.ones(2),
        prompt_weight=0.0,
        lead=None,
    )
    run.is_prefill = False
    return run
