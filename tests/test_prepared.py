"""A prepared model is the model it was made of: the same rows, the same bits, or one clear line."""

import json
import shutil

import pytest
import torch
from low_bit import add_quantization, save_fp8, save_mxfp4
from tiny_models import tiny_model

from foreroute.data.adapters import load_model
from foreroute.estimators.artifacts import read_json
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.store import pack
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.offload import load_offloaded
from foreroute.runtime.store.pack import pack_model, summary

SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
TOKENS = torch.arange(3, 14).unsqueeze(0)


def save(folder, model_type="qwen3_moe", dtype=torch.bfloat16):
    tiny_model(model_type, dtype=dtype, **SIZES).save_pretrained(folder, max_shard_size="300KB")
    (folder / "README.md").write_text("A card.")
    return folder


def packed(source, out, expert_dtype="lossless", **settings):
    checkpoint = Checkpoint.open(str(source), expert_dtype=expert_dtype)
    return pack_model(checkpoint, out, device="cpu", **settings)


def logits_of(folder, **settings):
    offloaded = load_offloaded(str(folder), device="cpu", **settings)
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine, torch.no_grad():
        return offloaded, engine(TOKENS).logits


@pytest.mark.parametrize("expert_dtype", ["auto", "lossless", "bf16", "fp8", "int8", "int4"])
def test_a_prepared_model_has_the_rows_and_logits_of_its_source(tmp_path, expert_dtype):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    packed(source, out, expert_dtype)
    made, logits = logits_of(source, expert_dtype=expert_dtype)
    read, same_logits = logits_of(out)
    assert read.store.layouts == made.store.layouts
    assert all(map(torch.equal, read.store.rows, made.store.rows))
    assert torch.equal(same_logits, logits)
    assert (out / "README.md").read_text() == "A card."
    assert not (tmp_path / "out.packing").exists()


def save_low_bit(folder, how):
    """A checkpoint whose experts are in fewer bits already."""
    folder.mkdir()
    if how == "mxfp4":
        save_mxfp4(folder)
    else:
        save_fp8(folder, how)


