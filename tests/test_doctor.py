"""`foreroute doctor` needs a config.json and nothing else."""

import json
from pathlib import Path

import models_matrix
import pytest
import torch
from rich.console import Console
from tiny_models import SUPPORTED, tiny_config, tiny_model
from transformers import CONFIG_MAPPING

from foreroute.data.adapters import discover
from foreroute.data.adapters.discovery import discover_outline
from foreroute.data.adapters.weightless import outline
from foreroute.runtime.planning import doctor
from foreroute.runtime.planning.doctor import diagnose, report
from foreroute.runtime.planning.packed_share import packed_share
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.pack import pack_model

RESULTS = Path(models_matrix.__file__).parent / "results" / "models.json"
ROWS = {row["model_type"]: row for row in json.loads(RESULTS.read_text())}


def diagnose_tiny(folder, model_type, **overrides):
    tiny_config(model_type, **overrides).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return diagnose(str(folder))


def test_a_config_alone_is_enough(tmp_path):
    found = diagnose_tiny(tmp_path, "deepseek_v3", dtype="bfloat16")
    assert found.moe_layers == (1, 2)
    assert found.dense_layers == (0,)
    assert (found.num_experts, found.top_k, found.dtype) == (8, 2, "bfloat16")
    assert found.expert_bytes == 3 * 64 * 32 * 2  # gate, up and down, two bytes a number
    assert found.all_experts_bytes == 2 * 8 * found.expert_bytes
    assert "sigmoid-topk-renorm x 2.5" in found.router
    assert found.norm == "DeepseekV3RMSNorm"
    assert found.recording == found.exact == found.speculative == found.graph == "yes"


def test_sizes_follow_the_dtype_asked_for(tmp_path):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    whole = diagnose(str(tmp_path), dtype="float32")
    half = diagnose(str(tmp_path), dtype="bfloat16")
    assert whole.expert_bytes == 2 * half.expert_bytes


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("phimoe", "how gate weights follow"), ("axk2", "AXK2GatedRMSNorm is neither")],
)
def test_what_cannot_be_speculated_says_why(tmp_path, model_type, reason):
    found = diagnose_tiny(tmp_path, model_type)
    assert found.speculative.startswith("skip only: ")
    assert reason in found.speculative
    assert found.exact == "yes"


@pytest.mark.parametrize(
    ("model_type", "settings", "num_bytes"),
    [
        ("gpt_oss", {"quant_method": "mxfp4"}, 17 / 32),
        ("qwen3_moe", {"quant_method": "fp8", "weight_block_size": [32, 32]}, 1 + 4 / 1024),
    ],
)
def test_low_bit_checkpoints_are_counted_in_their_own_bytes(
    tmp_path, model_type, settings, num_bytes
):
    found = diagnose_tiny(
        tmp_path, model_type, quantization_config=settings, hidden_size=64, intermediate_size=64
    )
    width = 64 if model_type == "gpt_oss" else 32
    biases = 2 * (2 * width + 64) if model_type == "gpt_oss" else 0  # the rest in bfloat16
    padding = 2 * 64
    assert found.dtype == settings["quant_method"]
    assert abs(found.expert_bytes - 3 * 64 * width * num_bytes - biases) <= padding
    assert found.graph == "yes"
    assert found.exact == "yes"


def test_hash_routed_layers_are_named(tmp_path):
    assert diagnose_tiny(tmp_path, "deepseek_v4").hash_routed == (0,)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_config_says_what_the_loaded_model_shows(tmp_path, model_type):
    found = diagnose_tiny(tmp_path, model_type)
    moe = discover(tiny_model(model_type), model_type)
    last = moe.layers[-1]
    assert found.moe_layers == moe.geometry.layer_indices
    assert (found.num_experts, found.top_k) == (moe.geometry.num_experts, moe.geometry.top_k)
    assert moe.geometry.gate_family in found.router
    assert type(last.router if last.norm else last.residual_source).__name__ in found.router
    assert last.norm is None or found.norm == type(last.norm).__name__
    assert moe.anchors_problem in found.recording
    assert (found.speculative == "yes") == (
        moe.found_anchors is not None and moe.geometry.gate_family != "other"
    )
    assert (found.graph == "yes") == (ROWS[model_type]["graph"] == "yes")


def test_one_layer_whose_experts_have_no_kernel_keeps_decisions_off_the_gpu(tmp_path):
    found = diagnose_tiny(tmp_path, "step3p7", swiglu_limits=[0.0, 0.0, 1.0])
    assert found.graph == "no: the experts' activation has no kernel"


