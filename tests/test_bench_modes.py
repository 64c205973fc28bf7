"""What `foreroute bench` runs, and when it refuses to start."""

import pytest
from tiny_models import tiny_model

from foreroute.estimators import host_memory
from foreroute.runtime.bench import modes_for
from foreroute.runtime.loading import Source, require_room_for_whole


def names(**settings):
    modes = modes_for("50%", budget=None, can_speculate=True, **settings)
    return {mode.name for mode in modes}


def test_without_predictions_only_modes_on_demand_are_measured():
    modes = names(has_bundle=False, has_anchors=False)
    assert modes == {"all-resident", "on-demand-no-cache", "on-demand"}


def test_a_bundle_predicts_where_the_routers_copies_cannot():
    modes = names(has_bundle=True, has_anchors=False)
    assert {"prefetch", "speculative", "skip"} <= modes
    assert "prefetch-next-router" not in modes


def test_a_stock_model_larger_than_the_host_is_refused_with_the_numbers(tmp_path, monkeypatch):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    source = Source(name=str(tmp_path))
    require_room_for_whole(source)
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"needs .* GiB are available. The stock model is loaded"):
        require_room_for_whole(source)
