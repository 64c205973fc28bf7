"""Every model type that can be recorded gives traces, with or without copies of its routers."""

import pytest
import torch
from tiny_models import tiny_model

from foreroute.data.adapters import discover
from foreroute.data.collect import collect_traces
from foreroute.data.traces import Traces
from foreroute.runtime import Engine

WITHOUT_ANCHORS = ("axk2", "zaya")
TYPES = (*WITHOUT_ANCHORS, "deepseek_v4", "gemma4", "gpt_oss", "jamba", "lfm2_moe", "nemotron_h")
"""Gated norm, router with a state, hash routing, norm in the router, biases, no router class, a
selection bias outside the router, latent experts; all 48 types pass, but take two minutes."""
LENGTH = 16


@pytest.fixture
def collect(tmp_path, text_dataset, save_tokenizer):
    """Collect two sequences from a tiny model of a type, and return them with the model."""

    def run(model_type):
        model = tiny_model(model_type, vocab_size=260)
        model.save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        traces = collect_traces(
            model=str(tmp_path / "model"),
            dataset=str(text_dataset),
            tokens=2 * LENGTH,
            sequence_length=LENGTH,
            states_dtype="float32",
            out=tmp_path / "traces",
        )
        return traces, model

    return run


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_recorded_to_disk(collect, model_type):
    traces, model = collect(model_type)
    assert (traces.anchors is None) == (model_type in WITHOUT_ANCHORS)
    assert (traces.anchors is None) == bool(traces.manifest.anchors_problem)
    moe = discover(model)
    assert traces.geometry.layer_indices == moe.geometry.layer_indices
    bias = traces.anchors.selection_bias if traces.anchors else None
    expected = moe.found_anchors.selection_bias if moe.found_anchors else None
    assert (bias is None) == (expected is None)
    assert bias is None or torch.equal(bias, expected)
    assert len(traces.record(traces.geometry.layer_indices[-1], 0)) == 2 * LENGTH


@pytest.mark.parametrize("model_type", WITHOUT_ANCHORS)
def test_traces_without_anchors_are_whole(collect, model_type):
    traces, _ = collect(model_type)
    traces.verify()
    assert Traces.open(traces.folder).anchors is None


def test_prefetching_without_anchors_or_a_bundle_is_refused_in_one_line(tmp_path):
    tiny_model("axk2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^Training-free prediction .*prefetch=none"):
        Engine.from_pretrained(str(tmp_path), prefetch="auto", expert_slots=4)
