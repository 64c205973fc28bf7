"""Experts go from the checkpoint to their host rows, bit for bit, and exist only there."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_images import image_prompt
from tiny_models import SUPPORTED, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    conversion_mapping,
)
from transformers.core_model_loading import Interleave, Transpose, WeightConverter

from foreroute.data.adapters import load_model
from foreroute.data.adapters.adapted import open_experts
from foreroute.data.adapters.model_class import auto_class
from foreroute.data.adapters.weightless import parameter_shapes
from foreroute.estimators import host_memory
from foreroute.runtime import Engine
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.expert_reader import ExpertReader
from foreroute.runtime.store.offload import load_offloaded

SHARD_BYTES = "200KB"
DTYPES = ("float32", "bfloat16", "float16")


def save(folder, model_type="qwen3_moe", dtype=torch.float32, **overrides):
    model = tiny_model(model_type, dtype=dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    return model


def assert_same_weights(offloaded, stock):
    open_experts(stock)  # or aria's lie under other names
    expected = dict(stock.named_parameters())
    model = offloaded.moe.model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    store = offloaded.store
    for layer, layout, rows in zip(offloaded.moe.layers, store.layouts, store.rows, strict=True):
        for name, view in layout.views(rows).items():
            weight = stock.get_parameter(f"{layer.name}.{name}")
            assert view.dtype == weight.dtype
            assert torch.equal(view, weight), f"{layer.name}.{name}"
    assert not set(expected) - {"lm_head.weight"}  # tied to the embeddings


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_sharded_checkpoints_of_every_type_load_bit_for_bit(tmp_path, model_type):
    saved = save(tmp_path, model_type)
    stock = auto_class(saved.config).from_pretrained(tmp_path)
    assert_same_weights(load_offloaded(str(tmp_path), device="cpu"), stock)


def test_the_part_that_writes_is_loaded_from_the_checkpoint_of_a_whole_that_also_speaks(tmp_path):
    thinker = tiny_model("qwen3_omni_moe")
    tiny_config("qwen3_omni_moe").save_pretrained(tmp_path)
    tensors = {f"thinker.{name}": tensor for name, tensor in thinker.state_dict().items()}
    save_file(tensors | {"talker.other": torch.ones(2)}, tmp_path / "model.safetensors")
    assert_same_weights(load_offloaded(str(tmp_path), device="cpu"), thinker)


def test_experts_that_were_opened_are_saved_under_their_old_names(tmp_path):
    tensors = save(tmp_path, "aria_text").state_dict()
    model = load_offloaded(str(tmp_path), device="cpu").moe.model
    model.save_pretrained(tmp_path / "again")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("asked", ["auto", *DTYPES])
def test_dtypes_are_converted_as_transformers_does(tmp_path, saved, asked):
    save(tmp_path, dtype=getattr(torch, saved))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
    offloaded = load_offloaded(str(tmp_path), device="cpu", dtype=asked)
    assert offloaded.moe.model.dtype == stock.dtype
    assert_same_weights(offloaded, stock)


def test_auto_dtype_reads_the_checkpoint_where_the_config_is_silent(tmp_path):
    save(tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert stock.dtype == torch.bfloat16
    assert_same_weights(load_offloaded(str(tmp_path), device="cpu"), stock)


def test_tied_embeddings_stay_tied(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    model = load_offloaded(str(tmp_path), device="cpu").moe.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("model_type", ["mixtral", "jamba"])  # jamba rounds by requires_grad
def test_the_engine_runs_what_was_loaded_exactly(tmp_path, model_type):
    save(tmp_path, model_type)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    stock.set_experts_implementation("batched_mm")
    tokens = torch.arange(3, 12).unsqueeze(0)
    with (
        Engine.from_pretrained(str(tmp_path), expert_slots="4", device="cpu") as engine,
        torch.no_grad(),
    ):
        assert torch.equal(engine(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe"])  # own experts of images
def test_the_engine_reads_images_with_what_was_loaded(tmp_path, model_type):
    tokens, image = image_prompt(save(tmp_path, model_type))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    stock.set_experts_implementation("batched_mm")
    with (
        Engine.from_pretrained(str(tmp_path), expert_slots="4", device="cpu") as engine,
        torch.no_grad(),
    ):
        logits = engine(tokens, **image).logits
        assert torch.equal(logits, stock(tokens, **image).logits)
        assert not torch.allclose(logits[:, -1], engine(tokens.clamp(max=99)).logits[:, -1])


def test_the_experts_parameters_are_their_host_rows_and_the_classes_are_untouched(tmp_path):
    save(tmp_path)
    offloaded = load_offloaded(str(tmp_path), device="cpu")
    experts, rows = offloaded.moe.layers[0].experts, offloaded.store.rows[0]
    assert type(offloaded.moe.model).__module__.startswith("transformers")
    assert experts.gate_up_proj.data_ptr() == rows.data_ptr()
    rows.zero_()
    assert not any(parameter.any() for parameter in experts.parameters())
    assert list(parameter_shapes(experts)) == ["gate_up_proj", "down_proj"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.experts.gate_up_proj.device.type == "cpu"


def test_per_expert_tensors_are_read_one_at_a_time(tmp_path):
    save(tmp_path, "qwen3_moe")
    offloaded = load_offloaded(str(tmp_path), device="cpu")
    layer = offloaded.moe.layers[0]
    targets = {f"{layer.name}.{n}": s for n, s in parameter_shapes(layer.experts).items()}
    files = Checkpoint.open(str(tmp_path)).files
    parts = list(ExpertReader(offloaded.moe.model, files, targets).parts(targets))
    assert len(parts) == 8 * 3  # gate, up and down of every expert
    assert max(part.rows.numel() for part in parts) == 64 * 32


def transposed(name, weight):
    return name, weight.transpose(1, 2).contiguous()


def interleaved(name, weight):
    """Rows of gate and up take turns, as in inkling's checkpoints."""
    if name.endswith("down_proj"):
        return name, weight
    gate, up = weight.chunk(2, dim=1)
    return name.replace("gate_up_proj", "w13"), torch.stack([gate, up], dim=2).flatten(1, 2)


