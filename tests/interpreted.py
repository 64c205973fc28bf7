"""What the device's layers share, where their kernels are interpreted on a CPU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from foreroute.runtime.config import EngineConfig
from foreroute.runtime.device.expert_form import find_expert_form
from foreroute.runtime.device.run_state import DeviceRun
from foreroute.runtime.policies.eviction import ScoreRule
from foreroute.runtime.store.offload import OffloadedModel


class InOrder:
    """A stream, or an event of one, where every launch is done before the next one comes."""

    def wait_stream(self, other: "InOrder") -> None:
        """It is past."""

    wait_event = record = wait_stream


def run_streams_in_order(patch: pytest.MonkeyPatch) -> None:
    """Let code that spreads its launches over streams run on a CPU."""
    patch.setattr(torch.cuda, "current_stream", InOrder)
    patch.setattr(torch.cuda, "Event", InOrder)
    patch.setattr(torch.cuda, "stream", nullcontext)


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
