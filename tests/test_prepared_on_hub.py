"""Prepared models on a Hub on loopback, by the real client: pushed, found, cached, refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_stub import StubHub

from foreroute.data.adapters import load_model, load_tokenizer
from foreroute.estimators.artifacts import read_json, sha256_of, write_json
from foreroute.runtime import Engine
from foreroute.runtime.cli import main
from foreroute.runtime.planning.doctor import diagnose
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.pack import pack_model
from foreroute.runtime.store.publish import push_prepared

REPO = "me/packed"
TOKENS = torch.arange(5, 16).unsqueeze(0)
CARD = """---
license: mit
---
# The source
"""


@pytest.fixture(scope="module")
def packed(tiny_moe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a card and with fields that say where it once lay, prepared in int8."""
    folder = tmp_path_factory.mktemp("packed")
    source = Path(shutil.copytree(tiny_moe.folder, folder / "source"))
    (source / "README.md").write_text(CARD)
    (source / "notes.log").write_text(f"made in {source}")
    for name, field in (("config", "_name_or_path"), ("tokenizer_config", "tokenizer_file")):
        values = read_json(source / f"{name}.json")
        write_json(source / f"{name}.json", values | {field: str(source / "x.json")})
    pack_model(Checkpoint.open(str(source), expert_dtype="int8"), folder / "out", device="cpu")
    return folder / "out"


def logits_of(name: str, **settings: Any) -> torch.Tensor:
    with (
        Engine.from_pretrained(name, expert_slots=4, device="cpu", **settings) as engine,
        torch.no_grad(),
    ):
        logits: torch.Tensor = engine(TOKENS).logits
        return logits


def test_a_prepared_model_comes_back_as_it_went(hub: StubHub, packed: Path) -> None:
    assert REPO in push_prepared(packed, REPO)
    assert torch.equal(logits_of(REPO), logits_of(str(packed)))
    assert load_tokenizer(REPO)("def")["input_ids"]
    assert not list(packed.parent.glob(".push-*"))
    asked = len(hub.downloads)
    logits_of(REPO)  # everything is in the cache now
    assert hub.downloads[asked:] == []


def test_offline_takes_the_cache_and_says_so_where_there_is_none(
    hub: StubHub, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_prepared(packed, REPO)
    diagnose(REPO)
    known = {"config.json", "generation_config.json", "foreroute.json"}
    assert set(hub.downloads) <= known  # what a model needs is known before its weights are here
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be") as raised:
        logits_of(REPO)
    assert len(str(raised.value).splitlines()) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = logits_of(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(REPO), online)


def test_a_revision_is_honoured(hub: StubHub, packed: Path, tiny_moe: Any, tmp_path: Path) -> None:
    first = push_prepared(packed, REPO).rpartition("/")[2]
    pack_model(Checkpoint.open(str(tiny_moe.folder)), tmp_path / "exact", device="cpu")
    push_prepared(tmp_path / "exact", REPO)
    assert torch.equal(logits_of(REPO, revision=first), logits_of(str(packed)))
    assert torch.equal(logits_of(REPO), logits_of(str(tiny_moe.folder)))
    with pytest.raises(ValueError, match="not a valid git identifier") as raised:
        logits_of(REPO, revision="no-such-one")
    assert len(str(raised.value).splitlines()) == 1


def test_what_is_pushed_holds_no_local_path(hub: StubHub, packed: Path) -> None:
    push_prepared(packed, REPO)
    files = hub.repos[REPO]
    assert {"foreroute.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert sum(name.startswith("experts/") for name in files) == 4
    assert not {"command.txt", "notes.log"} & set(files)
    for name, content in files.items():
        assert str(packed.parent).encode() not in content, name
    assert json.loads(files["foreroute.json"])["source"] == "source"
    assert files["tokenizer.json"] == (packed / "tokenizer.json").read_bytes()


def test_the_card_says_what_it_is(hub: StubHub, packed: Path, tmp_path: Path) -> None:
    push_prepared(packed, REPO)
    card = hub.repos[REPO]["README.md"].decode()
    assert "license: mit" in card  # the source's
    assert "Experts are rounded, in int8" in card
    assert "## Limits" in card
    assert "base_model:" not in card  # a folder of somebody's is none
    again = shutil.copytree(packed, tmp_path / "again")
    manifest = read_json(again / "foreroute.json")
    write_json(again / "foreroute.json", manifest | {"source": "some/model", "revision": "abc"})
    push_prepared(again, REPO)
    card = hub.repos[REPO]["README.md"].decode()
    assert "base_model: some/model" in card
    assert "at commit abc" in card


def test_what_is_damaged_is_not_pushed(hub: StubHub, packed: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(packed, tmp_path / "broken")
    shard = next((broken / "experts").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        push_prepared(broken, REPO)
    assert hub.repos == {}


def test_rows_beside_another_models_weights_are_refused(packed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(packed, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    routers = {name: -tensor for name, tensor in tensors.items() if name.endswith("gate.weight")}
    save_file(tensors | routers, other / "model.safetensors", {"format": "pt"})
    manifest = read_json(other / "foreroute.json")
    digest = sha256_of(other / "model.safetensors")
    write_json(other / "foreroute.json", manifest | {"rest": manifest["rest"] | {"sha256": digest}})
    with pytest.raises(ValueError, match="of another checkpoint"):
        logits_of(str(other))


def test_a_manifest_names_no_file_elsewhere(packed: Path, tmp_path: Path) -> None:
    other = shutil.copytree(packed, tmp_path / "other")
    manifest = read_json(other / "foreroute.json")
    manifest["shards"][0]["file"] = "../out/experts/layer-000.safetensors"
    write_json(other / "foreroute.json", manifest)
    with pytest.raises(ValueError, match=r"foreroute.json is damaged .*shards\[0\].file"):
        logits_of(str(other))


def test_it_is_not_loaded_whole(hub: StubHub, packed: Path) -> None:
    push_prepared(packed, REPO)
    with pytest.raises(ValueError, match="me/packed is a prepared model"):
        load_model(REPO)


def test_the_command_pushes_again_without_packing_again(
    hub: StubHub,
    tiny_moe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["pack", "--model", str(tiny_moe.folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["foreroute", *given, "--push-to-hub", REPO])
    main()
    assert f"/{REPO}/commit/" in capsys.readouterr().out
    first, before = dict(hub.repos.pop(REPO)), (tmp_path / "out").stat().st_ino
    main()
    assert hub.repos[REPO] == first
    assert (tmp_path / "out").stat().st_ino == before