def test_only_one_layer_of_each_kind_is_followed(tmp_path):
    config = tiny_config("deepseek_v3", num_hidden_layers=9)
    model = outline(config, torch.float32)
    moe = discover_outline(model, "deep")
    assert [layer.layer_idx for layer in moe.layers] == [1]
    assert all(p.is_meta for p in moe.layers[0].experts.parameters())


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("jetmoe", {}), ("dbrx", {}), ("longcat_flash", {}), ("llama4", {"num_experts_per_tok": 2})],
)
def test_unsupported_models_are_refused_with_the_reason(tmp_path, model_type, overrides):
    with pytest.raises(ValueError, match="so it is not supported: "):
        diagnose_tiny(tmp_path, model_type, **overrides)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("switch_transformers", "has neither AutoModelForCausalLM nor AutoModelForImageTextToText"),
        ("diffusion_gemma", "does not write one token after another"),
    ],
)
def test_models_of_another_class_are_refused_in_one_line(tmp_path, model_type, reason):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason) as refused:
        diagnose(str(tmp_path))
    assert f"({model_type})" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_that_builds_no_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot build a lfm2_moe model from the config of "):
        diagnose_tiny(tmp_path, "lfm2_moe", layer_types=None)


def test_the_report_shows_everything(tmp_path):
    console = Console(record=True, width=100)
    console.print(report(diagnose_tiny(tmp_path, "nemotron_h")))
    text = console.export_text()
    assert "5: 3 MoE (0, 2, 4), 2 without experts (1, 3)" in text
    assert "CUDA graph" in text


SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}


def share_of(folder, **settings):
    return packed_share(Checkpoint.open(str(folder), **settings))


def test_a_config_alone_does_not_say_what_12_bits_hold(tmp_path):
    tiny_config("qwen3_moe", dtype="bfloat16", **SIZES).save_pretrained(tmp_path)
    assert share_of(tmp_path).startswith("not known: a config does not say it")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_what_12_bits_hold_is_what_packing_makes_of_it(tmp_path, model_type):
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_model(model_type, dtype=torch.bfloat16, **SIZES)
    experts = model.model.layers[-1].mlp.experts
    experts.gate_up_proj.data[3, ::8, ::64] *= 2.0**-20
    wild = torch.arange(128 * 128).to(torch.int16).view(torch.bfloat16).nan_to_num(1.0, 1.0, 1.0)
    experts.down_proj.data[2] = wild.view(128, 128)
    model.save_pretrained(source)
    counted = share_of(source)
    prepared = pack_model(Checkpoint.open(str(source), expert_dtype="lossless"), out, device="cpu")
    num_experts = sum(shard.experts for shard in prepared.shards)
    stored = sum(shard.experts * shard.row_bytes for shard in prepared.shards)
    assert counted.startswith(f"{stored / prepared.plain_bytes:.3f} of ")
    assert "down_proj as it was; " in counted
    assert counted.endswith(f" (exact: all {num_experts} experts)")
    assert share_of(out) == counted.replace("experts)", "experts, when they were packed)")
    assert diagnose(str(out)).dtype == "lossless"
    weights = num_experts * 2 * 128 * 128
    assert f"; {prepared.exceptions['gate_up_proj'] / weights:.1e} of" in counted


def test_of_a_large_model_a_sample_of_every_layer_is_counted(tmp_path, monkeypatch):
    tiny_model("qwen3_moe", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    monkeypatch.setattr("foreroute.runtime.planning.packing_survey.SAMPLE_BYTES", 1 << 20)
    assert "(sampled: 9 of 24 experts)" in share_of(tmp_path)


def test_what_is_not_in_bfloat16_or_damaged_is_said(tmp_path):
    tiny_model("qwen3_moe", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    assert "the experts are in float32" in share_of(tmp_path, dtype="float32")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is incomplete or no safetensors file"):
        share_of(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "joined", "left"),
    [
        ("qwen3_moe", ["norm Qwen3MoeRMSNorm", "router Qwen3MoeTopKRouter"], "nothing"),
        (
            "deepseek_v3",
            ["norm DeepseekV3RMSNorm"],
            "router DeepseekV3TopkRouter: it does not choose by softmax and top-k alone",
        ),
        ("phimoe", [], "norm LayerNorm: it has other parameters than an RMS norm's"),
        ("qwen3_next", ["router Qwen3NextTopKRouter"], "may take more than the states"),
    ],
)
def test_a_config_alone_says_what_the_decode_graph_joins_and_why_not_the_rest(
    tmp_path, model_type, joined, left
):
    pytest.importorskip("triton", reason="needs triton")
    from foreroute.runtime.device.fusions import survey

    found = diagnose_tiny(tmp_path, model_type)
    assert all(part in found.joined for part in [*joined, "rotation of", "attention"])
    assert left in found.left
    model = tiny_model(model_type)
    routers = [layer.router for layer in discover(model).layers]
    loaded = survey(model, routers)
    assert (loaded.joined_text, loaded.left_text) == (found.joined, found.left)


def test_without_a_decode_graph_nothing_is_said_to_be_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "why_not_captured", lambda model: "it is made up")
    found = diagnose_tiny(tmp_path, "qwen3_moe")
    assert found.graph == "no: it is made up"
    assert found.joined == found.left == ""
    console = Console(width=200)
    with console.capture() as shown:
        console.print(report(found))
    assert "joined" not in shown.get()