CONVERTERS = {
    transposed: [
        WeightConverter(f"experts.{name}", f"experts.{name}", [Transpose(1, 2, check_dims=True)])
        for name in ("gate_up_proj", "down_proj")
    ],
    interleaved: [WeightConverter("experts.w13", "experts.gate_up_proj", [Interleave(dim=1)])],
}


@pytest.mark.parametrize("layout", CONVERTERS)
def test_layouts_that_need_transformers_converters_load_bit_for_bit(tmp_path, monkeypatch, layout):
    model = tiny_model("qwen3_moe", moe_intermediate_size=24)  # no matrix is square
    conversion_mapping.get_checkpoint_conversion_mapping("")  # builds the table of mappings
    mappings = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(mappings, type(model).__name__, CONVERTERS[layout])
    tensors = dict(
        layout(name, weight) if ".experts." in name else (name, weight)
        for name, weight in model.state_dict().items()
    )
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    offloaded = load_offloaded(str(tmp_path), device="cpu")
    assert_same_weights(offloaded, model)


def test_a_missing_tensor_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    merged = {}
    for shard in sorted(tmp_path.glob("model-*.safetensors")):
        merged |= load_file(shard)
        shard.unlink()
    lost = {k: v for k, v in merged.items() if "layers.1.mlp.experts" not in k}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensors for model\.layers\.1\.mlp\.experts"):
        load_offloaded(str(tmp_path), device="cpu")
    lost = {k: v for k, v in merged.items() if "experts.3.gate_proj" not in k}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="some are missing"):
        load_offloaded(str(tmp_path), device="cpu")


def test_a_missing_shard_is_named(tmp_path):
    save(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        load_offloaded(str(tmp_path), device="cpu")


def test_pickled_checkpoints_are_refused_without_opening_them(tmp_path):
    model = tiny_model("qwen3_moe")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert the checkpoint to safetensors"):
        load_offloaded(str(tmp_path), device="cpu")


def test_a_host_without_enough_memory_is_told_the_numbers(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: 2**20 // 2)
    with pytest.raises(
        ValueError, match=r"needs 0\.0 GiB of host memory .* 0\.0 GiB are available"
    ):
        load_offloaded(str(tmp_path), device="cpu")


def test_memory_is_asked_for_before_any_file_of_weights(tmp_path, monkeypatch):
    tiny_config("qwen3_moe", dtype="bfloat16").save_pretrained(tmp_path)
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: 0)
    with pytest.raises(ValueError, match="of host memory for its experts"):
        load_offloaded(str(tmp_path), device="cpu")


def test_available_memory_obeys_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert host_memory.available_host_bytes() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_host_bytes() != 400


def test_a_revision_of_a_cached_hub_model_is_loaded(tmp_path):
    hub = tmp_path / "hub" / "models--org--tiny"
    for revision, seed in (("main", 0), ("v2", 1)):
        snapshot = hub / "snapshots" / f"{revision}0"
        tiny_model("qwen3_moe", seed=seed).save_pretrained(snapshot)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(f"{revision}0")
    code = (
        "import torch\n"
        "from foreroute.runtime.store.offload import load_offloaded\n"
        "sums = [load_offloaded('org/tiny', device='cpu', revision=r).store.rows[0]"
        ".double().sum() for r in (None, 'main', 'v2')]\n"
        "assert sums[0] == sums[1] != sums[2], sums\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_loading_shows_how_many_bytes_of_the_experts_it_has_read(tmp_path, monkeypatch, capsys):
    save(tmp_path)
    capsys.readouterr()
    load_offloaded(str(tmp_path), device="cpu")
    assert capsys.readouterr().err == ""  # no bar where nobody watches
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    store = load_offloaded(str(tmp_path), device="cpu").store
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    total = f"{store.num_bytes / 1000:.1f}"
    assert f"experts {'━' * 40} {total}/{total} kB" in shown


def test_the_experts_come_from_the_files_that_transformers_reads(tmp_path):
    """A new whole file beside old shards and their index; and a file that the config names."""
    for folder in (tmp_path / "beside", tmp_path / "named"):
        save(folder, seed=0)
        tiny_model("qwen3_moe", seed=1).save_pretrained(tmp_path / "new")
        weights = (tmp_path / "new" / "model.safetensors").read_bytes()
        name = "model.safetensors" if folder.name == "beside" else "weights.safetensors"
        (folder / name).write_bytes(weights)
        if folder.name == "named":
            config = json.loads((folder / "config.json").read_text())
            config["transformers_weights"] = name
            (folder / "config.json").write_text(json.dumps(config))
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(stock.lm_head.weight, tiny_model("qwen3_moe", seed=1).lm_head.weight)
        assert_same_weights(load_offloaded(str(folder), device="cpu"), stock)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "index", "shard"])
