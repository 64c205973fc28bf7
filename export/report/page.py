"""The report's HTML page: pictures first, numbers below, the command that made it at the foot."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from foreroute.export.report.document import document, picture, table
from foreroute.export.report.gather import Measured
from foreroute.export.report.learning_curve import CurvePoint


def render(
    measured: Measured,
    curve: Sequence[CurvePoint],
    captions: Mapping[str, str],
    folder: Path,
    command: str,
) -> str:
    """The whole page; nothing in it is loaded from elsewhere.

    Args:
        measured: The numbers.
        curve: The learning curve; empty for none.
        captions: Of the pictures in `folder`, by file name.
        folder: Where the pictures are.
        command: What was typed, when, on which versions.
    """
    pictures = "".join(
        picture(Path(name).stem, (folder / name).read_bytes(), text)
        for name, text in captions.items()
    )
    parts = [
        f"<h1>{html.escape(measured.title)}</h1>",
        f"<p>Measured on {measured.num_tokens:,} held-out tokens that trained, calibrated and "
        f"chose nothing; sequences: {measured.num_sequences}.</p>",
        pictures,
        "<h2>Numbers</h2>",
        _summary(measured),
        "<h3>Recall by budget, mean over layers</h3>",
        _budgets(measured),
        f"<h3>Recall@{measured.top_k} by layer</h3>",
        _by_layer(measured, [row.metrics.recall_at_k for row in measured.rows]),
        "<h3>Gate-mass recall by layer</h3>",
        _by_layer(measured, [row.metrics.gate_mass_recall for row in measured.rows]),
        "<h3>Exact-set rate by layer</h3>",
        _by_layer(measured, [row.metrics.exact_set for row in measured.rows]),
        "<h3>Calibration error by layer, before and after</h3>",
        _errors(measured),
    ]
    if curve:
        parts += ["<h3>Learning curve</h3>", _curve(curve)]
    parts += ["<h2>Made by</h2>", f"<pre>{html.escape(command)}</pre>"]
    return document(f"foreroute report: {measured.title}", parts)


def _summary(measured: Measured) -> str:
    """One row per predictor with the means over layers."""
    top_k = measured.top_k
    has_intervals = any(row.intervals is not None for row in measured.rows)
    heads = [
        "predictor",
        f"recall@{top_k}",
        *(["95 % by sequence"] if has_intervals else []),
        "gate mass",
        "exact set",
        "error before",
        "error after",
        "expected cost",
        "parameters",
        "µs",
    ]
    rows = []
    for row in measured.rows:
        found, ends = row.metrics, row.intervals
        judged = row.reliability
        interval = "" if ends is None else " to ".join(f"{end:.3f}" for end in ends.recall_at_k)
        cells = [row.name, _mean(found.recall_at_k), *([interval] if has_intervals else [])]
        cells += [_mean(found.gate_mass_recall), _mean(found.exact_set)]
        cells += [
            "" if judged is None else _mean(judged.before.calibration_error),
            "" if judged is None else _mean(judged.after.calibration_error),
            "" if judged is None else _mean(judged.after.expected_cost),
            "" if row.num_parameters is None else f"{row.num_parameters:,}",
            "" if row.us_per_prediction is None else f"{row.us_per_prediction:.1f}",
        ]
        rows.append(cells)
    note = (
        f"<p>Budget {top_k}. Calibration error: mean distance of probability and outcome over 15 "
        f"bins of equal mass, over the top {2 * top_k} predicted experts of each token; before: "
        "the sigmoid of the decision margin. Expected cost: missed experts and needless fetches "
        "per token and layer, in copies of one expert, when all experts above a probability of "
        f"one half are fetched. µs: one token, one layer, called from Python, {measured.device}; "
        "without the making of what it reads.</p>"
    )
    return table(heads, rows) + note


def _budgets(measured: Measured) -> str:
    budgets = list(measured.rows[0].metrics.recall_at_budgets)
    rows = [
        [row.name, *(_mean(row.metrics.recall_at_budgets[budget]) for budget in budgets)]
        for row in measured.rows
    ]
    return table(["predictor", *(f"budget {budget}" for budget in budgets)], rows)


def _by_layer(measured: Measured, columns: list[list[float]]) -> str:
    heads = ["layer", *(row.name for row in measured.rows)]
    rows = [
        [str(layer), *(f"{column[pair]:.3f}" for column in columns)]
        for pair, layer in enumerate(measured.layers)
    ]
    rows.append(["mean", *map(_mean, columns)])
    return table(heads, rows)


def _errors(measured: Measured) -> str:
    judged = [(row, row.reliability) for row in measured.rows if row.reliability is not None]
    heads = ["layer", *(f"{row.name}, {when}" for row, _ in judged for when in ("before", "after"))]
    columns = [
        side.calibration_error for _, found in judged for side in (found.before, found.after)
    ]
    rows = [
        [str(layer), *(f"{column[pair]:.3f}" for column in columns)]
        for pair, layer in enumerate(measured.layers)
    ]
    rows.append(["mean", *map(_mean, columns)])
    return table(heads, rows)


def _curve(curve: Sequence[CurvePoint]) -> str:
    rows = [
        [point.form, f"{point.num_train_tokens:,}", f"{point.recall_at_k:.4f}"] for point in curve
    ]
    return table(["form", "training tokens", "recall"], rows)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"
