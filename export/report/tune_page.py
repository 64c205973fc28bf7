"""The page that `foreroute tune` ends with: what was gained, and how each step can be typed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from foreroute.export.report.bench_page import bench_parts
from foreroute.export.report.document import document, table

MORE = {
    "report/index.html": "the estimators, layer by layer",
    "bench.html": "the bench alone",
    "summary.json": "every number of this page",
}


def tune_page(
    title: str,
    summary: Mapping[str, Any],
    bench: Mapping[str, Any],
    steps: Sequence[tuple[str, float]],
) -> str:
    """The whole page; nothing in it is loaded from elsewhere.

    Args:
        title: The model and the device.
        summary: What `foreroute tune` writes as summary.json.
        bench: What `foreroute bench --json` wrote.
        steps: Each command as it can be typed, and the seconds it took.
    """
    links = [
        f'<li><a href="{name}">{name}</a>: {html.escape(text)}</li>' for name, text in MORE.items()
    ]
    typed = "\n".join(f"{command}   # {took:.0f} s" for command, took in steps)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *bench_parts(bench),
        "<h2>Who predicts the next layer's experts</h2>",
        _recall(summary),
        "<h2>More</h2>",
        f"<ul>{''.join(links)}</ul>",
        "<h2>Made by</h2>",
        f"<pre>{html.escape(typed)}</pre>",
    ]
    return document(f"foreroute tune: {title}", parts)


def _recall(summary: Mapping[str, Any]) -> str:
    """Recall of the trained form beside the baselines, the best last."""
    rows = dict(summary["baselines"])
    rows[f"trained {summary['estimator']['form']}"] = summary["estimator"]
    top_k = summary["model"]["top_k"]
    heads = ["predictor", f"recall@{top_k} (budget {top_k}), mean", "worst layer", "best layer"]
    cells = []
    for name, row in sorted(rows.items(), key=lambda pair: pair[1]["recall_at_k"]):
        by_layer = row["recall_at_k_by_layer"]
        figures = (row["recall_at_k"], min(by_layer), max(by_layer))
        cells.append([name, *(f"{figure:.3f}" for figure in figures)])
    return table(heads, cells)
