"""Every row of docs/models.md is checked again on a tiny model of that type."""

import json
from pathlib import Path

import models_matrix
import pytest

BENCHMARKS = Path(models_matrix.__file__).parent

ROWS = {
    row["model_type"]: row
    for row in json.loads((BENCHMARKS / "results" / "models.json").read_text())
}


@pytest.mark.parametrize("model_type", models_matrix.TYPES)
def test_a_row_of_the_table_is_still_true(model_type):
    assert vars(models_matrix.row_of(model_type)) == ROWS[model_type]


@pytest.mark.parametrize("model_type", ["internvl", "mistral3"])
def test_a_text_model_runs_inside_a_whole_of_another_type(model_type):
    row = models_matrix.row_of(model_type)
    assert row.recorded == row.exact == row.images == "yes"


def test_the_page_shows_the_committed_rows_and_what_doctor_prints():
    rows = [models_matrix.Row(**row) for row in ROWS.values()]
    page = BENCHMARKS.parent / "docs" / "models.md"
    assert page.read_text() == models_matrix.page_of(rows)


def test_at_least_56_types_are_recorded_and_exact():
    assert sum(row["recorded"] == row["exact"] == "yes" for row in ROWS.values()) >= 56
