"""The benchmarks of estimators run at the smallest size and write the rows that they promise."""

import json
import sys

import pytest
import training_speed
from estimator_tables import merged, with_tables

from foreroute.export.compare.prediction_time import captured_us

SHAPE = "--layers 3 --tokens 256 --hidden 32 --experts 8 --top-k 2 --epochs 1 --rounds 1"


@pytest.fixture
def run_benchmark(monkeypatch, tmp_path):
    """Run one with the flags given; returns its JSON."""

    def run(module, *flags):
        out = tmp_path / "found.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, flags), "--json", str(out)])
        module.main()
        return json.loads(out.read_text())

    return run


def test_training_is_set_beside_its_products(run_benchmark):
    (row,) = run_benchmark(training_speed, *SHAPE.split(), "--forms", "low-rank")["rows"]
    assert row["train_s"] >= row["products_s"] >= 0
    assert row["by_layer_us"] > 0


def test_no_empty_graph_is_timed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", *SHAPE.split()])
    stack = training_speed.synthetic_stack(training_speed.parse_options(), "low-rank")
    with pytest.raises(ValueError, match="needs a stack on a GPU"):
        captured_us(stack)


def test_tables_take_the_place_of_older_ones_and_leave_the_rest() -> None:
    row = {"model": "m", "trained_on": "a", "tested_on": "a", "recall_at_k": 0.5}
    other = row | {"trained_on": "b"}
    found = merged({"rows": [row, other]}, {"rows": [row | {"new": 1}], "learning_curve": []})
    assert found == {"rows": [other, row | {"new": 1}], "learning_curve": []}
    page = "before\n<!-- table: m -->\nold\n<!-- end of table -->\nafter\n"
    assert with_tables(page, {"m": "new\n", "unknown": "x"}) == page.replace("old", "new")
