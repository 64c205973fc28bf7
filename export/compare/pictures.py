"""The pictures of a comparison; colours are Okabe and Ito's, as in `export.report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foreroute.export.compare.tables import Row, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")
INPUT_COLOURS = {
    "router-input": "#56B4E9",
    "quasi-hidden": "#0072B2",
    "attention-readout": "#D55E00",
    "pre-attention": "#009E73",
}
SIZE, DPI = (9.0, 4.8), 110
Drawing = Callable[["Axes", Sequence[Row]], None]


def draw(rows: Sequence[Row], curve: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write every picture for which there are rows, as PNG.

    Args:
        rows: Of the text trained on.
        curve: Points of learning curves.
        folder: Where the files go.

    Returns:
        Caption by file name, in the order of the page.
    """
    import matplotlib

    matplotlib.use("Agg")
    forms = [row for row in rows if row["input"] in INPUT_COLOURS]
    worth = [row for row in rows if row.get("tpot_saved") is not None and row["horizon"] == 1]
    wanted: dict[str, tuple[Sequence[Row], Drawing, str]] = {
        "recall": (
            [row for row in forms if row["horizon"] <= 1 and not row["tokens_ahead"]],
            _draw_recall,
            "Recall of the next layer's experts at a budget of K, with 95 % intervals by sequence; "
            "colours are inputs.",
        ),
        "worth": (
            worth,
            _draw_worth,
            "What recall is worth: share of the time per token on demand that prefetching saves, "
            "simulated, with each form's own cost; colours are inputs, as above.",
        ),
        "learning_curve": (
            curve,
            _draw_curve,
            "Recall by training tokens.",
        ),
        "horizons": (
            [r for r in forms if r["horizon"] and not r.get("after") and r["prior"] == "none"],
            _draw_horizons,
            "Recall by the number of layers ahead.",
        ),
    }
    captions = {}
    for name, (shown, draw_into, caption) in wanted.items():
        if shown:
            _save(folder / f"{name}.png", shown, draw_into)
            captions[f"{name}.png"] = caption
    return captions


def _save(
    path: Path, rows: Sequence[Row], draw_into: Callable[[Axes, Sequence[Row]], None]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    draw_into(axes, rows)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _draw_recall(axes: Axes, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: row["recall_at_k"])
    for place, row in enumerate(ordered):
        low, high = row["recall_at_k_ci"] or (row["recall_at_k"], row["recall_at_k"])
        colour = INPUT_COLOURS[row["input"]]
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(row["recall_at_k"], place, "o", color=colour)
    axes.set_yticks(range(len(ordered)), [f"{name_of(r)}, {r['input']}" for r in ordered])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("recall@K, budget K")


def _draw_worth(axes: Axes, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: row["tpot_saved"])
    for place, row in enumerate(ordered):
        colour = INPUT_COLOURS.get(row["input"], "#999999")
        axes.barh(place, 100 * row["tpot_saved"], color=colour)
    names = [f"{name_of(r)}, {r['input']}: recall {r['recall_at_k']:.3f}" for r in ordered]
    axes.set_yticks(range(len(ordered)), names)
    axes.tick_params(axis="y", labelsize=8)
    first = rows[0]
    axes.set_xlabel(f"TPOT saved, % ({first['profile']}, {first['slots']} slots)")


def _draw_curve(axes: Axes, points: Sequence[Row]) -> None:
    lines: dict[str, list[Row]] = {}
    for point in points:
        lines.setdefault(name_of(point), []).append(point)
    for place, (name, found) in enumerate(lines.items()):
        ordered = sorted(found, key=lambda p: p["training_tokens"])
        axes.plot(
            [p["training_tokens"] for p in ordered],
            [p["recall_at_k"] for p in ordered],
            marker="o",
            label=name,
            color=COLOURS[place % len(COLOURS)],
        )
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("recall@K, budget K")
    axes.legend(fontsize=7)


def _draw_horizons(axes: Axes, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        lines.setdefault((name_of(row), row["input"]), {})[row["horizon"]] = row["recall_at_k"]
    lines = {key: found for key, found in lines.items() if len(found) > 1}
    for place, ((form, kind), found) in enumerate(lines.items()):
        horizons = sorted(found)
        axes.plot(
            horizons,
            [found[h] for h in horizons],
            marker="o",
            label=f"{form}, {kind}",
            color=COLOURS[place % len(COLOURS)],
        )
    axes.set_xticks(sorted({horizon for found in lines.values() for horizon in found}))
    axes.set_xlabel("layers ahead")
    axes.set_ylabel("recall@K, budget K")
    if lines:
        axes.legend(fontsize=7)
