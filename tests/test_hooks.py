"""Predictions read the tensors that the model's own modules got."""

from contextlib import ExitStack

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from foreroute.data.adapters import discover
from foreroute.data.recorder import RoutingRecorder
from foreroute.runtime.hooks import SourceStates, watch_input


@pytest.mark.parametrize(("model_type", "is_apart"), [("gemma4_text", True), ("qwen3_moe", False)])
def test_predictions_read_what_the_router_read_also_where_the_experts_read_another_tensor(
    model_type: str, is_apart: bool
) -> None:
    moe = discover(tiny_model(model_type), model_type)
    layer, states, read_by_experts = moe.layers[0], SourceStates(), list[Tensor]()
    with ExitStack() as undo, RoutingRecorder(moe) as recorder, torch.no_grad():
        states.watch(layer, undo)
        watch_input(layer.experts, read_by_experts.append, undo)
        moe.model(input_ids=torch.arange(3, 10).view(1, 7))
        record = recorder.take()[layer.layer_idx]
    router_input = states.router_input(read_by_experts[0])
    assert torch.equal(router_input, record.router_input)
    assert states.residual is not None
    assert torch.equal(states.residual, record.residual)
    assert torch.equal(router_input, read_by_experts[0]) is not is_apart
