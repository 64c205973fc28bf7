"""The page of `foreroute bench --html`: times per token drawn, then the tables."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from foreroute.estimators.artifacts import read_checked
from foreroute.estimators.types import MoEGeometry
from foreroute.export.report.document import document, picture, table

EXACT_COLOUR, SPECULATIVE_COLOUR = "#0072B2", "#D55E00"  # Okabe and Ito's
BASELINE, STOCK = "on-demand", "stock"


class BenchMode(TypedDict):
    """What one mode cost; None for what was not measured."""

    is_exact: bool
    tpot_ms: float
    tpot_ms_p25: float
    tpot_ms_p75: float
    ttft_ms: float
    bytes_per_token: float
    wasted_bytes_per_token: float
    agreement: float
    hit_rate: float | None
    perplexity_change: float | None


class Bench(TypedDict):
    """What `foreroute bench --json` writes, as far as it is read again."""

    device: str
    model: MoEGeometry
    reference: str
    """Whose tokens exact modes must give."""
    exact_tokens_equal: bool
    modes: dict[str, BenchMode]
    notes: NotRequired[list[str]]


def read_bench(path: Path) -> dict[str, Any]:
    """What `foreroute bench --json` wrote, as it is in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged; names file and field.
    """
    remedy = "Run foreroute bench again."
    bench, content = read_checked(path, Bench, remedy)
    if BASELINE not in bench["modes"]:
        raise ValueError(f"{path} is damaged (it has no mode {BASELINE}). {remedy}")
    return content


def bench_page(bench: Mapping[str, Any], title: str, command: str) -> str:
    """The whole page; nothing in it is loaded from elsewhere.

    Args:
        bench: What `foreroute bench --json` writes.
        title: Model, device and slots.
        command: What was typed.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *bench_parts(bench),
        "<h2>Made by</h2>",
        f"<pre>{html.escape(command)}</pre>",
    ]
    return document(f"foreroute bench: {title}", parts)


def bench_parts(bench: Mapping[str, Any]) -> list[str]:
    """A bench's verdict, picture, tables and notes, as parts of a page.

    Args:
        bench: What `foreroute bench --json` writes.
    """
    modes: dict[str, dict[str, Any]] = bench["modes"]
    return [
        f"<p>{html.escape(verdict(bench))} Ratios within this run only.</p>",
        picture(
            "tpot",
            draw_times(modes),
            "Time per output token: median, and from the first to the third quarter. Blue: exact. "
            "Orange: speculative, which changes the output.",
        ),
        "<h2>Times</h2>",
        _times(modes),
        "<h2>Copies per token, and the output against the exact model</h2>",
        _traffic(modes),
        *(f"<p>{html.escape(note)}</p>" for note in bench.get("notes", ())),
    ]


def verdict(bench: Mapping[str, Any]) -> str:
    """Whether exact modes gave the tokens that they must give, in a sentence.

    Args:
        bench: What `foreroute bench --json` writes.
    """
    is_stock = bench["reference"] == STOCK
    if not bench["exact_tokens_equal"]:
        other = "the stock model" if is_stock else "the other exact modes"
        return f"An exact mode gave other tokens than {other}: a bug."
    if is_stock:
        return "Exact modes gave the stock model's tokens."
    return "Exact modes gave the same tokens; the stock model's, by other kernels, may differ."


def draw_times(modes: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Bars of the times per token, as PNG.

    Args:
        modes: Rows of the bench by name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(modes)[::-1]
    rows = [modes[name] for name in names]
    medians = [row["tpot_ms"] for row in rows]
    low = [row["tpot_ms"] - row["tpot_ms_p25"] for row in rows]
    high = [row["tpot_ms_p75"] - row["tpot_ms"] for row in rows]
    colours = [EXACT_COLOUR if row["is_exact"] else SPECULATIVE_COLOUR for row in rows]
    figure, axes = pyplot.subplots(figsize=(9.0, 0.5 + 0.4 * len(names)), layout="constrained")
    axes.barh(names, medians, xerr=[low, high], color=colours, ecolor="#444444", capsize=3)
    axes.set_xlabel("ms per output token")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _times(modes: Mapping[str, Mapping[str, Any]]) -> str:
    baseline = modes[BASELINE]["tpot_ms"]
    rows = [
        [
            name,
            f"{row['tpot_ms']:.2f}",
            f"{row['tpot_ms_p25']:.1f} to {row['tpot_ms_p75']:.1f}",
            f"{row['tpot_ms'] / baseline:.2f}",
            f"{row['ttft_ms']:.0f}",
        ]
        for name, row in modes.items()
    ]
    return table(["mode", "TPOT ms", "quarters", "x on demand", "TTFT ms"], rows)


def _traffic(modes: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, row in modes.items():
        hit_rate, change = row["hit_rate"], row["perplexity_change"]
        rows.append(
            [
                name,
                "" if hit_rate is None else f"{hit_rate:.3f}",
                f"{row['bytes_per_token'] / 1e6:.2f}",
                f"{row['wasted_bytes_per_token'] / 1e6:.2f}",
                "exact" if row["is_exact"] else f"{row['agreement']:.3f}",
                "exact" if row["is_exact"] or change is None else f"{change:+.1%}",
            ]
        )
    heads = ["mode", "hit rate", "MB", "of them wasted", "agreement", "perplexity"]
    return table(heads, rows)
