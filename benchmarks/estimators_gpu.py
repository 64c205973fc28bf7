"""Compares predictors on a larger model that is trained here, on one GPU, in two calls.

    python benchmarks/estimators_gpu.py train --work /tmp/w
    python benchmarks/estimators_gpu.py compare --work /tmp/w --out $OUT --minutes 6
    python benchmarks/estimators_gpu.py unpack --out FOLDER --work COMPARISON   # elsewhere, no GPU
    foreroute compare-predictors --out COMPARISON                               # worth and page

The model is that of `end_to_end_gpu.py`: 12 layers x 64 experts, top-8, trained for some minutes on
the standard library and installed packages. `compare` leaves rows, predictions of some tokens and a
trace set in files that are small enough to take along; `unpack` makes a comparison's folder and a
published trace set of them. `--tiny` runs both on a CPU, with small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from end_to_end_gpu import TINY, train_model
from installed_prose import write_installed_prose

from foreroute.data.adapters import discover, load_model
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import (
    from_values,
    read_tensors,
    write_json,
    write_tensors,
)
from foreroute.estimators.types import MoEGeometry
from foreroute.export.compare.cells import Scale
from foreroute.export.compare.compare import Comparison
from foreroute.export.compare.finish import add_hybrids, write_results
from foreroute.export.compare.plan import ComparisonPlan, open_comparison, scale_of
from foreroute.export.compare.predicted import PredictedExperts
from foreroute.export.compare.prediction_time import early_attention_us
from foreroute.export.compare.published import TraceSet
from foreroute.export.compare.recording import TESTS
from foreroute.export.compare.truth import TrueRouting
from foreroute.train.quiet import quieten_lightning

NAME = "12x64 top-8"
MODEL: dict[str, Any] = {
    "layers": 12,
    "experts": 64,
    "top_k": 8,
    "hidden": 768,
    "expert_width": 384,
    "heads": 12,
    "kv_heads": 4,
    "vocab": 4096,
    "learning_rate": 1e-3,
    "epochs": 40,
    "batch_size": 0,
    "eval_tokens": 65_536,
    "max_documents": 0,
    "sequence_length": 512,
}
PACKED_TOKENS, PACKED_PREDICTIONS = 2048, 16
SET_TOKENS = 96
"""Of each held-out sequence, for the trace set."""
SET_PARTS = 3
ZIP_BYTES = 15 << 20
FOLDERS = ("rows", "truth", "predictions")


def train(options: argparse.Namespace) -> None:
    """Train the model, if it is not there, and say how long one attention takes."""
    folder = options.work / "model"
    given = vars(options) | MODEL
    if options.tiny:
        names = (*MODEL, "package_megabytes", "model_minutes")
        given |= {name: TINY[name] for name in names if name in TINY}
    if not (folder / "training.json").is_file():
        start = time.monotonic()
        train_model(argparse.Namespace(**given), folder)
        print(f"trained in {time.monotonic() - start:.0f} s", flush=True)
    moe = discover(load_model(str(folder), device=options.device), NAME)
    found = {str(n): round(early_attention_us(moe, n), 2) for n in (128, 512)}
    training = json.loads((folder / "training.json").read_text())
    facts = {"early_attention_us_by_context": found, "model": training["model"]}
    facts |= {"loss": training["loss"], "training": training["training"]}
    write_json(options.work / "facts.json", facts)
    print(f"one attention early, us by context: {found}", flush=True)


def plan_of(options: argparse.Namespace) -> ComparisonPlan:
    """The comparison to make."""
    others = ()
    prose = options.work / "prose"
    if options.prose and write_installed_prose(prose, 400_000) > 100_000:
        others = (str(prose),)
    scale = scale_of(options.tokens, is_quick=options.tiny or options.smoke)
    if not (options.tiny or options.smoke):
        scale = Scale(**(vars(scale) | {"batch_size": 4096, "epochs": options.epochs}))
    return ComparisonPlan(
        model=str(options.work / "model"),
        model_name=NAME,
        dataset="python-stdlib",
        other_datasets=others,
        scale=scale,
        held_out_tokens=1024 if options.tiny else 8192,
        sequence_length=128 if options.tiny else 512,
        batch_size=4 if options.tiny else 32,
        stream=options.stream,
        forms=tuple(options.forms),
        inputs=tuple(options.inputs),
    )


def compare(options: argparse.Namespace) -> None:
    """Measure as long as there is time, then pack what others need."""
    quieten_lightning()
    plan, device = plan_of(options), torch.device(options.device)
    folder = options.work / ("smoke" if options.smoke else "comparison")
    plan = open_comparison(folder, plan, overwrite=False)
    comparison = Comparison(plan, folder, device, say=lambda line: print(line, flush=True))
    try:
        left = comparison.measure(options.minutes)
    finally:
        add_hybrids(comparison)
        results = write_results(comparison, left=-1)
        pack(folder, options.out, options.work)
    print(f"{len(results['rows'])} rows, {left} left, {comparison.seconds:.0f} s", flush=True)


def pack(folder: Path, out: Path, work: Path) -> None:
    """Write what is needed elsewhere into a few files."""
    truth = TrueRouting.load(folder / "truth" / "0.safetensors").first(PACKED_TOKENS)
    packed = folder / "packed"
    for name in FOLDERS:
        (packed / name).mkdir(parents=True, exist_ok=True)
    truth.save(packed / "truth" / "0.safetensors")
    followers = int((~truth.starts).sum())
    for path in sorted((folder / "predictions").glob("*.safetensors")):
        said = PredictedExperts.load(path)
        if said.confidence is None or said.expert_ids.shape[2] < 1:
            continue
        count = followers if "t1-" in path.name else truth.num_tokens
        tensors = {
            "expert_ids": said.expert_ids[:count, :, :PACKED_PREDICTIONS].to(torch.uint8),
            "confidence": (said.confidence[:count, :, :PACKED_PREDICTIONS] * 255)
            .round()
            .to(torch.uint8),
            "target_layers": torch.tensor(said.target_layers),
        }
        write_tensors(packed / "predictions" / path.name, tensors)
    for name in ("comparison.json", "cells.json", "command.txt"):
        if (folder / name).is_file():
            shutil.copy(folder / name, packed / name)
    shutil.copytree(folder / "rows", packed / "rows", dirs_exist_ok=True)
    if (work / "facts.json").is_file():
        shutil.copy(work / "facts.json", packed / "facts.json")
    out.mkdir(parents=True, exist_ok=True)
    zip_in_parts(packed, out)
    with contextlib.suppress(FileNotFoundError, ValueError):
        pack_set(TraceSet.gather(Traces.open(folder / TESTS), SET_TOKENS), out)


def zip_in_parts(folder: Path, out: Path) -> None:
    """Zip a folder's files into as many archives as their size asks for."""
    number, size = 0, 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if size > ZIP_BYTES * 1.3:  # bytes compress by a third or so
            number, size = number + 1, 0
        size += path.stat().st_size
        with zipfile.ZipFile(out / f"packed-{number}.zip", "a", zipfile.ZIP_LZMA) as archive:
            archive.write(path, path.relative_to(folder))


