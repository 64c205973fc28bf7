"""Bundles and traces on a Hub on loopback, by the real client: there and back, cards, offline."""

import dataclasses
from pathlib import Path

import huggingface_hub
import pytest
from hub_stub import StubHub

from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec
from foreroute.export.bundle import load_bundle
from foreroute.export.export import export_estimator
from foreroute.export.push import push_bundle, push_traces
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

REPO = "me/estimators"


@pytest.fixture(scope="module")
def tiny_bundle(tiny_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, out = (tmp_path_factory.mktemp("hub") / name for name in ("run", "bundle"))
    spec = EstimatorSpec(form="ridge", target_layers=(1, 2, 3))
    train_estimator(tiny_traces, spec, FitConfig(), run, device="cpu")
    export_estimator(run, out)
    return out


def test_a_bundle_comes_back_as_it_went(hub: StubHub, tiny_bundle: Path) -> None:
    assert REPO in push_bundle(tiny_bundle, REPO)
    assert set(hub.repos[REPO]) == {"README.md", "manifest.json", "estimators.safetensors"}
    back, sent = load_bundle(REPO), load_bundle(tiny_bundle)
    assert back.manifest.pairs == sent.manifest.pairs
    assert back.manifest.geometry == sent.manifest.geometry  # names play no part in that
    again = load_bundle(f"{REPO}@main")
    assert again.manifest == back.manifest


def test_nothing_pushed_holds_a_local_path(
    hub: StubHub, tiny_bundle: Path, tiny_traces: Path
) -> None:
    push_bundle(tiny_bundle, REPO)
    push_traces(tiny_traces, "me/traces")
    for files in hub.repos.values():
        for name in ("README.md", "manifest.json"):
            text = files[name].decode()
            assert str(tiny_bundle.parent) not in text
            assert str(tiny_traces.parent) not in text
            assert "/tmp" not in text


def test_the_card_holds_the_measured_table(hub: StubHub, tiny_bundle: Path) -> None:
    push_bundle(tiny_bundle, REPO)
    card = hub.repos[REPO]["README.md"].decode()
    manifest = load_bundle(tiny_bundle).manifest
    for pair in manifest.pairs:
        assert f"| {pair.target_layer} | {pair.form} |" in card
        assert f"{pair.recall_at_k:.3f}" in card
    assert "license: apache-2.0" in card
    assert "## Limits" in card


def test_traces_come_back_whole(hub: StubHub, tiny_traces: Path, tmp_path: Path) -> None:
    push_traces(tiny_traces, "me/traces")
    place = tmp_path / "back"
    huggingface_hub.snapshot_download("me/traces", repo_type="dataset", local_dir=place)
    Traces.open(place).verify()
    assert Traces.open(place).num_tokens == Traces.open(tiny_traces).num_tokens
    assert not list(tiny_traces.parent.glob(".push-*"))


def test_offline_takes_the_cache_and_says_so_where_there_is_none(
    hub: StubHub, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_bundle(tiny_bundle, REPO)
    online = load_bundle(REPO).manifest
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_bundle(REPO).manifest == online
    with pytest.raises(ValueError, match="not in the local cache"):
        load_bundle("me/never-loaded")


@pytest.mark.parametrize("name", ["me/nothing", f"{REPO}@no-such-revision", "no/such/folder"])
def test_what_is_not_there_is_said_in_one_line(hub: StubHub, tiny_bundle: Path, name: str) -> None:
    push_bundle(tiny_bundle, REPO)
    with pytest.raises(FileNotFoundError) as raised:
        load_bundle(name)
    assert len(str(raised.value).splitlines()) == 1


def test_a_repository_without_a_bundle_is_named(hub: StubHub) -> None:
    hub.repos["me/other"] = {"README.md": b"# Other"}
    with pytest.raises(FileNotFoundError, match="holds no bundle"):
        load_bundle("me/other")


def test_a_bundle_of_another_model_is_refused(hub: StubHub, tiny_bundle: Path) -> None:
    push_bundle(tiny_bundle, REPO)
    bundle = load_bundle(REPO)
    other = dataclasses.replace(bundle.manifest.geometry, router_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="Bundle was made for"):
        bundle.require_fits(other)
