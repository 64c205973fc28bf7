"""What `foreroute bench` runs, and when it refuses to start."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from foreroute.estimators import host_memory
from foreroute.runtime.bench.measure import modes_for
from foreroute.runtime.bench.tables import gave_up_note
from foreroute.runtime.cli import bench
from foreroute.runtime.policies.slots import RESERVE_BYTES
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.pack import pack_model


def names(**settings):
    modes = modes_for("50%", budget=None, can_speculate=True, **settings)
    return {mode.name for mode in modes}


def test_without_predictions_only_modes_on_demand_are_measured():
    modes = names(has_bundle=False, has_anchors=False)
    assert modes == {"all-resident", "on-demand-no-cache", "on-demand"}


def test_all_experts_at_once_are_left_out_where_they_do_not_fit():
    assert "all-resident" not in names(has_bundle=False, has_anchors=False, has_room_for_all=False)


def test_a_device_is_asked_for_what_will_lie_on_it(tmp_path, monkeypatch):
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path), expert_dtype="int4")
    cuda, whole = torch.device("cuda"), checkpoint.expert_bytes + checkpoint.other_bytes
    assert checkpoint.stored_bytes < checkpoint.expert_bytes
    for total, is_held, is_stock_held in (
        (whole + RESERVE_BYTES, True, True),
        (whole + RESERVE_BYTES - 1, True, False),
        (RESERVE_BYTES, False, False),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, total=total: (0, total))
        assert checkpoint.is_held_by(cuda) is is_held
        assert checkpoint.is_held_by(cuda, is_stock=True) is is_stock_held


def test_a_model_that_has_no_stock_form_is_measured_without_it(tiny_moe, text_dataset, tmp_path):
    pack_model(Checkpoint.open(str(tiny_moe.folder)), tmp_path / "packed", device="cpu")
    bench(
        model=str(tmp_path / "packed"),
        dataset=str(text_dataset),
        num_prompts=1,
        prompt_tokens=8,
        new_tokens=8,
        repeats=1,
        json=tmp_path / "bench.json",
        html=tmp_path / "bench.html",
        device="cpu",
    )
    found = json.loads((tmp_path / "bench.json").read_text())
    assert "stock" not in found["modes"]
    assert (found["reference"], found["exact_tokens_equal"]) == ("on-demand", True)
    assert "The stock model was left out" in (tmp_path / "bench.html").read_text()


def test_a_bundle_predicts_where_the_routers_copies_cannot():
    modes = names(has_bundle=True, has_anchors=False)
    assert {"prefetch", "prefetch-all", "predicted", "substitute:0.5", "skip"} <= modes
    assert "prefetch-next-router" not in modes


def test_modes_that_stopped_looking_ahead_are_named_below_the_table():
    shares = {"on-demand": None, "prefetch": 0.25, "prefetch-all": 1.0, "other": 0.0}
    results = [SimpleNamespace(name=name, share_ahead=share) for name, share in shares.items()]
    assert gave_up_note(results).endswith("did all the same): prefetch (25%), other (0%).")
    assert gave_up_note(results[:1]) == gave_up_note(results[2:3]) == ""


def test_a_stock_model_larger_than_the_host_is_refused_with_the_numbers(tmp_path, monkeypatch):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    checkpoint.require_room_for_whole()
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"needs .* GiB are available. The stock model is loaded"):
        checkpoint.require_room_for_whole()
