"""Readers of what others wrote (models, tokenizers, datasets, requests), and such files."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from conftest import save_byte_tokenizer
from safetensors.torch import save_file

from foreroute.data.adapters import load_tokenizer
from foreroute.data.adapters.chat import encode_chat
from foreroute.data.adapters.config_file import check_generation_file
from foreroute.data.adapters.loading import PREPARED_MANIFEST
from foreroute.data.adapters.weight_files import find_weight_files
from foreroute.data.columns import RowReading
from foreroute.data.text_files import local_documents
from foreroute.estimators.artifacts import sha256_of, write_json, write_tensors
from foreroute.runtime.planning.doctor import diagnose
from foreroute.runtime.serving.requests import CHAT, checked
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.prepared import PreparedModel, RestFile, RowFile, describe_layout
from foreroute.runtime.store.prepared_rows import ROWS, block_digests, bytes_of, read_rows


@dataclass(frozen=True)
class Target:
    """One reader, with the files that it reads."""

    make: Callable[[Path], None]
    """Write them, undamaged, into an empty folder."""
    files: tuple[str, ...]
    """Which of them to damage."""
    read: Callable[[Path], Any]
    """Read them from there."""
    repair: Callable[[Path], None] = lambda _: None
    """Make digests right again, so that what is behind them is reached too."""
    share: int = 1
    """Inputs in a round of all targets: quick readers get more."""
    writes: bool = False
    """Whether reading changes the files."""


def make_weights(folder: Path) -> None:
    """A checkpoint in two files, with an index."""
    names = {f"layers.{n}.{part}": n for n in range(2) for part in ("norm", "up_proj", "ids")}
    for shard in range(2):
        tensors = {name: torch.zeros(2, 3) for name, at in names.items() if at == shard}
        save_file(tensors, folder / file_of(shard), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 144}, "weight_map": {n: file_of(names[n]) for n in names}}
    write_json(folder / "model.safetensors.index.json", index)


def file_of(shard: int) -> str:
    """As transformers names it."""
    return f"model-{shard + 1:05}-of-00002.safetensors"


def read_weights(folder: Path) -> None:
    """Read every tensor as loading does."""
    files = find_weight_files(str(folder), None)
    assert isinstance(files.dtype, torch.dtype)
    for name in files:
        files[name][...]


def make_prepared(folder: Path) -> None:
    """A manifest of rows, and the rows."""
    store = tiny_store()
    store.rows[0].fill_(1)
    (folder / "experts").mkdir()
    write_tensors(folder / "experts/layer-000.safetensors", {ROWS: store.rows[0]})
    write_tensors(folder / "model.safetensors", {"norm": torch.ones(2)})
    entry = RowFile(
        file="experts/layer-000.safetensors",
        sha256=sha256_of(folder / "experts/layer-000.safetensors"),
        blocks_sha256=block_digests(bytes_of(store.rows[0])),
        experts=len(store.rows[0]),
        row_bytes=store.layouts[0].row_bytes,
        parameters=describe_layout(store.layouts[0]),
    )
    manifest = PreparedModel(
        source="toy",
        revision=None,
        router_fingerprint="f" * 64,
        dtype="float32",
        expert_dtype="auto",
        stays=(),
        plain_bytes=96,
        exceptions={},
        shards=(entry,),
        rest=RestFile(file="model.safetensors", sha256=sha256_of(folder / "model.safetensors")),
        versions={},
    )
    write_json(folder / PREPARED_MANIFEST, asdict(manifest))


def tiny_store() -> HostExpertStore:
    """Room for one layer of two experts."""
    experts = torch.nn.Module()
    experts.up_proj = torch.nn.Parameter(torch.empty(2, 3, 4))
    experts.num_experts = 2
    return HostExpertStore([experts], is_pinned=False)


def read_prepared(folder: Path) -> None:
    """Read the rows into a store."""
    prepared = PreparedModel.read(folder / PREPARED_MANIFEST)
    prepared.encoder("auto", None)
    read_rows(prepared, folder, tiny_store(), lambda _: None)


def repair_prepared(folder: Path) -> None:
    """Give the manifest the digest of the rows as they are, if they are in a file's last bytes."""
    values = json.loads((folder / PREPARED_MANIFEST).read_text())
    shard, rows = values["shards"][0], tiny_store().rows[0]
    content = (folder / shard["file"]).read_bytes()
    shard["sha256"] = sha256_of(folder / shard["file"])
    shard["blocks_sha256"] = block_digests(memoryview(content[-rows.nbytes :]))
    write_json(folder / PREPARED_MANIFEST, values)


