"""What smaller traces cost in recall: bytes per token beside recall on the same held-out tokens.

    python benchmarks/trace_space.py [--model bundled] [--dataset python-stdlib] [--json FILE]

Estimators of the default form are trained on the same tokens with states in float32, bfloat16 and
int8, and on as many tokens taken at random positions of four times as many sequences. All are
measured on the same tokens of documents never trained on, stored in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from trained_on_traces import Recall, recall_of_tokens, trained

from foreroute.data.allocator import keep_freed_memory
from foreroute.data.collect import collect_traces
from foreroute.estimators import EstimatorSpec, parse_layers
from foreroute.estimators.artifacts import package_versions
from foreroute.train.quiet import quieten_lightning
from foreroute.train.run import FitConfig

SPARSITY = 4


def compare(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Collect, train and measure; returns what is printed."""
    device = torch.device(settings.device)
    shared = {
        "model": settings.model,
        "dataset": settings.dataset,
        "device": settings.device,
        "batch_size": settings.batch_size,
        "sequence_length": settings.sequence_length,
    }
    train = shared | {"tokens": settings.train_tokens, "shard_tokens": settings.train_tokens // 4}
    choices = {
        "float32": {"states_dtype": "float32"},
        "bfloat16": {"states_dtype": "bfloat16"},
        "int8": {"states_dtype": "int8"},
        f"int8, one token of {SPARSITY}": {
            "states_dtype": "int8",
            "tokens_per_sequence": settings.sequence_length // SPARSITY,
        },
    }
    held_out = collect_traces(
        out=folder / "held-out",
        **shared,
        split="held-out",
        tokens=settings.held_out_tokens,
        states_dtype="float32",
    )
    layers = parse_layers("all", held_out.geometry, horizon=1)
    spec = EstimatorSpec(form=settings.form, target_layers=layers)
    rows = {}
    for name, choice in choices.items():
        traces = collect_traces(out=folder / name, **(train | choice))
        out = folder / f"run {name}"
        stack = trained(traces, spec, settings.epochs, out, settings.device)
        recall = recall_of_tokens(stack, held_out, device)
        rows[name] = {
            "sequences": traces.num_sequences,
            "tokens": traces.num_tokens,
            "bytes_per_token": round(traces.manifest.num_bytes / traces.num_tokens),
            "recall": Recall.of(recall.mean(dim=1)),
        }
    return {
        "model": held_out.geometry.describe(),
        "form": settings.form,
        "held_out_tokens": held_out.num_tokens,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print it."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="bundled", help="bundled, a folder or a Hub id")
    parser.add_argument("--dataset", default="python-stdlib", help="as collect-traces takes it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--form", default="low-rank", help="form of the estimators")
    parser.add_argument("--train-tokens", type=int, default=16384)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=FitConfig.epochs)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    settings = parser.parse_args(arguments)
    keep_freed_memory()
    quieten_lightning()
    with tempfile.TemporaryDirectory(prefix="trace_space_") as folder:
        found = compare(settings, Path(folder))
    title = f"{found['model']}: recall@K (budget K) of {settings.form}; ± 95 % by sequence"
    table = Table("states", "sequences", "tokens", "bytes a token", "recall", title=title)
    for name, row in found["rows"].items():
        counts = (f"{row[key]:,}" for key in ("sequences", "tokens", "bytes_per_token"))
        table.add_row(name, *counts, str(row["recall"]))
    Console().print(table)
    if settings.json:
        figures = found | {"versions": package_versions()}
        settings.json.write_text(dumps(figures, indent=1, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()
