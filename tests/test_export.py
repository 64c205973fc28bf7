"""Exporting measures what was written, and leaves nothing half-written."""

import dataclasses
import json
import shutil

import pytest
import torch

from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec
from foreroute.estimators.artifacts import read_json, sha256_of, write_json, write_tensors
from foreroute.export.bundle import load_bundle
from foreroute.export.cli import export
from foreroute.export.export import export_estimator
from foreroute.train.fit import train_estimator
from foreroute.train.measure import measure, predictor_of
from foreroute.train.run import FitConfig, load_run
from foreroute.train.shards import PairedShards
from foreroute.train.split import split_held_out

SPEC = EstimatorSpec(form="low-rank", rank=8, target_layers=(1, 2, 3))


@pytest.fixture(scope="module")
def trained_run(tiny_traces, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train_estimator(tiny_traces, SPEC, FitConfig(epochs=3, batch_size=128), out, device="cpu")
    return out


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def test_a_bundle_holds_what_the_run_trained(run, tmp_path) -> None:
    manifest = export_estimator(run, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest == manifest
    trained = load_run(run).stack.to_tensors()
    for name, tensor in bundle.stack.to_tensors().items():
        assert torch.equal(tensor, trained[name])
    assert (tmp_path / "bundle" / "command.txt").is_file()


def test_figures_are_measured_on_sequences_that_chose_nothing(run, tmp_path) -> None:
    manifest = export_estimator(run, tmp_path / "bundle")
    plan = load_run(run).plan
    parts = split_held_out(plan.split.held_out)
    assert manifest.num_held_out_tokens == 64 * len(parts.report)
    both = 64 * (len(parts.calibrate) + len(parts.choose))
    assert manifest.calibration.num_fit_tokens == manifest.calibration.num_choose_tokens == both
    free = dataclasses.replace(plan.spec, form="next-router")
    recall = measured_recall(load_run(run), parts.report, free)
    assert [pair.training_free_recall_at_k for pair in manifest.pairs] == pytest.approx(recall)


def test_layers_where_training_did_not_pay_are_training_free(run, tmp_path) -> None:
    # Damage one layer's correction for good: it then predicts worse than without.
    finished = load_run(run)
    tensors = finished.stack.to_tensors()
    tensors["form.up"][1] = 50 * torch.randn_like(tensors["form.up"][1])
    metrics = rewrite(run, finished, tensors)
    with pytest.raises(ValueError, match=r"Run run, layer 2: the written files reach recall 0\."):
        export_estimator(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob("bundle*"))
    damaged = load_run(run)
    recall = measured_recall(damaged, damaged.plan.split.held_out, damaged.plan.spec)
    metrics["estimator"]["per_layer"]["recall_at_k"][1] = recall[1]
    write_json(run / "metrics.json", metrics)
    manifest = export_estimator(run, tmp_path / "bundle")
    assert manifest.pairs[1].form == "next-router"
    free, trained = manifest.pairs[1].compared
    assert (free.form, trained.form) == ("next-router", "low-rank")
    assert free.expected_cost < trained.expected_cost
    assert load_bundle(tmp_path / "bundle").stack.is_trained[1] is False


def rewrite(run, finished, tensors) -> dict:
    """Write other estimators into a run, with their digest; gives its metrics."""
    write_tensors(run / "estimators.safetensors", tensors)
    digest = sha256_of(run / "estimators.safetensors")
    metrics = finished.metrics | {"tensors_sha256": digest}
    write_json(run / "metrics.json", metrics)
    return metrics


def measured_recall(finished, sequences, spec) -> list[float]:
    traces = Traces.open(finished.plan.traces)
    stack = finished.stack
    if spec.form == "next-router":
        stack = stack.with_trained([False] * len(spec.target_layers))
    held_out = PairedShards(traces, finished.plan.spec, sequences)
    return measure({"it": predictor_of(stack)}, held_out, traces.geometry, (2,))["it"].recall_at_k


@pytest.fixture(scope="module")
def other_run(tiny_traces, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "other"
    spec = dataclasses.replace(SPEC, form="linear", input_kind="residual")
    train_estimator(tiny_traces, spec, FitConfig(epochs=1, batch_size=128), out, device="cpu")
    return out


def test_each_layer_is_taken_from_the_run_that_costs_least(run, other_run, tmp_path) -> None:
    # The first run's corrections are damaged: its trained form costs most.
    finished = load_run(run)
    tensors = finished.stack.to_tensors()
    tensors["form.up"] = torch.randn_like(tensors["form.up"])
    metrics = rewrite(run, finished, tensors)
    damaged = load_run(run)
    claimed = measured_recall(damaged, damaged.plan.split.held_out, damaged.plan.spec)
    metrics["estimator"]["per_layer"]["recall_at_k"] = claimed
    write_json(run / "metrics.json", metrics)
    manifest = export_estimator(run, tmp_path / "bundle", also=[other_run])
    bundle = load_bundle(tmp_path / "bundle")
    for pair in manifest.pairs:
        assert {(entry.run, entry.form, entry.input_kind) for entry in pair.compared} == {
            ("run", "next-router", "quasi-hidden"),
            ("other", "next-router", "residual"),
            ("run", "low-rank", "quasi-hidden"),
            ("other", "linear", "residual"),
        }
        best = min(pair.compared, key=lambda entry: entry.expected_cost)
        assert best.form == pair.form
        assert manifest.specs[pair.stack].input_kind == best.input_kind
    assert bundle.stack.is_trained == tuple(pair.form != "next-router" for pair in manifest.pairs)


def test_runs_that_cannot_be_compared_are_refused(run, tiny_traces, tmp_path) -> None:
    far = dataclasses.replace(SPEC, form="next-router", horizon=2, target_layers=(2, 3))
    train_estimator(tiny_traces, far, FitConfig(), tmp_path / "far", device="cpu")
    with pytest.raises(ValueError, match="Run far has other horizon and layers than the first"):
        export_estimator(run, tmp_path / "bundle", also=[tmp_path / "far"])
    with pytest.raises(ValueError, match="different names"):
        export_estimator(run, tmp_path / "bundle", also=[run])
    assert not (tmp_path / "bundle").exists()


def test_an_existing_bundle_is_not_overwritten(run, tmp_path) -> None:
    out = tmp_path / "bundle"
    export_estimator(run, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        export_estimator(run, out)
    assert (out / "manifest.json").read_bytes() == before
    export_estimator(run, out, overwrite=True)


def test_traces_that_moved_can_be_pointed_to(run, tiny_traces, tmp_path) -> None:
    plan = read_json(run / "run.json")
    write_json(run / "run.json", plan | {"traces": str(tmp_path / "gone")})
    with pytest.raises(FileNotFoundError, match="--traces"):
        export_estimator(run, tmp_path / "bundle")
    export_estimator(run, tmp_path / "bundle", traces_path=tiny_traces)


def test_other_traces_are_refused(run, tiny_traces, tmp_path) -> None:
    other = shutil.copytree(tiny_traces, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    write_json(other / "manifest.json", manifest | {"seed": 99})
    with pytest.raises(ValueError, match="not hold the traces this run was trained on"):
        export_estimator(run, tmp_path / "bundle", traces_path=other)
    assert not (tmp_path / "bundle").exists()


def test_damaged_and_missing_runs_are_named(run, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a run"):
        export_estimator(tmp_path / "nowhere", tmp_path / "bundle")
    path = run / "estimators.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"estimators\.safetensors is damaged"):
        export_estimator(run, tmp_path / "bundle")
    (run / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        export_estimator(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_command_prints_the_path_last(run, tmp_path, capsys) -> None:
    export(run=run, out=tmp_path / "bundle")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "bundle")
    assert any("low-rank" in line or "next-router" in line for line in lines)
