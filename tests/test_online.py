"""Training while the model runs gives what training from stored traces gives, in bounded memory."""

import sys

import pytest
import torch

from foreroute.data.adapters import discover, load_model, load_tokenizer
from foreroute.data.collect import CollectRequest, collect_traces
from foreroute.data.live_traces import LiveTraces
from foreroute.data.opening import open_traces
from foreroute.estimators import EstimatorSpec
from foreroute.estimators.artifacts import read_json
from foreroute.export.export import export_estimator
from foreroute.train.cli import main
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

SEQUENCES, LENGTH = 24, 32
SPEC = EstimatorSpec(form="low-rank", rank=4, target_layers=(1, 2, 3))
QUICK = FitConfig(epochs=2, batch_size=64)


@pytest.fixture(scope="module")
def request_of(tiny_moe, text_dataset):
    """What is asked for, whether stored or not: 6 shards of 4 sequences of 32 tokens."""
    return {
        "model": str(tiny_moe.folder),
        "dataset": str(text_dataset),
        "tokens": SEQUENCES * LENGTH,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "shard_tokens": 4 * LENGTH,
    }


@pytest.fixture
def live(tiny_moe, request_of, tmp_path):
    """Make live traces of the request, with a change."""

    def make(buffer_bytes=1 << 20, **changes):
        request = CollectRequest(out=tmp_path / "live", **(request_of | changes))
        moe = tiny_moe.moe
        return LiveTraces.begin(
            moe,
            load_tokenizer(str(tiny_moe.folder)),
            request.manifest(moe),
            request.out,
            buffer_bytes=buffer_bytes,
        )

    return make


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"states_dtype": "int8", "record": "layer-input,readout"},
        {"tokens_per_sequence": 8, "tokens": SEQUENCES * 8, "shard_tokens": 32},
        {"source": "generated", "generate": 8, "tokens": SEQUENCES * 8, "shard_tokens": 32},
    ],
    ids=["plain", "int8-more-fields", "some-positions", "generated"],
)
def test_live_shards_are_those_that_would_be_stored(request_of, live, tmp_path, change):
    stored = collect_traces(**(request_of | change), out=tmp_path / "stored")
    found = live(**change)
    assert found.num_tokens == stored.num_tokens
    for shard_idx in (0, 5, 1):
        for name, tensor in vars(stored.tokens(shard_idx)).items():
            assert torch.equal(getattr(found.tokens(shard_idx), name), tensor)
        for layer_idx in (0, 3):
            for name, tensor in stored.record(layer_idx, shard_idx).tensors.items():
                assert torch.equal(found.record(layer_idx, shard_idx).tensors[name], tensor)
    vectors, counts = found.default_vectors()
    expected, expected_counts = stored.default_vectors()
    assert torch.equal(vectors, expected)
    assert torch.equal(counts, expected_counts)


def test_nothing_is_stored_but_manifest_and_anchors(live):
    traces = live()
    traces.record(0, 3)
    files = {path.name for path in traces.folder.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "anchors.safetensors", "command.txt"}
    assert traces.manifest.num_bytes == 0
    traces.verify()


def test_text_is_known_without_running_the_model(live):
    traces = live()
    for shard in traces.manifest.shards:
        assert (traces.tokens(shard.shard_idx).phases == 0).all()
    assert traces.num_recorded_tokens == 0


def test_memory_stays_within_the_buffer(live):
    buffer_bytes = 120_000
    traces = live(buffer_bytes=buffer_bytes)
    for _ in range(2):
        for shard in traces.manifest.shards:
            traces.record(1, shard.shard_idx)
            assert 0 < traces.buffered_bytes <= buffer_bytes
    assert traces.peak_bytes <= buffer_bytes
    assert traces.num_recorded_tokens == 2 * traces.num_tokens  # each left before its second turn


def test_what_fits_the_buffer_is_recorded_once(live):
    traces = live(buffer_bytes=1 << 30)
    for _ in range(3):
        for shard in traces.manifest.shards:
            traces.record(1, shard.shard_idx)
    assert traces.num_recorded_tokens == traces.num_tokens


def test_a_buffer_for_less_than_two_sequences_is_refused(live):
    with pytest.raises(ValueError, match=r"holds less than two sequences .* --buffer"):
        live(buffer_bytes=20_000)


def test_training_online_gives_what_training_from_stored_traces_gives(tmp_path):
    asked = {"tokens": 2048, "sequence_length": 128, "batch_size": 2, "shard_tokens": 512}
    stored = collect_traces(**asked, out=tmp_path / "stored")
    moe = discover(load_model("bundled"), "bundled")
    request = CollectRequest(**asked, out=tmp_path / "live")
    buffer_bytes = stored.manifest.num_bytes // 3
    traces = LiveTraces.begin(
        moe,
        load_tokenizer("bundled"),
        request.manifest(moe),
        request.out,
        buffer_bytes=buffer_bytes,
    )
    runs = [
        train_estimator(
            source, SPEC, QUICK, tmp_path / name, device="cpu", memory_bytes=buffer_bytes
        )
        for name, source in {"from stored": stored, "online": traces}.items()
    ]
    assert 0 < traces.peak_bytes <= buffer_bytes
    assert traces.manifest.num_bytes == 0
    from_stored, online = runs
    assert online["num_held_out_tokens"] == from_stored["num_held_out_tokens"]
    for name in ("next-router", "quasi-hidden", "estimator"):
        assert online["mean"][name] == pytest.approx(from_stored["mean"][name], abs=0.01)


def test_the_command_trains_without_traces_and_export_runs_the_model_again(
    tiny_moe, text_dataset, tmp_path, monkeypatch, capsys
):
    arguments = ["--model", str(tiny_moe.folder), "--dataset", str(text_dataset)]
    arguments += ["--tokens", "16384", "--epochs", "1", "--rank", "4", "--buffer", "2MB"]
    monkeypatch.setattr(
        sys, "argv", ["train-estimator", *arguments, "--out", str(tmp_path / "run")]
    )
    main()
    printed = capsys.readouterr().out
    assert "none on the disk" in printed
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["num_held_out_tokens"] == 3 * 512
    assert isinstance(open_traces(tmp_path / "run.live"), LiveTraces)
    manifest = export_estimator(tmp_path / "run", tmp_path / "bundle")
    assert len(manifest.pairs) == 3


def test_other_text_than_the_run_was_trained_on_is_refused(
    tiny_moe, request_of, text_dataset, tmp_path, live
):
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in text_dataset.iterdir():
        (texts / path.name).write_text(path.read_text())
    traces = live(dataset=str(texts))
    for path in texts.iterdir():
        path.write_text(path.read_text().replace("parse", "sparse"))
    with pytest.raises(ValueError, match=r"dataset .* has changed since"):
        open_traces(traces.folder)


@pytest.mark.parametrize("given", [[], ["--traces", "a", "--model", "bundled"]])
def test_either_traces_or_a_model_must_be_given(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train-estimator", *given, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "either --traces, or --model" in capsys.readouterr().err
