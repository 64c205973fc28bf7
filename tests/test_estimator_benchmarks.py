"""The benchmarks of estimators run at the smallest size and write the rows that they promise."""

import json
import sys

import pytest
import training_speed

import estimators  # noqa: TID251 - the benchmark of that name, not the room
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


def test_estimators_are_measured_on_every_text_by_its_name(run_benchmark, tiny_traces):
    flags = ["--traces", tiny_traces, "--traces-other", tiny_traces, "--texts", "one", "two"]
    flags += ["--forms", "next-router", "low-rank", "--inputs", "router-input", "--epochs", "1"]
    found = run_benchmark(estimators, *flags, "--no-curve", "--device", "cpu")
    rows = {(row["form"], row["tested_on"]): row for row in found["rows"]}
    assert {row["trained_on"] for row in found["rows"]} == {"one"}
    for text in ("one", "two"):
        row = rows["low-rank", text]
        low, high = row["recall_at_k_ci"]
        assert low <= row["recall_at_k"] <= high < row["recall_at_1_5k"] <= 1
        assert min(row["params"], row["us_per_token"]) > 0
        assert 0 <= row["ece"] < 1
        assert row["gate_mass_recall"] > row["exact_set"] > 0
    assert rows["next-router, leaked future", "one"]["exact_set"] == 1  # float32 traces
