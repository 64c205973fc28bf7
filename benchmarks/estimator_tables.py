"""Prints the tables of docs/estimators.md from benchmarks/results/estimators.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from estimators import RESULTS  # noqa: TID251 - the benchmark, not the room
from foreroute.estimators.artifacts import read_json

CODE, PROSE = "python-stdlib", "installed packages' prose"
SAMPLED, OTHER = ", 128 of 512", ", other files"
MEASURED = (
    "| input | h | form | recall@K | 95 % interval | @1.5 K | gate mass | exact set | calib. error "
    "| parameters | us |"
)
ANOTHER_KIND = (
    "| trained on | tested on | next router | quasi-hidden | low-rank | least gain on each |"
)


def main() -> None:
    """Print one table per model, the learning curves, and text of another kind."""
    found = read_json(RESULTS, dict)
    rows: list[dict[str, Any]] = found["rows"]
    for model, tested_on in (("bundled", CODE), ("12x64 top-8", CODE), ("12x64 top-8", PROSE)):
        chosen = [
            row
            for row in rows
            if (row["model"], row["trained_on"], row["tested_on"]) == (model, CODE, tested_on)
        ]
        print_table(f"{model}, tested on {tested_on}", MEASURED, map(measured_cells, chosen))
    curve = {
        (p["model"], p["train_tokens"], p["form"]): p["recall_at_k"]
        for p in found["learning_curve"]
    }
    points = dict.fromkeys((model, tokens) for model, tokens, _ in curve)
    print_table(
        "learning curve",
        "| model | training tokens | ridge | low-rank |",
        (
            [
                model,
                f"{tokens:,}",
                *(decimals(curve[model, tokens, f]) for f in ("ridge", "low-rank")),
            ]
            for model, tokens in points
        ),
    )
    texts = (CODE, PROSE)
    print_table(
        "text of another kind",
        ANOTHER_KIND,
        (another_kind_cells(rows, a + SAMPLED, b + OTHER) for a in texts for b in texts),
    )


def measured_cells(row: dict[str, Any]) -> list[str]:
    """What one row of the results says."""
    low, high = row["recall_at_k_ci"]
    numbers = [row[k] for k in ("recall_at_1_5k", "gate_mass_recall", "exact_set", "ece")]
    is_timed = row["us_per_token"] is not None
    return [
        row["input"],
        str(row["horizon"]),
        row["form"],
        decimals(row["recall_at_k"]),
        f"{decimals(low)}-{decimals(high)}",
        *map(decimals, numbers),
        f"{row['params']:,}" if is_timed else "",
        f"{row['us_per_token']:.0f}" if is_timed else "",
    ]


def another_kind_cells(rows: list[dict[str, Any]], trained_on: str, tested_on: str) -> list[str]:
    """The default beside the training-free forms, and the layer where it gains least on each."""
    found = {
        (row["form"], row["input"]): row
        for row in rows
        if (row["trained_on"], row["tested_on"]) == (trained_on, tested_on)
    }
    default = found["low-rank", "quasi-hidden"]
    free = [found["next-router", kind] for kind in ("router-input", "quasi-hidden")]
    least = (
        min(a - b for a, b in zip(default["recall_per_layer"], f["recall_per_layer"], strict=True))
        for f in free
    )
    return [
        trained_on.removesuffix(SAMPLED),
        tested_on.removesuffix(OTHER),
        *(decimals(row["recall_at_k"]) for row in (*free, default)),
        ", ".join(f"{100 * gain:+.1f}" for gain in least),
    ]


def print_table(title: str, head: str, body: Iterable[list[str]]) -> None:
    """One table in Markdown."""
    print(f"\n{title}\n\n{head}\n{'|---' * (head.count('|') - 1)}|")
    for cells in body:
        print(f"| {' | '.join(cells)} |")


def decimals(value: float | None) -> str:
    """Four of them, without the zero in front."""
    return "" if value is None else f"{value:.4f}".removeprefix("0")


if __name__ == "__main__":
    main()