@pytest.mark.parametrize("how", ["mxfp4", "qwen3_moe", "deepseek_v3"])
def test_checkpoints_in_fewer_bits_are_packed_as_they_are(tmp_path, how):
    """GPT-OSS's own MXFP4, and FP8 in blocks of two architectures."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_low_bit(source, how)
    prepared = packed(source, out, "auto")
    made, logits = logits_of(source)
    read, same_logits = logits_of(out)
    assert read.store.layouts == made.store.layouts
    assert all(layout.is_native for layout in read.store.layouts)
    assert all(map(torch.equal, read.store.rows, made.store.rows))
    assert torch.equal(same_logits, logits)
    stored = sum(shard.experts * shard.row_bytes for shard in prepared.shards)
    assert stored == made.store.num_bytes
    with pytest.raises(ValueError, match=r"comes in \w+ already, which is kept"):
        packed(source, tmp_path / "other", "int8")


def test_what_is_decoded_while_it_is_read_is_not_packed(tmp_path):
    source = save(tmp_path / "source")
    add_quantization(source, {"quant_method": "fp8", "activation_scheme": "static"})
    with pytest.raises(ValueError, match="decoded while it is read, which is not packed"):
        packed(source, tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists()


def test_other_architectures_and_what_stays_come_back_too(tmp_path):
    source = save(tmp_path / "source", "gpt_oss")
    model = load_model(str(source), dtype="bfloat16")
    experts = model.model.layers[1].mlp.experts
    wild = torch.arange(128 * 128).to(torch.int16).view(torch.bfloat16).nan_to_num(1.0, 1.0, 1.0)
    experts.down_proj.data[2] = wild.view(128, 128)
    model.save_pretrained(source)
    prepared = packed(source, tmp_path / "out")
    assert prepared.stays == ("down_proj",)
    assert "down_proj: as it was; 12 bits do not pay for it." in summary(prepared)
    expected, logits = logits_of(source)
    read, same_logits = logits_of(tmp_path / "out")
    assert read.store.num_bytes < expected.store.num_bytes
    assert torch.equal(same_logits, logits)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    whole = packed(source, tmp_path / "whole")
    written, write = [], pack._Packing._write_shard

    def stop_at_the_last(self, number, store):
        if number == 2 and not written.count(2):
            written.append(number)
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, store)

    monkeypatch.setattr(pack._Packing, "_write_shard", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        packed(source, out)
    assert not out.exists()
    assert packed(source, out) == whole
    assert written == [0, 1, 2, 2]


def test_what_another_run_left_is_not_taken_for_its_own(tmp_path, monkeypatch):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(pack._Packing, "_write_rest", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed(source, out)
    monkeypatch.undo()
    assert packed(source, out, "int8").expert_dtype == "int8"
    logits_of(out)


@pytest.mark.parametrize("stage", ["before", "after"])
def test_the_old_model_stays_until_the_new_one_has_its_name(tmp_path, monkeypatch, stage):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    (source / "LICENSE").write_text("Yours.")
    packed(source, out, "int8")
    give = pack.give_place

    def killed(new, path):
        if stage == "after":
            give(new, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "give_place", killed)
    with pytest.raises(KeyboardInterrupt):
        packed(source, out, "bf16", overwrite=True)
    monkeypatch.undo()
    logits_of(out)  # one of the two, and whole
    manifest = json.loads((out / "foreroute.json").read_text())
    assert manifest["expert_dtype"] == ("int8" if stage == "before" else "bf16")
    assert packed(source, out, "bf16", overwrite=True).expert_dtype == "bf16"
    assert not (tmp_path / "out.packing").exists()


def damage(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    packed(source, out)
    shard, manifest = out / "experts" / "layer-001.safetensors", out / "foreroute.json"
    whole = shard.read_bytes()
    for at in (3, 40, len(whole) // 2, -1):
        damage(shard, at)
        with pytest.raises(ValueError, match=r"layer-001.safetensors is damaged.*foreroute pack"):
            logits_of(out)
        shard.write_bytes(whole)
    for content in (whole[:-100], whole + b"x", b"", b"1234"):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"layer-001.safetensors is damaged"):
            logits_of(out)
    shard.unlink()
    with pytest.raises(ValueError, match=r"layer-001.safetensors is missing"):
        logits_of(out)
    shard.write_bytes(whole)
    rest = out / "model.safetensors"
    damage(rest, -5)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        logits_of(out)
    damage(rest, -5)
    logits_of(out)
    values = read_json(manifest)
    manifest.write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format version 99; this foreroute reads version 2"):
        logits_of(out)
    manifest.write_text(json.dumps(values)[:-9])
    with pytest.raises(ValueError, match=r"foreroute.json is damaged"):
        logits_of(out)


def test_what_cannot_be_is_refused(tmp_path):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    packed(source, out)
    with pytest.raises(ValueError, match="holds experts in lossless; expert_dtype=int8 needs the"):
        load_offloaded(str(out), device="cpu", expert_dtype="int8")
    with pytest.raises(ValueError, match="are of a model in bfloat16"):
        load_offloaded(str(out), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="is a prepared model already"):
        packed(out, tmp_path / "again", "auto")
    with pytest.raises(ValueError, match="exists already"):
        packed(source, out)
    with pytest.raises(ValueError, match="is a prepared model, whose experts"):
        load_model(str(out))
    shutil.rmtree(out / "experts")
    packed(source, out, overwrite=True)
    logits_of(out)


def test_a_users_own_folder_of_the_unfinished_name_is_left_alone(tmp_path):
    source, own = save(tmp_path / "source"), tmp_path / "out.packing"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else; move it away"):
        packed(source, tmp_path / "out")
    assert (own / "notes.txt").read_text() == "mine"
