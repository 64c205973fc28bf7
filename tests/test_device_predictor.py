"""Folded estimators predict what the stacks predict; kernels are interpreted on a CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from foreroute.data.adapters import MoEModel
from foreroute.estimators import EstimatorSpec, EstimatorStack, predictable_layers
from foreroute.estimators.calibration import Calibration
from foreroute.runtime.device.predictor import DevicePredictor
from foreroute.runtime.look_ahead import LookAhead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 3


def build(moe: MoEModel, form: str, input_kind: Any) -> EstimatorStack:
    geometry = moe.geometry
    spec = EstimatorSpec(
        form=form,
        input_kind=input_kind,
        rank=4,
        width=16,
        target_layers=predictable_layers(geometry, 1),
    )
    shape = (geometry.num_layers, geometry.num_experts, geometry.hidden_size)
    torch.manual_seed(0)
    stack = EstimatorStack.build(geometry, spec, moe.anchors, torch.randn(shape))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(0, 0.2)
    return stack.requires_grad_(False).to(DEVICE)


def states(moe: MoEModel) -> dict[str, Tensor]:
    geometry, generator = moe.geometry, torch.Generator().manual_seed(1)
    hidden = torch.randn(2, TOKENS, geometry.hidden_size, generator=generator).to(DEVICE)
    noise = torch.rand(TOKENS, geometry.num_experts, generator=generator)
    gates, ids = noise.topk(geometry.top_k)
    return {
        "residual": hidden[0],
        "router_input": hidden[1],
        "expert_ids": ids.to(DEVICE),
        "gate_weights": gates.to(DEVICE),
    }


@pytest.mark.parametrize("input_kind", ["router-input", "residual", "quasi-hidden"])
@pytest.mark.parametrize(
    ("form", "is_affine"),
    [("next-router", True), ("low-rank", True), ("linear", True), ("mlp", False)],
)
def test_ranks_and_chances_are_those_of_the_stack(
    tiny_moe: Any, form: str, is_affine: bool, input_kind: str
) -> None:
    stack, given = build(tiny_moe.moe, form, input_kind), states(tiny_moe.moe)
    num_pairs, top_k = len(stack.target_layers), stack.geometry.top_k
    table = torch.linspace(0, 1, 17).square().repeat(num_pairs, 1)
    margins = torch.full((num_pairs,), -4.0), torch.full((num_pairs,), 2.0)
    stack.calibration = Calibration(*margins, table, top_k).to(DEVICE)
    predictor = DevicePredictor(LookAhead(stack, top_k), dtype=torch.float32)
    assert predictor.num_folded == (num_pairs if is_affine else 0)
    for source in stack.source_layers:
        ids, chances, said = predictor.predict(source, **given)
        logits = stack.predict(source, **given)
        torch.testing.assert_close(said, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(ids, logits.topk(top_k).indices)
        expected = stack.probabilities(logits, source).gather(-1, ids)
        torch.testing.assert_close(chances, expected, atol=1e-4, rtol=1e-4)


def test_without_a_calibration_margins_are_taken_for_log_odds(tiny_moe: Any) -> None:
    stack, given = build(tiny_moe.moe, "next-router", "residual"), states(tiny_moe.moe)
    top_k, source = stack.geometry.top_k, stack.source_layers[0]
    predictor = DevicePredictor(LookAhead(stack, top_k + 1), torch.float32)
    ids, chances, _ = predictor.predict(source, **given)
    logits = stack.predict(source, **given).gather(-1, ids)
    margins = logits - logits[:, top_k - 1 : top_k + 1].mean(-1, keepdim=True)
    torch.testing.assert_close(chances, margins.sigmoid(), atol=1e-2, rtol=0)
