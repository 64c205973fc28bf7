"""Recall on text that the model makes itself, by what the estimators were trained on.

    python benchmarks/on_policy.py [--model bundled] [--dataset python-stdlib] [--json FILE]

Estimators of the default form are trained on dataset text, on text that the model generated after
prompts from it (sampled at temperature 1), and on half of each: the same number of tokens, the
same model. All are measured on dataset text and on generated text of documents never trained on.
Then, over a long generation, recall by the token's place in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trained_on_traces import Recall, recall_of_tokens, trained

from foreroute.data.allocator import keep_freed_memory
from foreroute.data.collect import collect_traces
from foreroute.data.layout import layer_path, tokens_path
from foreroute.data.manifest import MANIFEST_FILE, ShardEntry
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec, EstimatorStack, parse_layers
from foreroute.estimators.artifacts import package_versions, write_json
from foreroute.train.quiet import quieten_lightning
from foreroute.train.run import FitConfig

FREE_FORM = "next-router"


def half_of_each(first: Traces, second: Traces, folder: Path) -> Traces:
    """Traces of the first half of one's shards and the second half of the other's, in turn.

    The halves come of other documents: shards of both were begun on the same ones.
    """
    entries: list[ShardEntry] = []
    folder.mkdir()
    middle = len(first.manifest.shards) // 2
    halves = first.manifest.shards[:middle], second.manifest.shards[middle:]
    for pair in zip(*halves, strict=True):
        for traces, shard in zip((first, second), pair, strict=True):
            names = {tokens_path(shard.shard_idx): tokens_path(len(entries))}
            for layer_idx in first.geometry.layer_indices:
                old = layer_path(layer_idx, shard.shard_idx)
                names[old] = layer_path(layer_idx, len(entries))
            for old, new in names.items():
                (folder / new).parent.mkdir(exist_ok=True)
                os.link(traces.folder / old, folder / new)
            entries.append(
                dataclasses.replace(
                    shard,
                    shard_idx=len(entries),
                    sha256={new: shard.sha256[old] for old, new in names.items()},
                    file_bytes={new: shard.file_bytes[old] for old, new in names.items()},
                )
            )
    for path in first.folder.glob("*.safetensors"):
        os.link(path, folder / path.name)
    manifest = dataclasses.replace(first.manifest, shards=tuple(entries))
    write_json(folder / MANIFEST_FILE, manifest.to_dict())
    return Traces.open(folder)


def _in_one_shard(split: str, tokens: int) -> dict[str, Any]:
    """Arguments of `collect_traces` by which nothing but `batch_size` divides the sequences."""
    return {"split": split, "tokens": tokens, "shard_tokens": tokens}


def by_bucket(recall: Tensor, size: int) -> list[Recall]:
    """Recall of each stretch of so many tokens; `recall` as `recall_of_tokens` gives it."""
    return [Recall.of(part.mean(dim=1)) for part in recall.split(size, dim=1)]


def compare(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Collect, train and measure; returns what is printed."""
    device = torch.device(settings.device)
    text = {
        "model": settings.model,
        "dataset": settings.dataset,
        "device": settings.device,
        "batch_size": settings.batch_size,
        "sequence_length": 2 * settings.generate,
        "shard_tokens": settings.train_tokens // settings.shards,
    }
    read = text | {"tokens_per_sequence": settings.generate}  # as many of each as are generated
    made = text | {"source": "generated", "generate": settings.generate}
    prompt = settings.context - settings.long
    far = made | {"sequence_length": settings.context, "generate": settings.long}
    held_out = _in_one_shard("held-out", settings.held_out_tokens)
    long = _in_one_shard("held-out", settings.long * settings.long_sequences)
    collected = {
        name: collect_traces(out=folder / name, **arguments)
        for name, arguments in {
            "text": read | {"tokens": settings.train_tokens},
            "generated": made | {"tokens": settings.train_tokens},
            "held-out text": read | held_out,
            "held-out generated": made | held_out,
            "long": far | long,
        }.items()
    }
    both = half_of_each(collected["text"], collected["generated"], folder / "both")
    spec = EstimatorSpec(
        form=settings.form, target_layers=parse_layers("all", both.geometry, horizon=1)
    )
    free = dataclasses.replace(spec, form=FREE_FORM)
    sources = {"text": collected["text"], "generated": collected["generated"], "both": both}
    stacks: dict[str, EstimatorStack] = {
        "(next router, quasi-hidden)": trained(
            collected["text"], free, settings.epochs, folder / "run free", settings.device
        )
    }
    for name, traces in sources.items():
        out = folder / f"run {name}"
        stacks[name] = trained(traces, spec, settings.epochs, out, settings.device)
    rows: dict[str, dict[str, Any]] = {}
    for name, stack in stacks.items():
        measured = {
            where: recall_of_tokens(stack, collected[where], device)
            for where in ("held-out text", "held-out generated", "long")
        }
        rows[name] = {
            where: Recall.of(recall.mean(dim=1)) for where, recall in measured.items()
        } | {"by position": by_bucket(measured["long"], settings.bucket)}
    return {
        "model": both.geometry.describe(),
        "form": settings.form,
        "train_tokens": {name: traces.num_tokens for name, traces in sources.items()},
        "held_out_tokens": collected["held-out text"].num_tokens,
        "prompt_tokens": {"generated": settings.generate, "long": prompt},
        "rows": rows,
    }


def show(found: dict[str, Any], settings: argparse.Namespace) -> None:
    """Print both tables."""
    title = (
        f"{found['model']}: recall@K (budget K) of {settings.form}, each trained on "
        f"{settings.train_tokens:,} tokens; ± 95 % by sequence"
    )
    table = Table("trained on", "held-out text", "held-out generated", title=title)
    for name, row in found["rows"].items():
        table.add_row(name, str(row["held-out text"]), str(row["held-out generated"]))
    Console().print(table)
    title = (
        f"by place among {settings.long:,} generated tokens, {settings.long_sequences} sequences"
    )
    table = Table("tokens", *found["rows"], title=title)
    for bucket in range(len(next(iter(found["rows"].values()))["by position"])):
        first = bucket * settings.bucket
        cells = [str(row["by position"][bucket]) for row in found["rows"].values()]
        table.add_row(f"{first}-{first + settings.bucket}", *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="bundled", help="bundled, a folder or a Hub id")
    parser.add_argument("--dataset", default="python-stdlib", help="as collect-traces takes it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--form", default="low-rank", help="form of the estimators")
    parser.add_argument("--train-tokens", type=int, default=16384, help="of each source")
    parser.add_argument("--shards", type=int, default=4, help="of each source, an even number")
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="of each source")
    parser.add_argument("--generate", type=int, default=256, help="tokens after as long a prompt")
    parser.add_argument("--long", type=int, default=2000, help="tokens of a long generation")
    parser.add_argument("--long-sequences", type=int, default=12)
    parser.add_argument("--context", type=int, default=2048, help="prompt and long generation")
    parser.add_argument("--bucket", type=int, default=250, help="tokens per row of the last table")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences generated together")
    parser.add_argument("--epochs", type=int, default=FitConfig.epochs)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    settings = parser.parse_args(arguments)
    keep_freed_memory()
    quieten_lightning()
    with tempfile.TemporaryDirectory(prefix="on_policy_") as folder:
        found = compare(settings, Path(folder))
    show(found, settings)
    if settings.json:
        figures = found | {
            "versions": package_versions(),
            "settings": {
                n: str(v) if isinstance(v, Path) else v for n, v in vars(settings).items()
            },
        }
        settings.json.write_text(dumps(figures, indent=1, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()
