"""Exporting measures what was written, and leaves nothing half-written."""

import json
import shutil

import pytest
import torch

from foreroute.estimators import EstimatorSpec
from foreroute.estimators.artifacts import read_json, write_json, write_tensors
from foreroute.export.bundle import load_bundle
from foreroute.export.cli import export
from foreroute.export.export import export_estimator
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig, load_run

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
    metrics = read_json(run / "metrics.json")
    assert manifest.num_held_out_tokens == metrics["num_held_out_tokens"]
    free = metrics["baselines"]["quasi-hidden"]["per_layer"]["recall_at_k"]
    assert [pair.training_free_recall_at_k for pair in manifest.pairs] == pytest.approx(free)
    assert (tmp_path / "bundle" / "command.txt").is_file()


def test_layers_where_training_did_not_pay_are_training_free(run, tmp_path) -> None:
    # Damage one layer's correction for good: it then predicts worse than without.
    finished = load_run(run)
    tensors = finished.stack.to_tensors()
    tensors["form.up"][1] = 50 * torch.randn_like(tensors["form.up"][1])
    write_tensors(run / "estimators.safetensors", tensors)
    metrics = finished.metrics
    with pytest.raises(ValueError, match=r"Layer 2: the written files reach recall 0\."):
        export_estimator(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob("bundle*"))
    metrics["estimator"]["per_layer"]["recall_at_k"][1] = measured_recall(run, tmp_path)
    write_json(run / "metrics.json", metrics)
    manifest = export_estimator(run, tmp_path / "bundle")
    assert manifest.pairs[1].form == "next-router"
    assert manifest.pairs[1].recall_at_k == manifest.pairs[1].training_free_recall_at_k
    assert load_bundle(tmp_path / "bundle").stack.is_trained[1] is False


def measured_recall(run, tmp_path) -> float:
    from foreroute.data.traces import Traces
    from foreroute.train.measure import measure, predictor_of
    from foreroute.train.shards import PairedShards

    finished = load_run(run)
    traces = Traces.open(finished.plan.traces)
    held_out = PairedShards(traces, finished.plan.spec, finished.plan.split.held_out)
    predictors = {"damaged": predictor_of(finished.stack)}
    result = measure(predictors, held_out, traces.geometry, (2,))
    return result["damaged"].recall_at_k[1]


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
