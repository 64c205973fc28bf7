"""Gathers what rules on a miss cost and give, draws it, and prints it as tables for the docs.

    foreroute evaluate --rules ... --slots ... --out frontier.json      # once for each setting
    python benchmarks/speculation.py frontier.json ... --name "12x64 top-8"
    python benchmarks/speculation.py --exact 8 9 --out docs/speculation.png     # of the first
    python benchmarks/speculation.py --measurement 4 --slots 25% --out docs/speculation_gpu.png

Rows of one measurement (model, device, settings) come in the place of that one's older rows in
benchmarks/results/speculation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from foreroute.estimators.artifacts import read_json, write_json
from foreroute.runtime.evaluation.frontier import Frontier

RESULTS = Path(__file__).parent / "results" / "speculation.json"
EXACT = "fetch"
Row = dict[str, Any]
FAMILIES = {  # Okabe and Ito's colours, which the colour-blind can tell apart
    "substitute+threshold": ("substitute + threshold", "#009E73", "o"),
    "substitute": ("substitute", "#0072B2", "s"),
    "bonus": ("bonus", "#E69F00", "^"),
    "skip": ("skip", "#999999", "v"),
    "threshold": ("threshold", "#CC79A7", "D"),
    "budget": ("budget", "#D55E00", "P"),
    "predicted": ("predicted", "#000000", "X"),
}
MOST_KL, MOST_LOSS = 0.045, 5.0
"""Beyond, a rule is in the table alone: nats, and per cent of perplexity."""
SLOTS_OF_EXACT = "25%", "33%"
"""In bfloat16, and at the same memory in 12 bits."""
WHAT = {"bytes_per_token": "bytes per token", "tpot_ms": "time per token"}


def family_of(rule: str) -> tuple[str, str, str]:
    """Label, colour and marker of a rule: those of the first family whose parts it has."""
    names = {part.partition(":")[0] for part in rule.split("+")}
    for family, drawn in FAMILIES.items():
        if set(family.split("+")) <= names:
            return drawn
    return FAMILIES["skip"]


def gathered(old: dict[str, Any], frontiers: Sequence[Frontier], name: str) -> dict[str, Any]:
    """All rows, each with the number of its measurement.

    Args:
        old: What was gathered before.
        frontiers: Of one model, each a measurement.
        name: What tables call the model; its own name if empty.
    """
    measurements, rows = list(old.get("measurements", [])), list(old.get("rows", []))
    for frontier in frontiers:
        model = name or frontier.rows[0].model
        about = {"model": model, "device": frontier.device, "settings": frontier.settings}
        same = [i for i, m in enumerate(measurements) if about.items() <= m.items()]
        number = same[0] if same else len(measurements)
        commands = {frontier.command: None}  # a measurement may take several
        if same:
            commands = dict.fromkeys(measurements[number]["command"].split("; ")) | commands
        measurements[number : number + 1] = [
            about | {"command": "; ".join(commands), "versions": frontier.versions}
        ]
        new = [dataclasses.asdict(row) | {"model": model} for row in frontier.rows]
        keys = {(number, row["rule"], row["slots"]) for row in new}
        rows = [r for r in rows if (r["measurement"], r["rule"], r["slots"]) not in keys]
        rows += [{"measurement": number, **row} for row in new]
    return {"measurements": measurements, "rows": rows}


def of_fetch(row: Row, rows: Sequence[Row], what: str) -> float:
    """A figure of a row over the exact rule's of the same measurement, at the same slots."""
    where = ("measurement", "slots")
    exact = next(r for r in rows if r["rule"] == EXACT and all(r[k] == row[k] for k in where))
    return float(row[what] / exact[what])


def draw(rows: Sequence[Row], what: str, axes: tuple[Axes, Axes], exact: dict[str, float]) -> None:
    """KL and perplexity of rules, over what a token takes of what it takes by `fetch`.

    Args:
        rows: At one number of slots, of one measurement.
        what: `bytes_per_token` or `tpot_ms`.
        axes: For KL and perplexity.
        exact: Ways to run that change nothing, and what a token takes by them, of `fetch`'s.
    """
    seen: set[str] = set()
    for row in rows:
        loss = 100 * (row["perplexity_ratio"] - 1)
        if row["rule"] == EXACT or row["kl"] > MOST_KL or loss > MOST_LOSS:
            continue
        label, colour, marker = family_of(row["rule"])
        share = of_fetch(row, rows, what)
        style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 6}
        for axis, value, (low, high) in (
            (axes[0], row["kl"], row["kl_interval"]),
            (axes[1], loss, tuple(100 * (end - 1) for end in row["perplexity_interval"])),
        ):
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            named = None if label in seen else label
            axis.errorbar(share, value, yerr=error, label=named, elinewidth=0.8, **style)
        seen.add(label)
    axes[0].axhline(0.01, color="#999999", linewidth=0.8, linestyle=":")
    axes[1].axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.margins(y=0.12)
        for label, share in exact.items():
            axis.plot(share, 0.0, color="#000000", marker="*", markersize=9, linestyle="")
            style = {"ha": "right", "fontsize": 7, "textcoords": "offset points"}
            axis.annotate(label, (share, 0.0), xytext=(-4, 6 if share == 1 else -11), **style)
        axis.set_xlabel(f"{WHAT[what]}, of fetch's")
        axis.set_title(
            f"{rows[0]['model']}, {rows[0]['slots']} of the experts resident", fontsize=9
        )
    axes[0].set_ylabel("mean KL to the exact model, nats")
    axes[1].set_ylabel("perplexity, % more")


