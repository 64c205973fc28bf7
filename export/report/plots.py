"""The pictures of a report; colours are Okabe and Ito's, which the colour-blind can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.export.report.gather import BUNDLE_NAME, Measured, Row
from foreroute.export.report.learning_curve import CURVE_FORMS, CurvePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
BASELINE_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#999999", "#D55E00", "#0072B2")
MARKERS = "osD^vP*X"
DASHES = ("--", "-.", ":")
FAR_BELOW = 0.6
"""Predictors under this share of the best are drawn in a panel of their own."""
MAX_COLUMNS = 4
SIZE = (9.0, 4.6)
DPI = 110

PerLayer = Callable[[Row], list[float]]


def draw(measured: Measured, curve: Sequence[CurvePoint], folder: Path) -> dict[str, str]:
    """Write every picture as PNG.

    Args:
        measured: What to show.
        curve: The learning curve; empty for none.
        folder: Where the files go.

    Returns:
        Caption by file name, in the order of the page.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names may hold dollars
    top_k = measured.top_k
    figures = {
        "recall_by_layer": (
            draw_by_layer(measured, lambda row: row.metrics.recall_at_k, f"recall@{top_k}"),
            f"Recall@{top_k} by layer at a budget of {top_k}: the share of a token's true experts "
            f"among the {top_k} predicted. Solid: trained. Dashed: baselines.",
        ),
        "recall_over_budgets": (
            draw_over_budgets(measured),
            "Recall over budgets, mean over layers; bars are 95 % intervals by sequence.",
        ),
        "gate_mass_recall": (
            draw_by_layer(measured, lambda row: row.metrics.gate_mass_recall, "gate-mass recall"),
            f"Gate-mass recall at a budget of {top_k}: recall weighted by the gate weights.",
        ),
        "exact_set": (
            draw_by_layer(measured, lambda row: row.metrics.exact_set, "exact-set rate"),
            f"Share of tokens with all {top_k} experts predicted, at a budget of {top_k}.",
        ),
        "reliability": (
            draw_reliability(measured),
            f"Reliability of {reliable_row(measured).name}: how often experts of a predicted "
            f"probability were used, over the top {2 * top_k} of each token. The diagonal is "
            "perfect.",
        ),
    }
    if curve:
        figures["learning_curve"] = (
            draw_curve(curve, top_k),
            "Recall against training tokens, the same sequences held out.",
        )
    figures["cost_of_prediction"] = (
        draw_cost(measured),
        "Trained parameters of all layers together, and the time of one prediction called from "
        f"Python ({measured.device}), without the making of what it reads.",
    )
    captions = {}
    for name, (figure, caption) in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI, bbox_inches="tight")
        captions[f"{name}.png"] = caption
    return captions


def split_panels(measured: Measured, mean: Mapping[str, float]) -> list[list[Row]]:
    """Predictors near the best, and those far below, which would flatten the others."""
    line = FAR_BELOW * max(mean.values())
    return [
        [row for row in measured.rows if (mean[row.name] >= line) is is_high]
        for is_high in (True, False)
    ]


def two_panels(label: str, x_label: str) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure for `split_panels`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.supylabel(label, fontsize=10)
    axes[1].set_xlabel(x_label)
    return figure, axes


def add_legends(axes: Sequence[Axes]) -> None:
    """Name the lines of each panel beside it."""
    for axis in axes:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    axes[1].set_ylim(0, 1.1 * axes[1].get_ylim()[1])


def draw_by_layer(measured: Measured, values: PerLayer, label: str) -> Figure:
    """One line per predictor over the layers; those far below the best in a panel of their own."""
    from matplotlib.ticker import MaxNLocator

    mean = {row.name: sum(values(row)) / len(values(row)) for row in measured.rows}
    figure, axes = two_panels(label, "predicted layer")
    for axis, rows in zip(axes, split_panels(measured, mean), strict=True):
        for row in rows:
            axis.plot(measured.layers, values(row), label=row.name, **style_of(measured, row))
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legends(axes)
    return figure


def draw_over_budgets(measured: Measured) -> Figure:
    """Mean recall over budgets, with intervals."""
    recall = {
        row.name: [sum(v) / len(v) for v in row.metrics.recall_at_budgets.values()]
        for row in measured.rows
    }
    label = f"recall of the true top {measured.top_k}"
    figure, axes = two_panels(label, "budget: experts prefetched per token and layer")
    budgets = list(measured.rows[0].metrics.recall_at_budgets)
    first = {name: values[0] for name, values in recall.items()}
    for axis, rows in zip(axes, split_panels(measured, first), strict=True):
        for row in rows:
            spread = _spread(row, recall[row.name])
            style = style_of(measured, row)
            axis.errorbar(
                budgets, recall[row.name], yerr=spread, capsize=3, label=row.name, **style
            )
    axes[1].set_xticks(budgets)
    add_legends(axes)
    return figure


