"""Draws the README's figure: time per token over the GPU memory that experts take.

    python benchmarks/figure.py --out docs/tpot.png

From benchmarks/results: merged_gpu.json (one call), and decode_gpu.json for what the host drives.
The shape of Qwen3-30B-A3B with random weights, replayed routing and simulated predictions, one
sequence, one H100.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from foreroute.estimators.artifacts import read_json

RESULTS = Path(__file__).parent / "results"
SHAPE, NUM_EXPERTS = "qwen3-30b-a3b", 48 * 128
EXPERT_BYTES = 3 * 2048 * 768 * 2  # bfloat16
LOSSLESS_SHARE = 0.757  # of them, in 12 bits with bases and exceptions (docs/lossless.md)


class Line(NamedTuple):
    """One line of the figure."""

    label: str
    suffix: str
    """Of the shape's name."""
    arms: tuple[str, ...]
    """The first of these that a share of slots has."""
    colour: str  # Okabe and Ito's, which the colour-blind can tell apart
    marker: str


LINES = (
    Line("on demand, host-side LRU, eager", "", ("eager-lru",), "#999999", "s"),
    Line("on demand, decided on the GPU", "", ("on-demand", "resident"), "#0072B2", "o"),
    Line("prefetch (recall .89)", "", ("prefetch-0.89", "resident"), "#E69F00", "D"),
    Line(
        "prefetch, experts in 12 bits without loss",
        "-lossless",
        ("prefetch-0.89", "resident"),
        "#009E73",
        "^",
    ),
)


def points(rows: list[dict[str, Any]], line: Line) -> list[tuple[float, float]]:
    """GPU memory of the experts in GiB and mean ms per token, by rising memory."""
    found: dict[float, tuple[int, float]] = {}
    for row in rows:
        if row["shape"] != SHAPE + line.suffix or row["batch"] != 1 or row["arm"] not in line.arms:
            continue
        size = EXPERT_BYTES * (LOSSLESS_SHARE if line.suffix else 1)
        memory = row["slots"] / 100 * NUM_EXPERTS * size / 2**30
        rank = line.arms.index(row["arm"])
        found[memory] = min(found.get(memory, (len(line.arms), 0.0)), (rank, row["tpot_ms_mean"]))
    return sorted((memory, ms) for memory, (_, ms) in found.items())


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    host = [r for r in read_json(RESULTS / "decode_gpu.json")["rows"] if r["arm"] == "eager-lru"]
    rows = read_json(RESULTS / "merged_gpu.json")["rows"] + host
    figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
    for line in LINES:
        at = points(rows, line)
        if at:
            axes.plot(
                *zip(*at, strict=True), color=line.colour, marker=line.marker, label=line.label
            )
    resident = next(r["tpot_ms_mean"] for r in rows if r["shape"] == SHAPE and r["slots"] == 100)
    axes.axhline(resident, color="#000000", linestyle=":", label="all experts on the GPU, bfloat16")
    axes.set_yscale("log")
    ticks = [5, 10, 20, 50, 100]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("GPU memory for experts, GiB")
    axes.set_ylabel("ms per token, mean (log)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    main()
