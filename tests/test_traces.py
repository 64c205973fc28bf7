"""Traces come back as they were written, and damage is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreroute.data.layout import Stored, layer_layout, shard_bytes
from foreroute.data.manifest import TraceManifest
from foreroute.data.recorder import RoutingRecorder
from foreroute.data.shard_file import ShardFile
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import parse_json, sha256_of


@pytest.fixture
def damaged(tiny_traces, tmp_path):
    """A copy that a test may damage, and one of its shards."""
    folder = tmp_path / "traces"
    shutil.copytree(tiny_traces, folder)
    return folder, folder / "layer_002" / "shard_00001.safetensors"


def test_records_come_back_as_the_model_routes(tiny_moe, tiny_traces):
    traces = Traces.open(tiny_traces)
    tokens = traces.tokens(1)
    assert tokens.token_ids.dtype == torch.int64
    assert tokens.sequence_offsets.tolist() == list(range(0, 16 * 64 + 1, 64))

    with torch.no_grad(), RoutingRecorder(tiny_moe.moe) as recorder:
        tiny_moe.model(input_ids=tokens.token_ids.view(16, 64))
        expected = recorder.take()
    for layer_idx in traces.geometry.layer_indices:
        record = traces.record(layer_idx, 1)
        assert record.expert_ids.dtype == torch.int64
        # Decoded step by step there, in one pass here: float32 rounding only.
        assert torch.allclose(record.residual, expected[layer_idx].residual, atol=1e-4)
        assert torch.allclose(record.router_logits, expected[layer_idx].router_logits, atol=1e-4)
        assert (record.expert_ids == expected[layer_idx].expert_ids).float().mean() > 0.999


def test_phases_tell_dataset_text_from_the_models_own(tiny_traces):
    phases = Traces.open(tiny_traces).tokens(0).phases.view(16, 64)
    assert phases.dtype == torch.uint8
    assert (phases[:, :48] == 0).all()
    assert (phases[:, 48:] == 1).all()


def test_counts_and_geometry_are_those_of_the_run(tiny_moe, tiny_traces):
    traces = Traces.open(tiny_traces)
    assert traces.geometry == tiny_moe.moe.geometry
    assert (traces.num_tokens, traces.num_sequences) == (48 * 64, 48)
    assert traces.manifest.is_complete
    assert torch.equal(traces.anchors.router_weight, tiny_moe.moe.anchors.router_weight)
    assert traces.manifest.norm_eps == tiny_moe.moe.anchors.norm_eps
    traces.verify()


def test_reading_some_fields_reads_only_those(tiny_traces):
    found = Traces.open(tiny_traces).read(3, 0, ("expert_ids", "gate_weights"))
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "expert_ids": (1024, 2),
        "gate_weights": (1024, 2),
    }


def test_default_vectors_are_means_over_the_chosen_shards(tiny_moe, tiny_traces):
    traces = Traces.open(tiny_traces)
    vectors, counts = traces.default_vectors([0, 2])
    ids = torch.cat([traces.record(1, shard).expert_ids for shard in (0, 2)]).flatten()
    assert torch.equal(counts[1], ids.bincount(minlength=8))
    assert counts.sum() == 4 * 2 * 1024 * 2
    parts = [traces.read(1, shard, ("expert_output_sum",)) for shard in (0, 2)]
    total = sum(part["expert_output_sum"] for part in parts)
    assert torch.allclose(vectors[1], total / counts[1].clamp(min=1).unsqueeze(-1))
    every, all_counts = traces.default_vectors()
    assert every.shape == (4, 8, 32)
    assert all_counts.sum() == 4 * 3 * 1024 * 2
    assert (every[all_counts == 0] == 0).all()


def test_layers_without_experts_are_refused(tiny_traces):
    with pytest.raises(ValueError, match="Layer 9 is not an MoE layer"):
        Traces.open(tiny_traces).record(9, 0)


def test_missing_and_unfinished_traces_are_refused(damaged, tmp_path):
    folder, shard = damaged
    with pytest.raises(FileNotFoundError, match="holds no traces"):
        Traces.open(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"layer_002/shard_00001\.safetensors is missing"):
        Traces.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"is_complete": False}))
    with pytest.raises(ValueError, match=r"unfinished .*same collect-traces command"):
        Traces.open(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 99}', "format version 99"),
        ('{"format_version": 2}', "is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(damaged, content, message):
    folder, _ = damaged
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=rf"manifest\.json.* {message}"):
        Traces.open(folder)


def test_a_truncated_shard_is_named_at_once(damaged):
    folder, shard = damaged
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"layer_002/shard_00001.* is damaged .*Remove"):
        Traces.open(folder)


def test_a_shard_that_becomes_garbled_is_named_when_read(damaged):
    folder, shard = damaged
    traces = Traces.open(folder)
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"layer_002/shard_00001.* is damaged .*Remove"):
        traces.record(2, 1)


def test_one_tensor_of_another_length_is_named(damaged):
    folder, shard = damaged
    traces = Traces.open(folder)
    tensors = load_file(shard)
    save_file(tensors | {"gate_weights": tensors["gate_weights"][:-1]}, shard)
    with pytest.raises(ValueError, match=r"shard_00001.*gate_weights has shape \[1023, 2\]"):
        traces.record(2, 1)


def test_one_changed_byte_is_found_by_verify(damaged):
    folder, shard = damaged
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"layer_002/shard_00001.*sha256"):
        Traces.open(folder).verify()


def test_a_manifest_survives_json(tiny_traces):
    manifest = Traces.open(tiny_traces).manifest
    assert parse_json(json.dumps(manifest.to_dict()).encode(), TraceManifest, "it") == manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8])
def test_rows_appended_in_any_interleaving_are_whole_tensors(tmp_path, dtype):
    rows = torch.arange(7 * 3).view(7, 3)
    layout = {"a": Stored(dtype, (7, 3)), "b": Stored(torch.int64, (3, 7))}
    file = ShardFile(tmp_path / "sub" / "t.safetensors", layout)
    file.append({"a": rows[:2], "b": rows.T[:1]})
    file.append({"b": rows.T[1:]})
    file.append({"a": rows[2:]})
    assert not (tmp_path / "sub" / "t.safetensors").exists()
    assert file.close() == sha256_of(tmp_path / "sub" / "t.safetensors")

    tensors = load_file(tmp_path / "sub" / "t.safetensors")
    assert torch.equal(tensors["a"], rows.to(dtype))
    assert torch.equal(tensors["b"], rows.T)


def test_a_shard_file_with_rows_missing_is_not_finished(tmp_path):
    file = ShardFile(tmp_path / "t.safetensors", {"a": Stored(torch.float32, (4,))})
    file.append({"a": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="lacks bytes"):
        file.close()
    assert not (tmp_path / "t.safetensors").exists()


def test_sizes_are_estimated_from_above_and_closely(tiny_traces):
    traces = Traces.open(tiny_traces)
    estimate = shard_bytes(traces.geometry, torch.float32, 16, 16 * 64)
    actual = traces.manifest.shards[0].num_bytes
    assert actual <= estimate <= 1.02 * actual


def test_bytes_of_a_layer_are_those_of_a_hand_count(tiny_moe):
    layout = layer_layout(tiny_moe.moe.geometry, torch.bfloat16, 10)
    # A token: 2 states x 32 x 2 bytes, 8 logits x 4, top-2 x (4 + 2); 8 experts x (32 x 4 + 8).
    assert sum(stored.num_bytes for stored in layout.values()) == 10 * (128 + 32 + 12) + 8 * 136