CHAT_BODY = {
    "model": "toy",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_completion_tokens": 8,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x", "y"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 1,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"a": 1},
}
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
}
GENERATION = {
    "num_beams": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "eos_token_id": [0, 1],
    "forced_eos_token_id": 3,
    "stop_strings": ["x"],
    "max_new_tokens": 8,
    "cache_config": {},
}
ROWS_OF_TEXT = [{"id": n, "text": f"Row {n} of a table.", "n": [1, 2]} for n in range(3)]


def read_request(folder: Path) -> None:
    """Read a request's body as the server does, once it is JSON."""
    try:
        body = json.loads((folder / "body.json").read_bytes())
    except (ValueError, RecursionError) as error:  # FastAPI answers these
        raise ValueError(str(error) or "no JSON") from error
    if not isinstance(body, dict):
        raise ValueError("FastAPI's own answer")
    checked(body, CHAT)


def write_zip(path: Path) -> None:
    """An archive of two texts and a table."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "Some text.\n" * 9)
        archive.writestr("b/c.md", "More of it.\n" * 9)


def write_csv(path: Path) -> None:
    """A table of texts."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [row["id"], row["text"]] for row in [{"id": "id", "text": "text"}, *ROWS_OF_TEXT]
        )


def write_parquet(path: Path) -> None:
    """A table of texts."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS_OF_TEXT), path)


def texts(name: str, make: Callable[[Path], Any], **settings: Any) -> Target:
    """A dataset of one file."""
    return Target(
        lambda folder: make(folder / name),
        (name,),
        lambda folder: [*local_documents(folder / name, RowReading())],
        **settings,
    )


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, with a template for chats."""
    save_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))


def read_tokenizer(folder: Path) -> None:
    """Load it and put a chat through its template."""
    tokenizer = load_tokenizer(str(folder))
    encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])


MODEL_TARGETS: dict[str, Target] = {
    "weights": Target(
        make_weights,
        ("model.safetensors.index.json", file_of(0), file_of(1)),
        read_weights,
        share=6,
    ),
    "prepared model": Target(
        make_prepared,
        (PREPARED_MANIFEST, "experts/layer-000.safetensors"),
        read_prepared,
        repair_prepared,
        share=10,
    ),
    "request": Target(
        lambda folder: write_json(folder / "body.json", CHAT_BODY),
        ("body.json",),
        read_request,
        share=20,
    ),
    "generation config": Target(
        lambda folder: write_json(folder / "generation_config.json", GENERATION),
        ("generation_config.json",),
        lambda folder: check_generation_file(folder / "generation_config.json", 64),
        share=20,
    ),
    "config": Target(
        lambda folder: write_json(folder / "config.json", CONFIG),
        ("config.json",),
        lambda folder: diagnose(str(folder)),
    ),
    "tokenizer": Target(
        make_tokenizer,
        ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        read_tokenizer,
    ),
    "text file": texts("a.txt", lambda path: path.write_text("Some text.\nMore.\n"), share=10),
    "gzip": texts("a.txt.gz", lambda path: path.write_bytes(gzip.compress(b"Some text.")), share=4),
    "zip": texts("a.zip", write_zip, share=4),
    "json": texts("a.json", lambda path: path.write_text(json.dumps(ROWS_OF_TEXT))),
    "jsonl": texts(
        "a.jsonl", lambda path: path.write_text("\n".join(map(json.dumps, ROWS_OF_TEXT)))
    ),
    "csv": texts("a.csv", write_csv),
    "parquet": texts("a.parquet", write_parquet),
}
