"""What a tuning found: recall, times and copies beside their baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEASURED = ("tpot_ms", "ttft_ms", "hit_rate", "bytes_per_token", "wasted_bytes_per_token")
SPECULATIVE = ("agreement", "perplexity_change")


def summarise(
    metrics: Mapping[str, Any], bench: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Gather what the steps wrote.

    Args:
        metrics: Of the run, as `read_metrics` gives them.
        bench: As `read_bench` gives it.
        seconds: What each step took.

    Returns:
        JSON-ready: the model, the estimators beside their baselines, every mode of the bench.
    """
    geometry = bench["model"]
    modes: dict[str, Any] = {
        name: {key: row[key] for key in MEASURED + SPECULATIVE * (not row["is_exact"])}
        for name, row in bench["modes"].items()
        if name != "stock"
    }
    return {
        "model": {
            "layers": len(geometry["layer_indices"]),
            "experts": geometry["num_experts"],
            "top_k": geometry["top_k"],
        },
        "estimator": {"form": metrics["form"]} | _recall(metrics["estimator"]),
        "baselines": {name: _recall(row) for name, row in metrics["baselines"].items()},
        "runtime": modes | {"exact_tokens_equal": bench["exact_tokens_equal"]},
        "device": bench["device"],
        "stock_tpot_ms": bench["modes"].get("stock", {}).get("tpot_ms"),
        "seconds": sum(seconds.values()),
        "seconds_by_step": dict(seconds),
    }


def _recall(values: Mapping[str, Any]) -> dict[str, Any]:
    by_layer = values["per_layer"]["recall_at_k"]
    return {"recall_at_k": values["recall_at_k"], "recall_at_k_by_layer": by_layer}


def show(out: Path, summary: Mapping[str, Any], verdict: str, console: Console) -> None:
    """Say what matters, and where everything lies.

    Args:
        out: The tuning's folder.
        summary: Of `summarise`.
        verdict: Whether exact modes gave the tokens that they must give.
        console: Where to print.
    """
    table = Table(title="Recall of the next layer's true experts, held-out sequences")
    table.add_column("predictor")
    table.add_column("recall@k (budget = top-k), mean over layers", justify="right")
    rows = {name: row["recall_at_k"] for name, row in summary["baselines"].items()}
    rows[f"trained {summary['estimator']['form']}"] = summary["estimator"]["recall_at_k"]
    for name, value in sorted(rows.items(), key=lambda row: row[1]):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    console.print(verdict, style="" if summary["runtime"]["exact_tokens_equal"] else "bold red")
    for name in ("traces", "run", "bundle", "report", "index.html", "summary.json"):
        console.print(f"{name:12} {out / name}", highlight=False, soft_wrap=True, markup=False)
    steps = ", ".join(f"{name} {s:.0f} s" for name, s in summary["seconds_by_step"].items())
    console.print(f"{summary['seconds']:.0f} s in all: {steps}", soft_wrap=True)
