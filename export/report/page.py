"""The report's HTML page: pictures first, numbers below, the command that made it at the foot."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from foreroute.export.report.gather import Measured
from foreroute.export.report.learning_curve import CurvePoint

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1050px; margin: 2em auto; padding: 0 1em }
img { max-width: 100% } figure { margin: 2em 0 } figcaption { color: #444 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child { text-align: left }
div.wide { overflow-x: auto } pre { background: #f4f4f4; padding: 1em; white-space: pre-wrap }
"""


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
    pictures = "".join(_picture(folder / name, text) for name, text in captions.items())
    parts = [
        f"<h1>{html.escape(measured.title)}</h1>",
        f"<p>Measured on {measured.num_tokens:,} held-out tokens of {measured.num_sequences} "
        "sequences that trained, calibrated and chose nothing.</p>",
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
    title = html.escape(f"foreroute report: {measured.title}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure id="{path.stem}"><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def _summary(measured: Measured) -> str:
    """One row per predictor with the means over layers."""
    top_k = measured.top_k
    heads = [
        "predictor",
        f"recall@{top_k}",
        "95 % by sequence",
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
        cells = [row.name, _mean(found.recall_at_k), interval]
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
    return _table(heads, rows) + note


def _budgets(measured: Measured) -> str:
    budgets = list(measured.rows[0].metrics.recall_at_budgets)
    rows = [
        [row.name, *(_mean(row.metrics.recall_at_budgets[budget]) for budget in budgets)]
        for row in measured.rows
    ]
    return _table(["predictor", *(f"budget {budget}" for budget in budgets)], rows)


def _by_layer(measured: Measured, columns: list[list[float]]) -> str:
    heads = ["layer", *(row.name for row in measured.rows)]
    rows = [
        [str(layer), *(f"{column[pair]:.3f}" for column in columns)]
        for pair, layer in enumerate(measured.layers)
    ]
    rows.append(["mean", *map(_mean, columns)])
    return _table(heads, rows)


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
    return _table(heads, rows)


def _curve(curve: Sequence[CurvePoint]) -> str:
    rows = [
        [point.form, f"{point.num_train_tokens:,}", f"{point.recall_at_k:.4f}"] for point in curve
    ]
    return _table(["form", "training tokens", "recall"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"