@pytest.mark.parametrize("damage", ["pointer", "cut", "empty"])
def test_a_file_that_is_not_whole_is_named_in_one_line(tmp_path, name, damage):
    if name in ("index", "shard"):
        save(tmp_path)
        name = "model.safetensors.index.json" if name == "index" else "model-00002-of-*"
    else:
        tiny_model("qwen3_moe").save_pretrained(tmp_path)
    path = next(iter(sorted(tmp_path.glob(name))))
    whole = path.read_bytes()
    path.write_bytes({"pointer": POINTER, "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    for load in (load_model, load_offloaded):
        with pytest.raises(ValueError, match=re.escape(path.name)) as error:
            load(str(tmp_path), device="cpu")
        assert "\n" not in str(error.value)
        assert damage != "pointer" or name == "config.json" or "Git LFS pointer" in str(error.value)


@pytest.mark.parametrize("field", ["weight_map", "metadata"])
def test_an_index_that_lacks_what_transformers_reads_is_named(tmp_path, field):
    save(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content[field]
    index.write_text(json.dumps(content))
    for load in (load_model, load_offloaded):
        with pytest.raises(ValueError, match=r"index\.json is no index of a checkpoint's tensors"):
            load(str(tmp_path), device="cpu")


def test_names_outside_the_folder_are_not_opened(tmp_path):
    save(tmp_path / "model")
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    index = tmp_path / "model" / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/dev/zero", str(tmp_path / "model.safetensors")):
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], name)
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"outside|lacks"):
            load_offloaded(str(tmp_path / "model"), device="cpu")


def test_arguments_of_transformers_work_or_say_what_to_do(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "sub")
    tokens = torch.arange(3, 12).unsqueeze(0)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sub", attn_implementation="eager"
    ).eval()
    stock.set_experts_implementation("batched_mm")
    settings = {
        "device_map": "cpu",
        "torch_dtype": "auto",
        "low_cpu_mem_usage": True,
        "use_safetensors": True,
        "local_files_only": True,
        "token": None,
        "subfolder": "sub",
        "attn_implementation": "eager",
    }
    engine = Engine.from_pretrained(tmp_path, expert_slots=4, **settings)
    with engine, torch.no_grad():
        assert torch.equal(engine(tokens).logits, stock(tokens).logits)
    for name, value in {
        "max_memory": {0: "8GiB"},
        "load_in_4bit": True,
        "device_map": {"model": 0, "lm_head": 1},
        "policey": "lru",
        "budget": "4",
        "use_safetensors": False,
    }.items():
        with pytest.raises(ValueError, match=name):
            Engine.from_pretrained(tmp_path / "sub", **{name: value})


def test_a_loaded_model_is_taken_over():
    model, tokens = tiny_model("mixtral"), torch.arange(3, 12).unsqueeze(0)
    model.set_experts_implementation("batched_mm")
    expected = model(tokens).logits
    with Engine.from_pretrained(model, expert_slots="4", device="cpu") as engine:
        assert torch.equal(engine(tokens).logits, expected)
    with pytest.raises(ValueError, match="loaded already"):
        Engine.from_pretrained(tiny_model("mixtral"), revision="v2")
    with pytest.raises(ValueError, match="is no causal language model"):
        Engine.from_pretrained(torch.nn.Linear(2, 2))
