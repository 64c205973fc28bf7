"""Traces of a running engine: states that its speculation produced, routing of the true router."""

import dataclasses
import inspect
import sys

import pytest
import torch

from foreroute.data.adapters import discover, load_model, load_tokenizer
from foreroute.data.cli import ENGINE_FLAGS, collect, main
from foreroute.data.collect import CollectRequest, collect_from, collect_traces
from foreroute.data.manifest import read_manifest
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec
from foreroute.estimators.console import run_command
from foreroute.export.export import export_estimator
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

GENERATED = 12


@pytest.fixture(scope="module")
def bundle(tiny_traces, tmp_path_factory):
    """A bundle trained for a moment on the tiny model's traces."""
    folder = tmp_path_factory.mktemp("bundle")
    spec = EstimatorSpec(form="ridge", rank=4, target_layers=(1, 2, 3))
    train_estimator(tiny_traces, spec, FitConfig(epochs=1), folder / "run", device="cpu")
    export_estimator(folder / "run", folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def arguments(tiny_moe, text_dataset, bundle, tmp_path):
    """4 sequences of which 12 tokens are generated, 4 of 8 experts resident."""
    return {
        "bundle": bundle,
        "expert_slots": "4",
        "model": str(tiny_moe.folder),
        "dataset": str(text_dataset),
        "out": tmp_path / "out",
        "tokens": 4 * GENERATED,
        "sequence_length": 32,
        "generate": GENERATED,
        "states_dtype": "float32",
        "device": "cpu",
    }


def collected(arguments):
    collect(**arguments)
    return Traces.open(arguments["out"])


@pytest.mark.parametrize("on_miss", ["skip", "predicted"])
def test_routing_is_the_true_routers_on_the_states_that_speculation_made(
    tiny_moe, arguments, on_miss
):
    traces = collected(arguments | {"on_miss": on_miss})
    layers = tiny_moe.moe.layers
    for layer_idx in range(4):
        record = traces.record(layer_idx, 0)
        with torch.no_grad():
            logits, weights, ids = layers[layer_idx].router(record.router_input)
        assert torch.allclose(record.router_logits, logits, atol=1e-5)
        assert torch.equal(record.expert_ids, ids)
        assert torch.allclose(record.gate_weights, weights, atol=1e-5)


def test_states_are_not_those_of_the_unchanged_model(tiny_moe, arguments, text_dataset):
    traces = collected(arguments | {"on_miss": "skip"})
    exact = collected(arguments | {"on_miss": "fetch", "out": arguments["out"].parent / "exact"})
    first = traces.record(0, 0).residual, exact.record(0, 0).residual
    assert torch.equal(first[0][0], first[1][0])  # nothing was left out before the first layer
    last = traces.record(3, 0).residual, exact.record(3, 0).residual
    assert not torch.allclose(last[0], last[1], atol=1e-3)


def test_an_exact_engine_records_what_the_model_records(arguments, tmp_path):
    engine = collected(arguments | {"on_miss": "fetch"})
    plain = {name: value for name, value in arguments.items() if name not in ENGINE_FLAGS}
    model = collect_traces(**(plain | {"out": tmp_path / "plain", "source": "generated"}))
    assert torch.equal(engine.tokens(0).token_ids, model.tokens(0).token_ids)
    for name, expected in model.record(2, 0).tensors.items():
        assert torch.allclose(
            engine.record(2, 0).tensors[name].float(), expected.float(), atol=1e-4
        )
    assert engine.manifest.speculation is None


@pytest.mark.parametrize("slots", ["2", "25%", "8"])
def test_a_model_is_recorded_on_demand_without_a_bundle_bit_for_bit(
    tiny_moe, arguments, monkeypatch, slots
):
    plain = {name: value for name, value in arguments.items() if name not in ENGINE_FLAGS}
    plain |= {"source": "dataset", "tokens": 4 * 32, "generated_share": 0.25}
    plain = {name: value for name, value in plain.items() if name != "generate"}
    flags = plain | {"expert_slots": slots, "out": plain["out"].parent / "engine"}
    words = [
        part
        for name, value in flags.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    monkeypatch.setattr(sys, "argv", ["collect-traces", *words])
    main()
    engine, model = Traces.open(flags["out"]), collect_traces(**plain)
    request = CollectRequest(**{n: v for n, v in plain.items() if n != "device"})
    stock = load_model(plain["model"])
    stock.set_experts_implementation("batched_mm")  # which the engine equals on a CPU
    request = dataclasses.replace(request, out=plain["out"].parent / "batched")
    exact = collect_from(discover(stock), load_tokenizer(plain["model"]), request)
    assert torch.equal(engine.tokens(0).token_ids, model.tokens(0).token_ids)
    for layer_idx in range(4):
        found, expected = engine.record(layer_idx, 0), exact.record(layer_idx, 0)
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor), (layer_idx, name)
        assert torch.equal(found.expert_ids, model.record(layer_idx, 0).expert_ids)


@pytest.mark.parametrize("change", [{"on_miss": "skip"}, {"on_miss": "predicted"}])
def test_speculation_without_a_bundle_is_refused(arguments, change):
    with pytest.raises(ValueError, match="needs --bundle"):
        collect(**(arguments | {"bundle": None} | change))


def test_default_vectors_are_means_over_the_prompts(arguments):
    vectors, counts = collected(arguments).default_vectors()
    assert (counts.sum(dim=1) == 4 * (32 - GENERATED) * 2).all()
    assert (vectors.norm(dim=-1) > 0).equal(counts > 0)


def test_the_manifest_says_under_what_it_was_generated(arguments, bundle):
    manifest = collected(arguments | {"on_miss": "predicted"}).manifest
    assert manifest.source == "generated"
    assert manifest.speculation.on_miss == "predicted"
    assert manifest.speculation.bundle == str(bundle)
    assert len(manifest.speculation.bundle_sha256) == 64
    assert manifest.command.startswith("foreroute collect ")
    assert f"--bundle {bundle} --on-miss predicted" in manifest.command
    assert read_manifest(arguments["out"]) == manifest


def test_an_early_readout_is_recorded_under_speculation_too(arguments):
    traces = collected(arguments | {"record": "readout"})
    record, after = traces.record(1, 0), traces.record(2, 0)
    far = (record.residual - after.residual).norm()
    assert (record.readout - after.residual).norm() < far


def test_flags_and_defaults_are_those_of_collect_traces():
    ours = inspect.signature(collect).parameters
    theirs = inspect.signature(collect_traces).parameters
    assert set(ours) == set(theirs) | set(ENGINE_FLAGS)
    changed = {name for name in theirs if ours[name].default != theirs[name].default}
    assert changed == {"source"}
    assert CollectRequest.model == "bundled"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "dataset"}, "give --source generated, or --on-miss fetch"),
        ({"bundle": "nowhere"}, "Bundle nowhere is missing"),
    ],
)
def test_bad_input_is_one_line(arguments, capsys, change, message):
    flags = [(f"--{n.replace('_', '-')}", str(v)) for n, v in (arguments | change).items()]
    with pytest.raises(SystemExit) as ended:
        run_command("foreroute collect", collect, [part for flag in flags for part in flag])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not arguments["out"].exists()
