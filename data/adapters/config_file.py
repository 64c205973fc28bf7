"""Reads a model's config.json strictly: what is wrong with it is one line with file and field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from foreroute.estimators.artifacts import shown

GREATEST_FILE_BYTES = 1 << 24
GREATEST_INTEGER = 1 << 53
GREATEST_COUNTS = (
    ("vocab_size", 1 << 28),
    ("_size", 1 << 24),
    ("layer", 1 << 10),
    ("expert", 1 << 16),
    ("head", 1 << 16),
    ("_dim", 1 << 20),
)
"""By a part of a field's name, the first that fits: far above every model there is, and a model of
that many parts is soon built without weights."""
AT_LEAST_ONE = frozenset(
    {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
DTYPE_FIELDS = ("dtype", "torch_dtype")
GENERATION_COUNTS = frozenset(
    {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams"}
    | {"num_return_sequences", "no_repeat_ngram_size", "prompt_lookup_num_tokens"}
    | {"assistant_early_exit"}
)
GENERATION_NUMBERS = frozenset(
    {"temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    | {"repetition_penalty", "length_penalty", "guidance_scale", "max_time", "penalty_alpha"}
)
GENERATION_OBJECTS = frozenset({"watermarking_config", "compile_config", "cache_config"})
GREATEST_BEAMS = 1 << 10


def check_config_file(path: Path) -> None:
    """Refuse a config.json that no model can be built from, before anything is built.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no JSON object, or a field has a value that cannot be; names both.
    """
    values = _read(path)
    for prefix, part in _parts("", values):
        for problem in _problems(part):
            raise ValueError(f"{path} cannot be used: {prefix}{problem}.")


def check_generation_file(path: Path, vocabulary_size: int) -> None:
    """Refuse a generation_config.json that `generate` would stumble over.

    Args:
        path: The file.
        vocabulary_size: Of the model.

    Raises:
        ValueError: If it is no JSON object, or a field has a value that cannot be; names both.
    """
    for name, value in _read(path).items():
        if value is not None:
            for expected in _expected_instead(name, value, vocabulary_size):
                raise ValueError(
                    f"{path} cannot be used: {name} is {shown(value)}, expected {expected}."
                )


def _expected_instead(name: str, value: Any, vocabulary_size: int) -> Iterator[str]:
    """What a field of a generation config should be, where it is something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in GENERATION_COUNTS and type(value) is not int:
        yield "a whole number"
    if name in GENERATION_NUMBERS and not (is_number and math.isfinite(value)):
        yield "a finite number"
    if name in ("num_beams", "num_return_sequences") and not 1 <= value <= GREATEST_BEAMS:
        yield f"a number from 1 to {GREATEST_BEAMS}"
    if name.endswith("_token_id"):
        ids = _listed(value)
        if not all(type(token_id) is int for token_id in ids):
            yield "a token id, or a list of them"
        elif name.startswith("forced_") and not all(0 <= i < vocabulary_size for i in ids):
            yield f"token ids below {vocabulary_size}"
    if name == "stop_strings" and not all(isinstance(text, str) for text in _listed(value)):
        yield "a text, or a list of them"
    if name in GENERATION_OBJECTS and not isinstance(value, dict):
        yield "an object"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > GREATEST_FILE_BYTES:
        raise ValueError(f"{path} cannot be used: it is larger than {GREATEST_FILE_BYTES} bytes.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: it is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be used: expected a JSON object, got a {_kind(values)}.")
    return values


def _parts(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config, and those within it, by the fields that lead there."""
    yield prefix, values
    for name, value in values.items():
        if name.endswith("_config") and isinstance(value, dict):
            yield from _parts(f"{prefix}{name}.", value)


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield from _number_problems(name, value)
    for name in DTYPE_FIELDS:
        yield from _dtype_problems(name, values.get(name))
    experts = next((name for name in NUM_EXPERTS if type(values.get(name)) is int), "")
    for name in TOP_K:
        top_k = values.get(name)
        if experts and type(top_k) is int and not 1 <= top_k <= max(values[experts], 1):
            yield f"{name} is {top_k}, but {experts} is {values[experts]}"


def _number_problems(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}, expected a finite number"
    is_count = name in AT_LEAST_ONE or name in NUM_EXPERTS or name in TOP_K
    if is_count and isinstance(value, str | float | bool | dict):
        yield f"{name} is {shown(value)}, expected a whole number"
    if type(value) is not int:
        return
    most = next((most for part, most in GREATEST_COUNTS if part in name), GREATEST_INTEGER)
    least = 1 if name in AT_LEAST_ONE else -1 if name.startswith("num_") else -GREATEST_INTEGER
    if value < least:
        yield f"{name} is {value}, expected at least {least}"
    if value > most:
        yield f"{name} is {value}, expected at most {most}"


def _dtype_problems(name: str, value: Any) -> Iterator[str]:
    if value is None or value == "auto":
        return
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        yield f"{name} is {shown(value)}, expected the name of a torch dtype such as bfloat16"


def _kind(value: Any) -> str:
    return {list: "list", str: "text", int: "number", float: "number"}.get(type(value), "constant")