def _spread(row: Row, means: Sequence[float]) -> list[list[float]] | None:
    """How far the interval's ends lie below and above each mean."""
    if row.intervals is None:
        return None
    ends = list(row.intervals.recall_at_budgets.values())
    pairs = list(zip(means, ends, strict=True))
    return [
        [max(0.0, mean - low) for mean, (low, _) in pairs],
        [max(0.0, high - mean) for mean, (_, high) in pairs],
    ]


def reliable_row(measured: Measured) -> Row:
    """The row whose probabilities are drawn: the bundle, or the first form."""
    rows = [row for row in measured.rows if row.reliability is not None]
    return next((row for row in rows if row.name == BUNDLE_NAME), rows[0])


def draw_reliability(measured: Measured) -> Figure:
    """One reliability diagram per layer, before and after the calibration."""
    from matplotlib.figure import Figure

    shown = reliable_row(measured).reliability
    assert shown is not None
    columns = min(MAX_COLUMNS, len(measured.layers))
    rows = math.ceil(len(measured.layers) / columns)
    figure = Figure(figsize=(2.4 * columns, 2.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for pair, axis in enumerate(grid):
        if pair >= len(measured.layers):
            axis.set_axis_off()
            continue
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="perfect")
        for judged, name, colour, marker in (
            (shown.before, "before", "#D55E00", "x"),
            (shown.after, "after calibration", "#0072B2", "o"),
        ):
            axis.plot(
                judged.expected[pair],
                judged.observed[pair],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                label=name,
            )
        errors = shown.before.calibration_error[pair], shown.after.calibration_error[pair]
        axis.set_title(
            f"layer {measured.layers[pair]}: error {errors[0]:.3f} → {errors[1]:.3f}", fontsize=8
        )
        axis.grid(alpha=0.3)
        axis.set_aspect("equal")
        axis.set_xticks((0, 0.5, 1))  # the ends of neighbours would touch with more
        axis.tick_params(labelbottom=pair + columns >= len(measured.layers))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figure.supxlabel("predicted probability", fontsize=9)
    figure.supylabel("share that was used", fontsize=9)
    return figure


def draw_curve(curve: Sequence[CurvePoint], top_k: int) -> Figure:
    """Recall against training tokens, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axis = figure.subplots()
    for form, colour, marker in zip(CURVE_FORMS, FORM_COLOURS, MARKERS, strict=False):
        points = [point for point in curve if point.form == form]
        tokens = [point.num_train_tokens for point in points]
        axis.plot(
            tokens,
            [point.recall_at_k for point in points],
            color=colour,
            marker=marker,
            label=form,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axis.set_xlabel("training tokens")
    axis.set_ylabel(f"recall@{top_k}(budget={top_k}), mean over layers")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def draw_cost(measured: Measured) -> Figure:
    """Bars of parameters and of microseconds per prediction."""
    from matplotlib.figure import Figure

    rows = [row for row in measured.rows if row.us_per_prediction is not None]
    figure = Figure(figsize=(SIZE[0], 1.3 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row.name for row in rows]
    parameters = [float(row.num_parameters or 0) for row in rows]
    times = [float(row.us_per_prediction or 0) for row in rows]
    _draw_bars(left, names, parameters, "trained parameters", "{:,.0f}")
    _draw_bars(right, names, times, "microseconds per token and layer", "{:.1f}")
    left.invert_yaxis()
    return figure


def _draw_bars(axis: Axes, names: list[str], values: list[float], label: str, pattern: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    bars = axis.barh(names, values, color=FORM_COLOURS[0], height=0.6)
    axis.bar_label(bars, [pattern.format(value) for value in values], padding=3, fontsize=8)
    axis.set_xlabel(label)
    axis.margins(x=0.2)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.spines[["top", "right"]].set_visible(False)


def style_of(measured: Measured, row: Row) -> dict[str, Any]:
    """Colour, line and marker of a predictor, the same in every picture."""
    place = [other.name for other in measured.rows if other.kind == row.kind].index(row.name)
    marker = MARKERS[place % len(MARKERS)]
    if row.name == BUNDLE_NAME:  # it coincides with the form it chose: drawn around that
        hollow = {"markerfacecolor": "none", "linestyle": "none", "markeredgewidth": 1.3}
        return {"color": "#000000", "marker": "o", "markersize": 10.0} | hollow
    if row.kind == "floor":
        return {"color": "#666666", "linestyle": ":", "linewidth": 1.5}
    if row.kind == "form":
        colour = FORM_COLOURS[place % len(FORM_COLOURS)]
        return {"color": colour, "linewidth": 2.0, "marker": marker, "markersize": 5.0}
    return {
        "color": BASELINE_COLOURS[place % len(BASELINE_COLOURS)],
        "linestyle": DASHES[place % len(DASHES)],
        "linewidth": 1.2,
        "marker": marker,
        "markersize": 3.5,
    }