def table(rows: Sequence[Row], *, is_timed: bool) -> str:
    """Every row of a measurement, as Markdown; times only where they compare anything."""
    heads = ["slots", "rule", "bytes, of `fetch`", "perplexity (95 %)", "KL (95 %)", "noise"]
    heads += ["top-1", "ran as routed", *(["ms", "of `fetch`", "same tokens"] * is_timed)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in sorted(rows, key=lambda r: (float(r["slots"].rstrip("%")), r["kl"])):
        low, high = (100 * (end - 1) for end in row["perplexity_interval"])
        cells = [
            row["slots"],
            f"`{row['rule']}`",
            f"{of_fetch(row, rows, 'bytes_per_token'):.2f}",
            f"{100 * (row['perplexity_ratio'] - 1):+.2f} % ({low:+.1f} to {high:+.1f})",
            f"{row['kl']:.4f} ({row['kl_interval'][0]:.4f} to {row['kl_interval'][1]:.4f})",
            f"{row['kl_noise']:.4f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['agreement']:.3f}",
        ]
        if is_timed:
            same = row.get("same_tokens")
            cells += [f"{row['tpot_ms']:.2f}", f"{of_fetch(row, rows, 'tpot_ms'):.2f}"]
            cells.append("" if same is None else f"{same:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Gather, draw the figure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("frontiers", type=Path, nargs="*", help="to gather, of one model")
    parser.add_argument("--name", default="", help="what tables call the model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--measurement", type=int, default=0, help="that is drawn")
    parser.add_argument(
        "--exact",
        type=int,
        nargs=2,
        metavar=("BFLOAT16", "LOSSLESS"),
        help="measurements whose exact rows are drawn too: what 12 bits take of bfloat16 at 25 %%",
    )
    parser.add_argument("--slots", nargs="+", help="that are drawn; all by themselves")
    parser.add_argument("--out", type=Path, help="draw the figure")
    args = parser.parse_args()
    results = read_json(args.results) if args.results.is_file() else {}
    if args.frontiers:
        frontiers = [Frontier.read(path) for path in args.frontiers]
        results = gathered(results, frontiers, args.name)
        write_json(args.results, results)
    by_number = [
        [row for row in results["rows"] if row["measurement"] == number]
        for number in range(len(results["measurements"]))
    ]
    timed = [about["device"] != "cpu" for about in results["measurements"]]
    for about, rows, is_timed in zip(results["measurements"], by_number, timed, strict=True):
        print(f"\n{about['model']} on {about['device']}: {about['settings']}\n")
        print(table(rows, is_timed=is_timed))
    if args.out:
        drawn = by_number[args.measurement]
        measured = {row["slots"] for row in drawn}
        shares = args.slots or sorted(measured, key=lambda s: float(s.rstrip("%")))
        figure, axes = pyplot.subplots(
            len(shares), 2, squeeze=False, figsize=(9, 3.4 * len(shares)), dpi=110
        )
        what = "tpot_ms" if timed[args.measurement] else "bytes_per_token"
        for share, pair in zip(shares, axes, strict=True):
            exact = {"fetch (exact)": 1.0}
            if args.exact and share == SLOTS_OF_EXACT[0]:
                taken = [
                    next(r[what] for r in by_number[n] if (r["rule"], r["slots"]) == (EXACT, at))
                    for n, at in zip(args.exact, SLOTS_OF_EXACT, strict=True)
                ]
                exact["exact, in 12 bits"] = taken[1] / taken[0]
            draw([row for row in drawn if row["slots"] == share], what, tuple(pair), exact)
            pair[0].legend(fontsize=7, frameon=False)
        figure.tight_layout()
        figure.savefig(args.out)


if __name__ == "__main__":
    main()
