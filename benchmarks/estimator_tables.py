"""Puts comparisons into benchmarks/results/estimators.json and their tables into the docs.

    foreroute compare-predictors --model bundled --out bundled
    python benchmarks/estimator_tables.py bundled

Rows of the same model and texts are replaced; so is what lies between the comments of a table's
name in docs/estimators.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foreroute.estimators.artifacts import read_json, write_json
from foreroute.export.compare.plan import RESULTS_NAME
from foreroute.export.compare.tables import (
    Row,
    curve_table,
    main_table,
    markdown,
    readout_table,
    saved_table,
    worth_table,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "estimators.json"
PAGE = ROOT / "docs" / "estimators.md"
KEY = ("model", "trained_on", "tested_on")
LEFT_OUT = ("worth", "chosen_cost_per_layer", "expected_cost_per_layer", "slug", "chosen_from")
"""What comparisons say besides, left out of the results that are kept."""


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """All rows, those of the new comparison in the place of older ones on the same texts."""
    content = {}
    for name in ("rows", "learning_curve"):
        keys = {tuple(row[k] for k in KEY) for row in new[name]}
        kept = [r for r in old.get(name, []) if tuple(r.get(k) for k in KEY) not in keys]
        content[name] = kept + [shortened(row) for row in new[name]]
    return content


def shortened(row: Row) -> Row:
    """A row as it is kept: of what it is worth, the share saved, by machine, slots and rule."""
    rest = {name: value for name, value in row.items() if name not in LEFT_OUT}
    saved: dict[str, dict[str, float]] = {}
    for entry in row.get("worth", ()):
        saved.setdefault(entry["profile"], {})[f"{entry['slots']} {entry['rule']}"] = entry["saved"]
    return rest | ({"saved": saved} if saved else {})


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Every table of a comparison in Markdown, by name."""
    model, rows = results["model"], results["rows"]
    first = results["plan"]["dataset"]
    own: list[Row] = [row for row in rows if row["tested_on"] == first]
    found = {
        f"{model}": main_table(own),
        f"{model}, curve": curve_table(
            [p for p in results["learning_curve"] if p["tested_on"] == first]
        ),
        f"{model}, saved": saved_table(own),
        f"{model}, worth": worth_table(row for row in own if is_main(row)),
        f"{model}, readout": readout_table(own),
    }
    for row in rows:
        if row["tested_on"] != first:
            other = [r for r in rows if r["tested_on"] == row["tested_on"]]
            found.setdefault(f"{model}, other text", main_table(other))
    return {name: markdown(table) for name, table in found.items()}


def is_main(row: Row) -> bool:
    """Whether the page shows what a row saves on every machine; results have all of them."""
    is_far = row["horizon"] != 1 and row["form"] not in ("low-rank", "next-router")
    return row["prior"] == "none" and not is_far


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with the tables that it has a place for."""
    for name, text in tables.items():
        place = re.compile(
            rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL
        )
        page = place.sub(lambda found, text=text: f"{found[1]}{text}{found[2]}", page)
    return page


def main(folders: Sequence[str] | None = None) -> None:
    """Read comparisons, write the results and the page."""
    given = sys.argv[1:] if folders is None else folders
    content = read_json(RESULTS)
    page = PAGE.read_text()
    for folder in given:
        results = read_json(Path(folder) / RESULTS_NAME)
        content = merged(content, results)
        page = with_tables(page, tables_of(results))
    write_json(RESULTS, content)
    PAGE.write_text(page)
    print(RESULTS)
    print(PAGE)


if __name__ == "__main__":
    main()
