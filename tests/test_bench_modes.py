"""What `foreroute bench` runs, and when it refuses to start."""

from types import SimpleNamespace

import pytest
from tiny_models import tiny_model

from foreroute.estimators import host_memory
from foreroute.runtime.bench.measure import modes_for
from foreroute.runtime.bench.tables import gave_up_note
from foreroute.runtime.store.checkpoint import Checkpoint


def names(**settings):
    modes = modes_for("50%", budget=None, can_speculate=True, **settings)
    return {mode.name for mode in modes}


def test_without_predictions_only_modes_on_demand_are_measured():
    modes = names(has_bundle=False, has_anchors=False)
    assert modes == {"all-resident", "on-demand-no-cache", "on-demand"}


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
