"""Learned routing on one GPU, end to end: train a model, record, train estimators, run every arm.

    python benchmarks/end_to_end_gpu.py --out /tmp/end-to-end --json results.json

No replay and no simulated prediction: the model is trained here for a few minutes (so it is a young
one), routes as it learned to, and the estimators predict what they learned from its own traces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from foreroute.data.adapters import load_tokenizer
from foreroute.data.collect import collect_traces
from foreroute.data.corpus import documents
from foreroute.estimators import EstimatorSpec
from foreroute.estimators.artifacts import package_versions
from foreroute.estimators.pairs import predictable_layers
from foreroute.export.bundle import load_bundle
from foreroute.export.export import export_estimator
from foreroute.runtime import EngineConfig
from foreroute.runtime.bench import BASELINE, Mode, ModeResult, Workload, measure_modes
from foreroute.runtime.offload import load_offloaded
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

SCRIPT = Path(__file__).parents[1] / "examples" / "train_bundled_model.py"


def train_model(args: argparse.Namespace, folder: Path) -> None:
    """The bundled model's script, with a larger model."""
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--minutes", str(args.minutes)]
    for name in ("layers", "experts", "top_k", "hidden", "expert_width", "heads", "kv_heads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--learning-rate", str(args.learning_rate), "--epochs", "40", "--overwrite"]
    if args.max_documents:
        command += ["--max-documents", str(args.max_documents)]
    subprocess.run(command, check=True)


def train_estimators(args: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """Traces of the model, and estimators of all its layers; returns their metrics."""
    traces = collect_traces(
        model=str(folder),
        dataset="python-stdlib",
        out=out / "traces",
        tokens=args.trace_tokens,
        generated_share=0.25,
        dtype=args.dtype,
        batch_size=args.trace_batch,
        overwrite=True,
    )
    spec = EstimatorSpec(form="low-rank", target_layers=predictable_layers(traces.geometry, 1))
    metrics = train_estimator(out / "traces", spec, FitConfig(), out / "run", overwrite=True)
    export_estimator(out / "run", out / "bundle", overwrite=True)
    return metrics


def modes_at(slots: str) -> list[Mode]:
    """All arms at one number of slots."""

    def mode(name: str, *, uses_bundle: bool = False, **settings: Any) -> Mode:
        config = EngineConfig(**({"expert_slots": slots} | settings))
        is_filled = config.expert_slots == "100%"
        return Mode(name=name, config=config, uses_bundle=uses_bundle, is_filled=is_filled)

    return [
        mode("resident", expert_slots="100%"),
        mode(BASELINE),
        mode("prefetch-next-router", policy="prefetch"),
        mode("prefetch-trained", policy="prefetch", uses_bundle=True),
        mode("eager-lru", decide_on="host"),
        mode("eager-no-cache", cache="none"),
    ]


def workload(folder: Path, args: argparse.Namespace) -> Workload:
    """Prompts from files the model never saw."""
    tokenizer = load_tokenizer(str(folder))
    length = args.prompt_tokens + args.new_tokens
    sequences = []
    for document in documents("python-stdlib", "held-out"):
        ids = tokenizer(document.text, return_tensors="pt")["input_ids"]
        if ids.shape[1] >= length:
            sequences.append(ids[:, :length])
    sequences = sequences[: args.num_prompts]
    return Workload(
        prompts=[ids[:, : args.prompt_tokens] for ids in sequences],
        continuations=[ids[:, args.prompt_tokens :] for ids in sequences],
        new_tokens=args.new_tokens,
        repeats=args.repeats,
    )


def print_table(slots: str, results: list[ModeResult]) -> None:
    """One line an arm."""
    demand = next(r.tpot_ms for r in results if r.name == BASELINE)
    for r in results:
        same = "same tokens" if r.tokens == results[0].tokens else "other tokens (rounding)"
        print(
            f"slots {slots:>4}  {r.name:22} TPOT {r.tpot_ms:7.2f} ms"
            f" ({r.tpot_ms_p25:6.2f}-{r.tpot_ms_p75:6.2f})  {r.tpot_ms / demand:5.2f} x demand"
            f"  TTFT {r.ttft_ms:6.0f} ms  hit {r.hit_rate or 0:.3f}"
            f"  {r.bytes_per_token / 1e6:7.2f} MB  wasted {r.wasted_bytes_per_token / 1e6:6.2f} MB"
            f"  {same}",
            flush=True,
        )


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model and traces")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=2.5, help="training the model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--expert-width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-documents", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trace-tokens", type=int, default=65_536)
    parser.add_argument("--trace-batch", type=int, default=32)
    parser.add_argument("--slots", nargs="+", default=["12.5%", "25%", "50%"])
    parser.add_argument("--num-prompts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    start = time.monotonic()
    folder = args.out / "model"
    args.out.mkdir(parents=True, exist_ok=True)
    train_model(args, folder)
    print(f"[{time.monotonic() - start:.0f} s] model trained", flush=True)
    metrics = train_estimators(args, folder, args.out)
    recalls = {name: round(value, 4) for name, value in metrics["mean"].items()}
    print(f"[{time.monotonic() - start:.0f} s] recall@k (budget = top-k): {recalls}", flush=True)
    offloaded = load_offloaded(str(folder), dtype=args.dtype)
    print(f"expert: {offloaded.expert_bytes / 1e6:.2f} MB; {offloaded.moe.geometry.describe()}")
    stack, work = load_bundle(args.out / "bundle").stack, workload(folder, args)
    rows = []
    for slots in args.slots:
        results = measure_modes(modes_at(slots), offloaded, stack, work, tick=lambda: None)
        print_table(slots, results)
        rows += [{"slots": slots} | asdict(r) for r in results]
        if args.json:
            write(args, metrics, recalls, rows)
    print(f"[{time.monotonic() - start:.0f} s] done")


def write(
    args: argparse.Namespace, metrics: dict[str, Any], recalls: dict[str, float], rows: list[Any]
) -> None:
    """What was measured so far, as JSON."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for row in rows:
        row.pop("tokens", None)
    content = {
        "device": device,
        "versions": package_versions(),
        "model": json.loads((args.out / "model" / "training.json").read_text())["loss"],
        "settings": {name: str(value) for name, value in vars(args).items()},
        "recall_at_k": recalls,
        "held_out_tokens": metrics["num_held_out_tokens"],
        "rows": rows,
    }
    args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
