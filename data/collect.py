"""`collect_traces`: checks what the user asks for, then has it recorded."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import get_args

import torch

from foreroute.data.adapters import (
    discover,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from foreroute.data.collection import Collection
from foreroute.data.corpus import Split
from foreroute.data.manifest import MANIFEST_FILE, TraceManifest
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import package_versions, require_free
from foreroute.estimators.byte_sizes import parse_bytes

logger = logging.getLogger(__name__)

FREE_FORMS_ONLY = "Only estimators without an anchor (linear, mlp-free) can be trained on them."


def collect_traces(
    *,
    model: str = "bundled",
    dataset: str = "python-stdlib",
    out: Path,
    tokens: int = 200_000,
    split: str = "train",
    sequence_length: int = 512,
    generated_share: float = 0.0,
    dtype: str = "auto",
    states_dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 8,
    shard_tokens: int = 16384,
    max_bytes: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Traces:
    """Record what a Mixture-of-Experts model routes on a dataset.

    Killed at any point, the same command goes on at the first unfinished shard.

    Args:
        model: `bundled`, a local folder, or a Hub id.
        dataset: `python-stdlib`; a file or folder of text, .jsonl or .parquet; or a Hub id.
        out: Folder the traces go to.
        tokens: Tokens to record, rounded up to whole sequences.
        split: `train` or `held-out`; documents are assigned by a hash of their names.
        sequence_length: Tokens per sequence.
        generated_share: Share of each sequence, 0 to 1, that is the model's own sampled
            continuation, recorded while it generates.
        dtype: The model's dtype: auto (what the checkpoint asks for), float32, bfloat16, float16.
        states_dtype: Dtype in which residual and router_input are stored; auto is the model's, or
            bfloat16 where the model's is float32.
        device: auto, cpu or cuda.
        batch_size: Sequences per forward pass.
        shard_tokens: Tokens per shard, rounded down to whole sequences.
        max_bytes: Stop cleanly before the traces exceed this (500MB, 2GiB).
        seed: Seed of the sampled continuations.
        overwrite: Replace traces that lie at `out` already.
        trust_remote_code: Run code that came with the checkpoint.

    Returns:
        The finished traces.

    Raises:
        FileNotFoundError: If model or dataset do not exist.
        ValueError: If an argument, the model or the dataset cannot be used, the disk is too small,
            or `out` holds something else. Nothing is written then.
    """
    _require_positive(
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        shard_tokens=shard_tokens,
    )
    if not 0 <= generated_share <= 1:
        raise ValueError(f"generated_share must be between 0 and 1, not {generated_share}.")
    if split not in get_args(Split):
        raise ValueError(f"Unknown split {split!r}; known: {', '.join(get_args(Split))}.")
    byte_limit = None if max_bytes is None else parse_bytes(max_bytes)
    stored_dtype = resolve_dtype(states_dtype)
    if not (out / MANIFEST_FILE).is_file():
        require_free(out, overwrite=overwrite)
    moe = discover(
        load_model(
            model,
            dtype=dtype,
            device=resolve_device(device),
            trust_remote_code=trust_remote_code,
        ),
        model,
    )
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    logger.info("Model: %s", moe.geometry.describe())
    anchors = moe.found_anchors
    if anchors is None:
        logger.info("No copies of its routers: %s. %s", moe.anchors_problem, FREE_FORMS_ONLY)
    if not isinstance(stored_dtype, torch.dtype):
        stored_dtype = torch.bfloat16 if moe.model.dtype == torch.float32 else moe.model.dtype
    manifest = TraceManifest(
        geometry=moe.geometry,
        model=model,
        dataset=dataset,
        split=split,
        tokens=tokens,
        sequence_length=sequence_length,
        generated_share=generated_share,
        dtype=_name_of(moe.model.dtype),
        states_dtype=_name_of(stored_dtype),
        device=moe.model.device.type,
        batch_size=batch_size,
        shard_sequences=max(1, shard_tokens // sequence_length),
        seed=seed,
        norm_kind=anchors.norm_kind if anchors else "none",
        norm_eps=anchors.norm_eps if anchors else 0.0,
        has_selection_bias=anchors is not None and anchors.selection_bias is not None,
        anchors_problem=moe.anchors_problem,
        command="",
        versions=package_versions(),
    )
    manifest = dataclasses.replace(manifest, command=_command(manifest))
    return Collection(moe, tokenizer, manifest, out).run(byte_limit, overwrite=overwrite)


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}.")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _command(manifest: TraceManifest) -> str:
    """The command that makes these traces, wherever they go."""
    flags = "model dataset tokens split sequence_length generated_share dtype states_dtype"
    typed = [(name.replace("_", "-"), str(getattr(manifest, name))) for name in flags.split()]
    typed += [("batch-size", str(manifest.batch_size)), ("seed", str(manifest.seed))]
    typed.append(("shard-tokens", str(manifest.shard_sequences * manifest.sequence_length)))
    return shlex.join(["collect-traces", *[part for n, v in typed for part in (f"--{n}", v)]])
