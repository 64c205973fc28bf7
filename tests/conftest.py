"""Fixtures shared by all tests: a tiny MoE on disk, and traces recorded from it."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in one process per core

import torch

if not torch.cuda.is_available():  # before anything imports triton: it decides at import
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from quick_interpreter import patch_the_language_once, remember_types

        patch_the_language_once()
        remember_types()

import huggingface_hub
from hub_stub import StubHub, stub_hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from foreroute.data.adapters import MoEModel, discover, load_model

VOCAB_SIZE = 260
TEXT = (
    "def parse(line: str) -> list[int]:\n    return [int(part) for part in line.split(',')]\n"
    "\n\nclass Reader:\n    # Reads numbers, one a line.\n    def __init__(self, path):\n"
    "        self.path = path\n\n    def rows(self):\n        with open(self.path) as file:\n"
    "            yield from map(parse, file)\n\n"
)


class TinyMoE(NamedTuple):
    """A tiny Qwen3-MoE with random weights, saved with its tokenizer."""

    folder: Path
    model: Any
    moe: MoEModel


def save_byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], None]:
    """Save a tokenizer of single bytes, 260 tokens at most, into a model's folder."""
    return save_byte_tokenizer


def save_tiny_moe(folder: Path, **overrides: Any) -> None:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | overrides)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Routers are sharper than the rest, so that routing is far from uniform.
                gain = 2.0 if name.endswith("gate.weight") else 1.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


@pytest.fixture(scope="session")
def make_tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyMoE]:
    """Make a tiny Qwen3-MoE; keyword arguments go to its config (`mlp_only_layers=[0]`)."""

    def make(**overrides: Any) -> TinyMoE:
        folder = tmp_path_factory.mktemp("tiny_moe")
        save_tiny_moe(folder, **overrides)
        model = load_model(str(folder))
        return TinyMoE(folder, model, discover(model, "tiny"))

    return make


@pytest.fixture(scope="session")
def tiny_moe(make_tiny_moe: Callable[..., TinyMoE]) -> TinyMoE:
    """4 MoE layers, 8 experts, top-2, hidden 32; `.folder` serves as `--model`."""
    return make_tiny_moe()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """A Hub on loopback that the real client talks to, with an empty cache."""
    constants = huggingface_hub.constants
    with stub_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 short text files; serves as `--dataset`."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"file_{i:02d}.py").write_text(TEXT.replace("parse", f"parse_{i}") * 2)
    return folder


@pytest.fixture(scope="session")
def tiny_traces(
    tiny_moe: TinyMoE, text_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of traces recorded from `tiny_moe`: 3 shards of 16 sequences of 64 tokens."""
    from foreroute.data.collect import collect_traces

    out = tmp_path_factory.mktemp("traces") / "tiny"
    collect_traces(
        model=str(tiny_moe.folder),
        dataset=str(text_dataset),
        tokens=48 * 64,
        out=out,
        sequence_length=64,
        generated_share=0.25,
        states_dtype="float32",
        shard_tokens=16 * 64,
        batch_size=8,
    )
    return out
