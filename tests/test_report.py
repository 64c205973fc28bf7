"""The report is one page that needs nothing else, with every picture and number in it."""

import base64
import re

import pytest
from pages import loaded_from_elsewhere

from foreroute.estimators import EstimatorSpec
from foreroute.estimators.artifacts import read_json
from foreroute.export.export import export_estimator
from foreroute.export.report.cli import report
from foreroute.export.report.report import write_report
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

PICTURES = (
    "recall_by_layer",
    "recall_over_budgets",
    "gate_mass_recall",
    "exact_set",
    "reliability",
    "learning_curve",
    "cost_of_prediction",
)


@pytest.fixture(scope="module")
def runs(tiny_traces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, spec in {
        "ours": EstimatorSpec(form="low-rank", rank=4, target_layers=(1, 2, 3)),
        "theirs": EstimatorSpec(form="linear", input_kind="residual", target_layers=(1, 2, 3)),
    }.items():
        config = FitConfig(epochs=1, batch_size=256)
        train_estimator(tiny_traces, spec, config, folder / name, device="cpu")
    return folder


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    bundle = runs / "bundle"
    export_estimator(runs / "ours", bundle, also=[runs / "theirs"])
    out = tmp_path_factory.mktemp("report") / "out"
    page = write_report(
        runs / "ours",
        out,
        also=[runs / "theirs"],
        bundle=bundle,
        learning_curve=True,
        device="cpu",
    )
    assert page == out / "index.html"
    return out


def test_every_picture_is_in_the_page_and_beside_it(folder) -> None:
    page = (folder / "index.html").read_text()
    for name in PICTURES:
        figure = re.search(rf'<figure id="{name}">.*?base64,([^"]+)"', page, re.DOTALL)
        assert figure is not None
        picture = base64.b64decode(figure.group(1))
        assert picture == (folder / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_pictures_come_first_and_the_command_last(folder) -> None:
    page = (folder / "index.html").read_text()
    assert page.rindex("<img") < page.index("<table") < page.index("Made by")
    assert (folder / "command.txt").read_text().splitlines()[1] in page[page.index("Made by") :]


def test_the_page_loads_nothing_from_elsewhere(folder) -> None:
    page = (folder / "index.html").read_text()
    assert loaded_from_elsewhere(page) == []


def test_all_forms_baselines_and_the_floor_are_measured_on_the_same_tokens(folder) -> None:
    numbers = read_json(folder / "report.json")
    rows = {row["name"]: row for row in numbers["rows"]}
    assert set(rows) >= {
        "low-rank, quasi-hidden",
        "linear, residual",
        "bundle",
        "frequency",
        "previous-token",
        "next-router",
        "quasi-hidden",
        "ridge",
        "random",
    }
    assert rows["random"]["metrics"]["recall_at_budgets"]["2"] == [0.25] * 3
    assert (numbers["num_sequences"], numbers["num_tokens"]) == (2, 128)
    page = (folder / "index.html").read_text()
    for name, row in rows.items():
        recall = row["metrics"]["recall_at_budgets"]["2"]
        assert f"<td>{name}</td><td>{sum(recall) / 3:.3f}</td>" in page
        if row["kind"] == "form":
            low, high = row["intervals"]["recall_at_budgets"]["2"]
            assert low <= sum(recall) / 3 <= high
            assert row["us_per_prediction"] > 0


def test_the_curve_has_both_forms_at_growing_numbers_of_tokens(folder) -> None:
    points = read_json(folder / "report.json")["learning_curve"]
    for form in ("ridge", "low-rank"):
        tokens = [point["num_train_tokens"] for point in points if point["form"] == form]
        assert len(tokens) == 5
        assert tokens == sorted(set(tokens))
        assert all(0.25 < point["recall_at_k"] <= 1 for point in points if point["form"] == form)


def test_a_bundle_of_other_layers_is_refused(runs, tiny_traces, tmp_path) -> None:
    spec = EstimatorSpec(form="next-router", target_layers=(2,))
    train_estimator(tiny_traces, spec, FitConfig(), tmp_path / "one", device="cpu")
    export_estimator(tmp_path / "one", tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"predicts layers \[2\], the run \[1, 2, 3\]"):
        write_report(runs / "ours", tmp_path / "out", bundle=tmp_path / "bundle", device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_runs_as_a_list_and_prints_the_page(runs, tmp_path, capsys) -> None:
    report(runs / "ours", tmp_path / "out", also=f"{runs / 'theirs'}", device="cpu")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "index.html")
    assert not (tmp_path / "out" / "learning_curve.png").exists()
    with pytest.raises(ValueError, match="exists already"):
        report(runs / "ours", tmp_path / "out", device="cpu")
