"""The whole pipeline on the bundled model: record, train, export, generate, and what it all cost.

    python examples/demo.py --out demo-out

Runs the commands a user would type, one after the other, and gathers demo-out/summary.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
MODEL = "bundled"
PROMPT = "def read_config(path):\n    "


def pipeline(out: Path, tokens: int) -> list[list[str]]:
    """The commands, in order."""
    here = shlex.quote(str(out))
    lines = (
        f"collect-traces --model {MODEL} --dataset python-stdlib --tokens {tokens} "
        f"--generated-share 0.25 --batch-size 16 --out {here}/traces",
        f"train-estimator --traces {here}/traces --layers all --form low-rank --out {here}/run",
        f"export-estimator --run {here}/run --out {here}/bundle",
        f"foreroute generate --model {MODEL} --bundle {here}/bundle --expert-slots 25% "
        f"--max-new-tokens 64 --prompt {shlex.quote(PROMPT)}",
        f"foreroute bench --model {MODEL} --bundle {here}/bundle --expert-slots 25% "
        f"--num-prompts 3 --json {here}/bench.json",
    )
    return [shlex.split(line) for line in lines]


def run_and_time(command: list[str]) -> float:
    """Run one command in the open; returns its seconds, ends the demo if it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    done = subprocess.run([str(BIN / command[0]), *command[1:]], check=False)
    if done.returncode != 0:
        sys.exit(f"demo: error: {command[0]} ended with exit code {done.returncode}.")
    return time.monotonic() - start


def summarise(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather what the commands wrote."""
    metrics = json.loads((out / "run" / "metrics.json").read_text())
    bench = json.loads((out / "bench.json").read_text())
    geometry = bench["model"]
    kept = ("tpot_ms", "ttft_ms", "hit_rate", "bytes_per_token", "wasted_bytes_per_token")
    speculative = ("agreement", "perplexity_change")
    modes: dict[str, Any] = {
        name: {key: row[key] for key in (*kept, *(() if row["is_exact"] else speculative))}
        for name, row in bench["modes"].items()
        if name != "stock"
    }
    return {
        "model": {
            "layers": len(geometry["layer_indices"]),
            "experts": geometry["num_experts"],
            "top_k": geometry["top_k"],
        },
        "estimator": {
            "form": metrics["form"],
            "recall_at_k": metrics["estimator"]["recall_at_k"],
            "recall_at_k_by_layer": metrics["estimator"]["per_layer"]["recall_at_k"],
        },
        "baselines": {
            name: {
                "recall_at_k": values["recall_at_k"],
                "recall_at_k_by_layer": values["per_layer"]["recall_at_k"],
            }
            for name, values in metrics["baselines"].items()
        },
        "runtime": {
            **modes,
            "exact_tokens_equal": bench["exact_tokens_equal"],
        },
        "device": bench["device"],
        "stock_tpot_ms": bench["modes"]["stock"]["tpot_ms"],
        "seconds": sum(seconds.values()),
        "seconds_by_step": seconds,
    }


def print_summary(out: Path, summary: dict[str, Any]) -> None:
    """Say what matters, and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    recall = Table(title="Recall of the next layer's true experts, held-out sequences")
    recall.add_column("predictor")
    recall.add_column("recall@k (budget = top-k), mean over layers", justify="right")
    rows = {name: row["recall_at_k"] for name, row in summary["baselines"].items()}
    rows[f"trained {summary['estimator']['form']}"] = summary["estimator"]["recall_at_k"]
    for name, value in sorted(rows.items(), key=lambda row: row[1]):
        recall.add_row(name, f"{value:.3f}")
    console.print(recall)
    equal = summary["runtime"]["exact_tokens_equal"]
    console.print(
        "Exact modes gave the stock model's tokens."
        if equal
        else "[bold red]An exact mode gave other tokens than the stock model: a bug.[/]"
    )
    places = {
        "traces": "traces",
        "trained run": "run",
        "bundle": "bundle",
        "bench": "bench.json",
        "summary": "summary.json",
    }
    for name, place in places.items():
        console.print(f"{name:12} {out / place}", highlight=False, soft_wrap=True)
    steps = ", ".join(f"{name} {s:.0f} s" for name, s in summary["seconds_by_step"].items())
    console.print(f"{summary['seconds']:.0f} s in all: {steps}", soft_wrap=True)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--tokens", type=int, default=49_152, help="tokens of traces to record")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    seconds = {
        " ".join(command[:2]) if command[0] == "foreroute" else command[0]: run_and_time(command)
        for command in pipeline(args.out, args.tokens)
    }
    summary = summarise(args.out, seconds)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(args.out, summary)
    if not summary["runtime"]["exact_tokens_equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