def pack_set(found: TraceSet, out: Path) -> None:
    """Write a trace set's tensors in parts."""
    facts = {"geometry": found.geometry.to_dict(), "dataset": found.dataset, "norm": found.norm}
    for number in range(SET_PARTS):
        rows = {f"columns.{n}": t.chunk(SET_PARTS)[number] for n, t in found.columns.items()}
        model = {f"model.{n}": t for n, t in found.model.items()} if number == 0 else {}
        write_tensors(out / f"set-{number}.safetensors", rows | model)
    write_json(out / "set.json", facts)


def unpack(options: argparse.Namespace) -> None:
    """Make a comparison's folder, and beside it a published trace set, of what was packed."""
    for archive in sorted(options.out.glob("packed-*.zip")):
        with zipfile.ZipFile(archive) as file:
            file.extractall(options.work)
    for path in (options.work / "predictions").glob("*.safetensors"):
        found = read_tensors(path)
        PredictedExperts(
            expert_ids=found["expert_ids"].short(),
            confidence=found["confidence"].float() / 255,
            target_layers=tuple(found["target_layers"].tolist()),
        ).save(path)
    parts = [read_tensors(path) for path in sorted(options.out.glob("set-*.safetensors"))]
    if parts:
        facts = json.loads((options.out / "set.json").read_text())
        names = [name for name in parts[1] if name.startswith("columns.")]
        columns = {n: torch.cat([part[n] for part in parts]) for n in names}
        found_set = TraceSet(
            geometry=from_values(facts["geometry"], MoEGeometry),
            dataset=facts["dataset"],
            norm=facts["norm"],
            columns={n.removeprefix("columns."): t for n, t in columns.items()},
            model={n.removeprefix("model."): t for n, t in parts[0].items() if "model." in n},
        )
        target = options.work.with_name(options.work.name + "-trace-set")
        print(f"{found_set.write(target, name=f'foreroute {NAME}'):,} bytes in {target}")
    print(options.work)


def main() -> None:
    """Do one of the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("step", choices=("train", "compare", "unpack"))
    add("--work", type=Path, required=True)
    add("--out", type=Path, default=Path("out"))
    add("--minutes", type=float, default=6)
    add("--model-minutes", type=float, default=1.5)
    add("--package-megabytes", type=float, default=30)
    add("--tokens", type=int, default=1_000_000)
    add("--epochs", type=int, default=4)
    add("--stream", default="90GiB")
    add("--forms", nargs="*", default=[], help="forms to compare; all if none")
    add("--inputs", nargs="*", default=[], help="inputs to compare; all if none")
    add("--prose", action="store_true", help="measure on prose too")
    add("--smoke", action="store_true", help="small forms and few tokens: a test of the machine")
    add("--tiny", action="store_true", help="small sizes on the CPU: a test of this script")
    options = parser.parse_args()
    options.device = "cpu" if options.tiny or options.step == "unpack" else "cuda"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --tiny tests the script on a CPU")
    options.work.mkdir(parents=True, exist_ok=True)
    {"train": train, "compare": compare, "unpack": unpack}[options.step](options)


if __name__ == "__main__":
    sys.exit(main())
