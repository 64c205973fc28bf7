"""Draws what rules on a miss cost and give, and prints it as a table for docs/speculation.md.

    python benchmarks/speculation.py --out docs/speculation.png

From benchmarks/results/speculation.json, which `foreroute evaluate --rules` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from foreroute.runtime.evaluation.frontier import Frontier, PriceRow

RESULTS = Path(__file__).parent / "results" / "speculation.json"
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


def family_of(rule: str) -> tuple[str, str, str]:
    """Label, colour and marker of a rule: those of the first family whose parts it has."""
    names = {part.partition(":")[0] for part in rule.split("+")}
    for family, drawn in FAMILIES.items():
        if set(family.split("+")) <= names:
            return drawn
    return FAMILIES["skip"]


def bytes_share(row: PriceRow, frontier: Frontier) -> float:
    """Bytes per token over the exact rule's at the same slots."""
    exact = next(r for r in frontier.at(row.slots) if r.rule == "fetch")
    return row.bytes_per_token / exact.bytes_per_token


def draw(frontier: Frontier, slots: str, axes: tuple[Axes, Axes]) -> None:
    """KL and perplexity over bytes, of all rules at one number of slots."""
    seen: set[str] = set()
    for row in frontier.at(slots):
        loss = 100 * (row.perplexity_ratio - 1)
        if row.rule == "fetch" or row.kl > MOST_KL or loss > MOST_LOSS:
            continue
        label, colour, marker = family_of(row.rule)
        share = bytes_share(row, frontier)
        style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 6}
        for axis, value, (low, high) in (
            (axes[0], row.kl, row.kl_interval),
            (axes[1], loss, tuple(100 * (end - 1) for end in row.perplexity_interval)),
        ):
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            named = None if label in seen else label
            axis.errorbar(share, value, yerr=error, label=named, elinewidth=0.8, **style)
        seen.add(label)
    axes[0].axhline(0.01, color="#999999", linewidth=0.8, linestyle=":")
    axes[1].axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.axvline(0.6, color="#999999", linewidth=0.8, linestyle=":")
        axis.plot(1.0, 0.0, color="#000000", marker="*", markersize=9, linestyle="")
        axis.annotate(
            "fetch (exact)",
            (1.0, 0.0),
            xytext=(-4, 6),
            ha="right",
            fontsize=7,
            textcoords="offset points",
        )
        axis.set_xlabel("bytes per token, of fetch")
        axis.set_title(f"{slots} of the experts resident", fontsize=9)
    axes[0].set_ylabel("mean KL to the exact model, nats")
    axes[1].set_ylabel("perplexity, % more")


def table(frontier: Frontier) -> str:
    """Every row, as Markdown."""
    lines = [
        "| slots | rule | bytes | perplexity (95 %) | KL (95 %) | top-1 | ran as routed |",
        "|---|---|---|---|---|---|---|",
    ]
    for slots in dict.fromkeys(row.slots for row in frontier.rows):
        rows = sorted(frontier.at(slots), key=lambda row: row.kl)
        for row in rows:
            low, high = (100 * (end - 1) for end in row.perplexity_interval)
            loss = 100 * (row.perplexity_ratio - 1)
            lines.append(
                f"| {slots} | `{row.rule}` | {bytes_share(row, frontier):.2f} | {loss:+.2f} % "
                f"({low:+.1f} to {high:+.1f}) | {row.kl:.4f} ({row.kl_interval[0]:.4f} to "
                f"{row.kl_interval[1]:.4f}) | {row.top1_agreement:.3f} | {row.agreement:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Draw the figure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--out", type=Path, default=Path("docs/speculation.png"))
    args = parser.parse_args()
    frontier = Frontier.read(args.results)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=130)
    draw(frontier, args.slots, tuple(axes))
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(args.out)
    print(table(frontier))


if __name__ == "__main__":
    main()
