"""A stack of several stacks predicts each layer as the one chosen for it."""

import dataclasses

import pytest
import torch
from toys import random_anchors, toy_geometry

from foreroute.estimators import (
    EstimatorSpec,
    EstimatorStack,
    SourceState,
)
from foreroute.estimators.calibration import Calibration
from foreroute.estimators.hybrid import HybridStack

GEOMETRY = toy_geometry(0, 1, 2, 4)
SPEC = EstimatorSpec(form="low-rank", rank=4, target_layers=(1, 2, 4))
OTHER = dataclasses.replace(SPEC, form="linear", input_kind="router-input")
SOURCE = SourceState(
    residual=torch.randn(3, 6, 16),
    router_input=torch.randn(3, 6, 16),
    expert_ids=torch.rand(3, 6, 8).topk(2).indices,
    gate_weights=torch.rand(3, 6, 2),
)


def build(spec: EstimatorSpec) -> EstimatorStack:
    torch.manual_seed(0)
    stack = EstimatorStack.build(GEOMETRY, spec, random_anchors(4), torch.randn(4, 8, 16))
    for parameter in stack.form.parameters():
        torch.nn.init.normal_(parameter)
    return stack.requires_grad_(False)


@pytest.fixture
def stacks() -> list[EstimatorStack]:
    return [build(SPEC), build(OTHER)]


def test_every_pair_is_predicted_by_its_own_stack(stacks) -> None:
    hybrid = HybridStack(stacks, (1, 0, 1))
    apart = [stack(SOURCE) for stack in stacks]
    assert not torch.equal(*apart)
    assert torch.equal(hybrid(SOURCE), torch.stack([apart[1][0], apart[0][1], apart[1][2]]))


def test_one_pair_predicts_what_its_stack_predicts(stacks) -> None:
    hybrid = HybridStack(stacks, (1, 0, 1))
    for pair, at in enumerate((1, 0, 1)):
        fields = {
            name: field[pair] for name, field in SOURCE._asdict().items() if field is not None
        }
        source = hybrid.source_layers[pair]
        alone = stacks[at].predict(source, **fields)
        assert torch.equal(hybrid.predict(source, **fields), alone)
        assert hybrid.target_of(source) == SPEC.target_layers[pair]


def test_only_fields_of_stacks_in_use_are_read(stacks) -> None:
    both = HybridStack(stacks, (1, 0, 1)).input_fields
    assert set(both) == {"residual", "expert_ids", "gate_weights", "router_input"}
    assert HybridStack(stacks, (1, 1, 1)).input_fields == ("router_input",)


def test_training_free_pairs_stay_so_in_a_hybrid(stacks) -> None:
    hybrid = HybridStack([stacks[0].with_trained((True, False, True)), stacks[1]], (0, 0, 1))
    assert hybrid.is_trained == (True, False, True)
    free = stacks[0].with_trained((False,) * 3)
    assert torch.equal(hybrid(SOURCE)[1], free(SOURCE)[1])
    assert torch.equal(hybrid.with_trained((True,) * 3)(SOURCE)[1], stacks[0](SOURCE)[1])


def test_probabilities_of_one_pair_are_those_of_all(stacks) -> None:
    hybrid = HybridStack(stacks, (1, 0, 1))
    logits = hybrid(SOURCE)
    with pytest.raises(ValueError, match="not calibrated"):
        hybrid.probabilities(logits)
    table = torch.rand(3, 9).sort(dim=1).values
    hybrid.calibration = Calibration(torch.full((3,), -2.0), torch.ones(3), table, 2)
    whole = hybrid.probabilities(logits)
    for pair, source in enumerate(hybrid.source_layers):
        assert torch.equal(hybrid.probabilities(logits[pair], source), whole[pair])
    assert "calibration.probability" not in stacks[0].to_tensors()


def test_stacks_that_do_not_belong_together_are_refused(stacks) -> None:
    with pytest.raises(ValueError, match=r"one of 2 stacks for each of 3 pairs, got \[0, 2, 0\]"):
        HybridStack(stacks, (0, 2, 0))
    with pytest.raises(ValueError, match="one of 2 stacks for each of 3 pairs"):
        HybridStack(stacks, (0, 1))
    fewer = build(dataclasses.replace(SPEC, target_layers=(1, 2)))
    with pytest.raises(ValueError, match=r"sources \[0, 1, 2\] and \[0, 1\]"):
        HybridStack([stacks[0], fewer], (0, 1, 0))
