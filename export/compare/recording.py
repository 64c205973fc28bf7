"""The traces of a comparison: text to train on, and other documents to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foreroute.data.adapters import discover, load_model
from foreroute.data.adapters.early_attention import find_early_attention
from foreroute.data.collect import collect_traces
from foreroute.data.manifest import MANIFEST_FILE, read_manifest
from foreroute.data.traces import Traces
from foreroute.estimators.byte_sizes import parse_bytes
from foreroute.export.compare.plan import ComparisonPlan
from foreroute.export.compare.study import Tests
from foreroute.train.online import open_live_traces

TRAINING, TESTS = "traces", "traces-held-out"


def record(plan: ComparisonPlan, folder: Path, device: torch.device) -> tuple[Traces, list[Tests]]:
    """Record what is not there yet.

    Args:
        plan: What to record, of which model.
        folder: Of the comparison.
        device: Where the model runs.

    Returns:
        Traces to train on, and what to measure on: held-out documents of the same dataset first.

    Raises:
        FileNotFoundError: If model or dataset do not exist.
        ValueError: If one of them cannot be used.
    """
    fields = _fields(plan, folder, device)
    common: dict[str, Any] = {
        "model": plan.model,
        "device": device.type,
        "sequence_length": plan.sequence_length,
        "batch_size": plan.batch_size,
        "record": fields,
    }
    if plan.stream:
        traces = open_live_traces(
            folder / TRAINING,
            model=plan.model,
            dataset=plan.dataset,
            tokens=_with_choosing(plan.scale.tokens),
            record=fields,
            device=device.type,
            buffer_bytes=parse_bytes(plan.stream),
            sequence_length=plan.sequence_length,
            batch_size=plan.batch_size,
            resume=True,
        )
    else:
        traces = collect_traces(
            out=folder / TRAINING,
            dataset=plan.dataset,
            tokens=_with_choosing(plan.scale.tokens),
            max_bytes=plan.disk,
            shard_tokens=_shard_tokens(plan),
            **common,
        )
    held_out: dict[str, Any] = {
        "tokens": plan.held_out_tokens,
        "shard_tokens": plan.held_out_tokens,
    }
    tests = [
        Tests(
            plan.dataset,
            collect_traces(
                out=folder / TESTS, dataset=plan.dataset, split="held-out", **held_out, **common
            ),
        )
    ]
    for number, dataset in enumerate(plan.other_datasets):
        out = folder / f"traces-other-{number}"
        tests.append(Tests(dataset, collect_traces(out=out, dataset=dataset, **held_out, **common)))
    return traces, tests


def _fields(plan: ComparisonPlan, folder: Path, device: torch.device) -> str:
    """Optional trace fields to record, a comma list: not every model has a readout."""
    if (folder / TESTS / MANIFEST_FILE).is_file():
        recorded = read_manifest(folder / TESTS).record
        return ",".join(name.replace("_", "-") for name in recorded)
    moe = discover(load_model(plan.model, device=device), plan.model)
    try:
        find_early_attention(moe)
    except ValueError:
        return "layer-input"
    return "layer-input,readout"


def _with_choosing(tokens: int) -> int:
    """Tokens to record so that so many are left to fit on, whatever is set aside to choose by."""
    return -(-tokens * 100 // 93)


def _shard_tokens(plan: ComparisonPlan) -> int:
    """Small shards where there are few tokens, so that curves have parts to take."""
    return max(plan.sequence_length, min(16_384, plan.scale.tokens // 4))
