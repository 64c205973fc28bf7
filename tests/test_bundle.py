"""Bundles come back bit-equal, and refuse what is damaged or made for another model."""

import dataclasses
import json

import pytest
import torch
from toys import random_anchors, toy_geometry

from foreroute.estimators import (
    EstimatorSpec,
    EstimatorStack,
    SourceState,
)
from foreroute.estimators.calibration import Calibration
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.hybrid import HybridStack
from foreroute.export.bundle import (
    MANIFEST_NAME,
    TENSORS_NAME,
    CalibrationEntry,
    PairEntry,
    load_bundle,
    save_bundle,
)

GEOMETRY = toy_geometry(0, 1, 2)


@pytest.fixture
def stack() -> EstimatorStack:
    torch.manual_seed(0)
    anchors = random_anchors(3, norm_kind="layer", norm_eps=1e-5)
    spec = EstimatorSpec(form="low-rank", rank=4, target_layers=(1, 2))
    stack = EstimatorStack.build(GEOMETRY, spec, anchors, torch.randn(3, 8, 16))
    torch.nn.init.normal_(stack.form.up)
    return stack.requires_grad_(False)


@pytest.fixture
def folder(tmp_path, stack):
    entry = PairEntry(
        source_layer=0,
        target_layer=1,
        form="low-rank",
        recall_at_k=0.9,
        training_free_recall_at_k=0.8,
        budget=2,
    )
    free = dataclasses.replace(entry, source_layer=1, target_layer=2, form="next-router")
    save_bundle(tmp_path, stack, [entry, free], num_held_out_tokens=7, provenance={"run": "r"})
    return tmp_path


def test_a_loaded_bundle_predicts_bit_equal(folder, stack) -> None:
    bundle = load_bundle(folder)
    stack.is_trained = (True, False)
    source = SourceState(
        residual=torch.randn(2, 6, 16),
        expert_ids=torch.rand(2, 6, 8).topk(2).indices,
        gate_weights=torch.rand(2, 6, 2),
    )
    assert torch.equal(bundle.stack(source), stack(source))
    for name, tensor in stack.to_tensors().items():
        assert torch.equal(bundle.stack.to_tensors()[name], tensor)


def test_the_manifest_decides_which_pairs_use_the_trained_form(folder) -> None:
    bundle = load_bundle(folder)
    assert bundle.stack.is_trained == (True, False)
    assert bundle.manifest.provenance == {"run": "r"}
    assert bundle.manifest.num_held_out_tokens == 7
    assert [pair.target_layer for pair in bundle.manifest.pairs] == [1, 2]


def test_a_model_of_another_geometry_is_refused(folder) -> None:
    bundle = load_bundle(folder)
    bundle.require_fits(GEOMETRY)
    for change in ({"router_fingerprint": "0" * 64}, {"num_experts": 16}):
        other = dataclasses.replace(GEOMETRY, **change)
        with pytest.raises(ValueError, match=r"Bundle was made for toy .* this model is toy"):
            bundle.require_fits(other)


def test_a_changed_byte_is_named(folder) -> None:
    path = folder / TENSORS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{TENSORS_NAME} is damaged"):
        load_bundle(folder)


def test_a_cut_off_file_is_named(folder) -> None:
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{TENSORS_NAME} is damaged"):
        load_bundle(folder)


def test_a_damaged_manifest_is_named(folder) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "specs"}))
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} is damaged"):
        load_bundle(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} is damaged"):
        load_bundle(folder)
    path.write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        load_bundle(folder)


def test_a_bundle_of_the_version_before_is_refused_in_one_line(folder) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(ValueError, match=r"version 1; .* version 2\. Export the bundle again\.$"):
        load_bundle(folder)


def test_probabilities_come_back_bit_equal(stack, folder) -> None:
    entries = load_bundle(folder).manifest.pairs
    said = CalibrationEntry(
        method="isotonic",
        compared={"isotonic": 0.01},
        num_fit_tokens=5,
        num_choose_tokens=6,
        costs=FetchCosts(delay=0.5),
    )
    logits = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="or neither"):
        save_bundle(folder, stack, entries, num_held_out_tokens=7, provenance={}, calibration=said)
    table = torch.rand(2, 9).sort(dim=1).values
    stack.calibration = Calibration(torch.randn(2), torch.rand(2) + 1, table, 2)
    save_bundle(folder, stack, entries, num_held_out_tokens=7, provenance={}, calibration=said)
    bundle = load_bundle(folder)
    assert bundle.manifest.calibration == said
    assert torch.equal(bundle.stack.probabilities(logits), stack.probabilities(logits))


def test_stacks_of_several_forms_come_back_bit_equal(stack, folder) -> None:
    first, second = load_bundle(folder).manifest.pairs
    other = dataclasses.replace(stack.spec, form="linear", input_kind="residual")
    tensors = {name: t for name, t in stack.to_tensors().items() if name.startswith("input.")}
    tensors.pop("input.default_vectors")
    tensors |= {"form.weight": torch.randn(2, 16, 8), "form.bias": torch.randn(2, 1, 8)}
    linear = EstimatorStack.from_tensors(GEOMETRY, other, tensors, norm_kind="layer", norm_eps=1e-5)
    hybrid = HybridStack([stack, linear], (0, 1))
    entries = [first, dataclasses.replace(second, form="linear", stack=1)]
    save_bundle(folder, hybrid, entries, num_held_out_tokens=7, provenance={})
    loaded = load_bundle(folder).stack
    source = SourceState(
        residual=torch.randn(2, 6, 16),
        expert_ids=torch.rand(2, 6, 8).topk(2).indices,
        gate_weights=torch.rand(2, 6, 2),
    )
    assert torch.equal(loaded(source), hybrid(source))
    assert torch.equal(loaded(source)[1], linear(source)[1])
    assert loaded.is_trained == (True, True)


def test_missing_parts_are_named(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        load_bundle(tmp_path / "nowhere")
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS_NAME):
        load_bundle(folder)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=MANIFEST_NAME):
        load_bundle(folder)


def test_a_name_of_any_length_makes_no_long_message():
    geometry = toy_geometry(0, 1, model_name="x" * 5000)
    with pytest.raises(ValueError, match=r"Layer 9 is not an MoE layer of x{300};"):
        geometry.position(9)
    assert len(geometry.describe()) < 400
