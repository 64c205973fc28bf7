"""A comparison's page: pictures first, tables below, and the command that made it at the foot."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from foreroute.export.compare.compare import Comparison
from foreroute.export.compare.pictures import draw
from foreroute.export.compare.tables import (
    curve_table,
    main_table,
    markdown,
    readout_table,
    worth_table,
)
from foreroute.export.report.document import document, picture, table

PAGE_NAME, TABLES_NAME = "index.html", "tables.md"
WORTH_NOTE = (
    "Simulated: the held-out tokens' routing is replayed as decode steps on a machine's measured "
    "times, with the size of its reference model's experts and the compute of its layers. Saved is "
    "the share of the time per token that the same machine needs on demand at equal slots; wasted "
    "and stall are of 25 % on h100-engine."
)


def write_page(comparison: Comparison, results: dict[str, Any]) -> Path:
    """Write the pictures, the page and the tables in Markdown.

    Args:
        comparison: Whose folder they go to.
        results: As `write_results` gave them.

    Returns:
        The page.
    """
    folder: Path = comparison.folder
    texts = list(dict.fromkeys(row["tested_on"] for row in results["rows"]))
    by_text = {t: [r for r in results["rows"] if r["tested_on"] == t] for t in texts}
    first = by_text[comparison.plan.dataset]
    curve = [p for p in results["learning_curve"] if p["tested_on"] == comparison.plan.dataset]
    captions = draw(first, curve, folder)
    told = {f"Tested on {text}": main_table(rows) for text, rows in by_text.items()}
    if curve:
        told["Learning curves, quasi-hidden input"] = curve_table(curve)
    if any(row.get("worth") for row in first):
        told["What it saves"] = worth_table(first)
    if any(row.get("saved_by_extra_us") for row in first):
        told["What an early attention may cost"] = readout_table(first)
    tokens = first[0]["held_out_tokens"]
    title = f"Predictors of {results['model']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Measured on {tokens:,} tokens of documents that neither trained nor chose anything; "
        f"fitted on {html.escape(results['device'])} in {results['fit_seconds']:.0f} s.</p>",
    ]
    if results["left"]:
        parts.append(f"<p>{results['left']} predictors were left out: the time was over.</p>")
    parts += [
        picture(Path(name).stem, (folder / name).read_bytes(), caption)
        for name, caption in captions.items()
    ]
    for heading, found in told.items():
        note = f"<p>{html.escape(WORTH_NOTE)}</p>" if heading == "What it saves" else ""
        parts += [f"<h2>{html.escape(heading)}</h2>", note, table(*found)]
    command = (folder / "command.txt").read_text()
    parts += ["<h2>Made by</h2>", f"<pre>{html.escape(command)}</pre>"]
    (folder / PAGE_NAME).write_text(document(title, parts))
    lines = [f"## {heading}\n\n{markdown(found)}" for heading, found in told.items()]
    (folder / TABLES_NAME).write_text("\n".join(lines))
    return folder / PAGE_NAME
