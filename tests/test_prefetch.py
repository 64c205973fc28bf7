"""The predictor ranks as the routers choose, and knows how sure it is."""

import pytest
import torch
from toys import random_anchors, toy_geometry

from foreroute.estimators import (
    EstimatorSpec,
    EstimatorStack,
    InputKind,
)
from foreroute.estimators.calibration import Calibration
from foreroute.runtime.host.predictor import HostPredictor
from foreroute.runtime.look_ahead import LookAhead

GEOMETRY = toy_geometry(0, 1, 2, gate_family="sigmoid-topk")
STATE = {
    "residual": torch.randn(5, 16),
    "router_input": torch.randn(5, 16),
    "expert_ids": torch.rand(5, 8).topk(2).indices,
    "gate_weights": torch.rand(5, 2),
}


def stack_with(
    selection_bias: torch.Tensor | None, input_kind: InputKind = "residual"
) -> EstimatorStack:
    torch.manual_seed(0)
    anchors = random_anchors(3, norm_bias=torch.zeros(3, 16), selection_bias=selection_bias)
    return EstimatorStack.training_free(GEOMETRY, anchors, input_kind=input_kind)


def test_experts_are_ranked_as_the_router_selects() -> None:
    plain, biased = stack_with(None), stack_with(torch.eye(8)[:3] * 9)
    logits, ranked = HostPredictor(LookAhead(plain, 3)).predict(0, **STATE)
    assert torch.equal(ranked, logits.topk(3).indices)
    again, ranked = HostPredictor(LookAhead(biased, 3)).predict(0, **STATE)
    assert torch.equal(again, logits)
    assert (ranked[:, 0] == 1).all()  # the bias of layer 1 is on expert 1


@pytest.mark.parametrize("bias", [None, torch.randn(3, 8)])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_probabilities_never_fall_along_the_ranking(bias, is_calibrated) -> None:
    stack = stack_with(bias)
    if is_calibrated:
        table = torch.rand(2, 9).sort(dim=1).values
        stack.calibration = Calibration(torch.full((2,), -2.0), torch.ones(2), table, 2)
    predictor = HostPredictor(LookAhead(stack, 8))
    logits, ranked = predictor.predict(1, **STATE)
    chance = predictor.probabilities(1, logits)
    assert chance.shape == logits.shape
    assert (chance.gather(1, ranked).diff(dim=1) <= 0).all()
    assert chance.min() >= 0
    assert chance.max() <= 1


def test_a_bundles_probabilities_are_used() -> None:
    stack = stack_with(None)
    stack.calibration = Calibration(
        torch.zeros(2), torch.ones(2), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 2
    )
    predictor = HostPredictor(LookAhead(stack, 2))
    for source, top in ((0, 0.2), (1, 0.4)):
        logits, _ = predictor.predict(source, **STATE)
        wanted = stack.probabilities(logits, source)
        assert torch.equal(predictor.probabilities(source, logits), wanted)
        assert wanted.max().item() <= top + 1e-6


def test_layers_without_an_estimator_are_refused() -> None:
    spec = EstimatorSpec(form="next-router", input_kind="residual", target_layers=(1,))
    stack = stack_with(None)
    one = EstimatorStack.from_tensors(
        GEOMETRY,
        spec,
        {name: tensor[:1] for name, tensor in stack.to_tensors().items()},
        norm_kind="rms",
        norm_eps=1e-5,
    )
    predictor = HostPredictor(LookAhead(one, 2))
    assert predictor.ahead.target_of(1) is None
    with pytest.raises(ValueError, match=r"No estimator reads layer 1; sources are \[0\]"):
        predictor.predict(1, **STATE)


def test_estimators_that_read_a_readout_are_not_run_without_one() -> None:
    predictor = HostPredictor(LookAhead(stack_with(None, "attention-readout"), 2))
    with pytest.raises(ValueError, match="attention-readout input needs readout"):
        predictor.predict(0, **STATE)
