"""The benchmarks of traces run at the smallest size and print what they say."""

import json
import shutil

import on_demand_recording
import on_policy
import pytest
import torch
import trace_space
from trained_on_traces import recall_of_tokens

from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec, EstimatorStack


@pytest.fixture
def run_benchmark(tiny_moe, text_dataset, tmp_path):
    """Run one on the tiny model; returns its JSON."""

    def run(module, **settings):
        out = tmp_path / "found.json"
        settings |= {"model": tiny_moe.folder, "dataset": text_dataset, "json": out, "epochs": 1}
        flags = [(f"--{key.replace('_', '-')}", str(value)) for key, value in settings.items()]
        module.main([part for flag in flags for part in flag])
        return json.loads(out.read_text())

    return run


def test_on_policy_compares_equal_amounts_of_text(run_benchmark):
    small = {"train_tokens": 512, "held_out_tokens": 64, "generate": 16, "context": 40}
    found = run_benchmark(on_policy, **small, long=24, long_sequences=2, bucket=8, batch_size=8)
    assert set(found["train_tokens"].values()) == {512}
    for row in found["rows"].values():
        assert len(row["by position"]) == 3
        parts = [bucket["mean"] for bucket in row["by position"]]
        assert row["long"]["mean"] == pytest.approx(sum(parts) / 3)
        assert 0 < row["held-out generated"]["mean"] < 1


def test_trace_space_compares_equally_many_tokens(run_benchmark):
    found = run_benchmark(trace_space, train_tokens=512, held_out_tokens=64, sequence_length=32)
    rows = list(found["rows"].values())
    assert {row["tokens"] for row in rows} == {512}
    sizes = [row["bytes_per_token"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert rows[-1]["sequences"] == 4 * rows[0]["sequences"]


def test_recall_of_tokens_is_that_of_a_hand_count(tiny_traces):
    traces = Traces.open(tiny_traces)
    spec = EstimatorSpec(form="next-router", input_kind="router-input", target_layers=(2,))
    stack = EstimatorStack.build(traces.geometry, spec, traces.anchors, None)
    found = recall_of_tokens(stack, traces, torch.device("cpu"))
    assert found.shape == (48, 64)
    source, target = traces.record(1, 0), traces.record(2, 0)
    top = (source.router_input @ traces.anchors.router_weight[2].T).topk(2).indices[5]
    shared = set(top.tolist()) & set(target.expert_ids[5].tolist())
    assert found[0, 5] == len(shared) / 2


def test_recordings_are_compared_number_by_number(tiny_traces, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_traces, other)
    assert set(on_demand_recording.share_equal(tiny_traces, other).values()) == {1.0}
    traces = Traces.open(other)
    layer, shard = traces.geometry.layer_indices[0], traces.manifest.shards[0].shard_idx
    changed = traces.record(layer, shard)
    changed.gate_weights[0, 0] += 1
    read = Traces.record

    def record(self, layer_idx, shard_idx):
        is_changed = (self.folder, layer_idx, shard_idx) == (other, layer, shard)
        return changed if is_changed else read(self, layer_idx, shard_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Traces, "record", record)
        found = on_demand_recording.share_equal(tiny_traces, other)
    assert 0.999 < found.pop("gate_weights") < 1
    assert set(found.values()) == {1.0}
