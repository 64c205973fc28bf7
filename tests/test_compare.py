"""Predictors side by side: one command from a model to rows, a page and what each is worth."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import loaded_from_elsewhere
from toys import toy_geometry

from foreroute.data.traces import Traces
from foreroute.estimators import FORMS, EstimatorSpec
from foreroute.estimators.output import require_free
from foreroute.estimators.priors import decayed_frequency, previous_token
from foreroute.export.compare.cells import catalogue
from foreroute.export.compare.cli import compare_predictors, score, worth_on_profiles
from foreroute.export.compare.finish import extra_us
from foreroute.export.compare.parts import InMemory, ShuffledLabels
from foreroute.export.compare.plan import scale_of
from foreroute.export.compare.predicted import PredictedExperts
from foreroute.export.compare.published import TraceSet
from foreroute.export.compare.score import score as figures_of
from foreroute.export.compare.sources import find_truth
from foreroute.export.compare.truth import TrueRouting
from foreroute.train.prepared import PreparedBatch
from foreroute.train.prior import fit_prior_weights

SETTINGS: dict[str, Any] = {
    "quick": True,
    "tokens": 2048,
    "held_out_tokens": 512,
    "sequence_length": 64,
    "forms": "next-router,low-rank",
    "inputs": "quasi-hidden,attention-readout",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def comparison(tiny_moe, text_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "tiny"
    compare_predictors(out, model=str(tiny_moe.folder), dataset=str(text_dataset), **SETTINGS)
    return out


@pytest.fixture(scope="module")
def rows(comparison) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = json.loads((comparison / "results.json").read_text())["rows"]
    return {(r["form"], r["input"], r["horizon"], r["tokens_ahead"], r["prior"]): r for r in found}


def truth_of(num_tokens: int = 64) -> TrueRouting:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(num_tokens, 3, 8, generator=generator)
    starts = torch.zeros(num_tokens, dtype=torch.bool)
    starts[:: num_tokens // 4] = True
    return TrueRouting(
        expert_ids=scores.topk(2, dim=-1).indices,
        gate_weights=torch.full((num_tokens, 3, 2), 0.5),
        starts=starts,
        layer_indices=(0, 1, 2),
        num_experts=8,
    )


def oracle_of(truth: TrueRouting, confidence: float = 1.0) -> PredictedExperts:
    ids = torch.full((truth.num_tokens, 2, 6), -1)
    ids[..., :2] = truth.expert_ids[:, 1:3]
    said = torch.zeros(ids.shape)
    said[..., :2] = confidence
    return PredictedExperts(expert_ids=ids, confidence=said, target_layers=(1, 2))


def test_checks_bound_what_is_measured(rows) -> None:
    shuffled = rows["linear, shuffled labels", "none", 1, 0, "none"]
    frequency = rows["frequency", "none", 1, 0, "none"]
    leaked = rows["next-router, leaked future", "none", 0, 0, "none"]
    assert shuffled["recall_at_k"] < frequency["recall_at_k"] + 0.05
    assert leaked["recall_at_k"] > 0.99  # states were rounded to bfloat16
    trained = rows["low-rank", "quasi-hidden", 1, 0, "none"]
    low, high = trained["recall_at_k_ci"]
    assert low <= trained["recall_at_k"] <= high < trained["recall_at_1_5k"]
    assert trained["recall_at_k"] > rows["next-router", "quasi-hidden", 1, 0, "none"]["recall_at_k"]


def test_shuffled_labels_are_those_of_all_shards_and_states_stay() -> None:
    def batch(first: int, count: int) -> PreparedBatch:
        here = torch.arange(first, first + count).view(1, count, 1)
        return PreparedBatch(*(here.float(),) * 3, here, *(here.float(),) * 3)

    shards = InMemory([batch(0, 40), batch(40, 24)])
    shuffled = ShuffledLabels(shards)
    read = [shuffled.read(shard_idx) for shard_idx in shuffled.rows]
    for got, given in zip(read, map(shards.read, shards.rows), strict=True):
        assert torch.equal(got.features, given.features)
        assert torch.equal(got.target_logits, got.target_ids.float())  # all of one token
    labels = [got.target_ids.flatten().tolist() for got in read]
    assert sorted(labels[0] + labels[1]) == list(range(64))
    assert min(labels[0]) < 40 <= max(labels[0])


def test_a_finished_comparison_may_be_replaced_as_all_in_it_is_its_own(comparison) -> None:
    require_free(comparison, "comparison", overwrite=True)


def test_every_horizon_and_the_next_token_have_rows_with_honest_confidence(rows) -> None:
    for key in (("quasi-hidden", 2, 0), ("attention-readout", 3, 0), ("quasi-hidden", 0, 1)):
        row = rows["low-rank", *key, "none"]
        assert row["training_tokens"] > 0
        assert 0 <= row["ece"] < 0.2
    for prior in ("previous-token", "decayed-frequency"):
        assert rows["low-rank", "quasi-hidden", 1, 0, prior]["recall_at_k"] > 0.5


def test_a_row_says_what_its_predictor_saves_on_three_machines(rows) -> None:
    row = rows["low-rank", "quasi-hidden", 1, 0, "none"]
    assert {entry["profile"] for entry in row["worth"]} == {
        "h100-engine",
        "a100-pcie4",
        "rtx4090-pcie4",
    }
    assert row["profile"] == "h100-engine"
    told = [e for e in row["worth"] if (e["profile"], e["slots"]) == ("h100-engine", "25%")]
    assert (
        row["tpot_saved"]
        == told[0]["saved"]
        == pytest.approx(1 - told[0]["tpot_ms"] / told[0]["on_demand_ms"], abs=1e-4)
    )
    assert "worth" not in rows["frequency", "none", 1, 0, "none"]


def test_the_page_shows_pictures_first_and_every_predictor(comparison, rows) -> None:
    page = (comparison / "index.html").read_text()
    assert page.index("<img") < page.index("<table")
    assert loaded_from_elsewhere(page) == []
    tables = (comparison / "tables.md").read_text()
    assert len(re.findall(r"^\| (none|quasi|attention|of each)", tables, re.M)) > len(rows)


def test_the_same_command_again_fits_nothing(comparison, tiny_moe, text_dataset) -> None:
    rows = list((comparison / "rows").iterdir())
    before = {path: path.stat().st_mtime_ns for path in rows}
    compare_predictors(comparison, device="cpu")
    assert before == {path: path.stat().st_mtime_ns for path in rows}
    with pytest.raises(ValueError, match="begun with another dataset"):
        compare_predictors(comparison, model=str(tiny_moe.folder), dataset="other", **SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("form", 1), ("recall_at_k_ci", [1.0]), ("chosen_cost_per_layer", []), ("slug", "../x")],
)
def test_a_damaged_row_is_named_and_what_to_do_about_it(comparison, field, value) -> None:
    path = next((comparison / "rows").glob("low-rank-quasi-hidden-h1*"))
    good = path.read_text()
    path.write_text(json.dumps({"rows": [json.loads(good)["rows"][0] | {field: value}]}))
    try:
        with pytest.raises(ValueError, match=rf"{path.name} is damaged .*measures that predictor"):
            compare_predictors(comparison, device="cpu")
    finally:
        path.write_text(good)


def test_a_predictor_that_there_was_no_time_for_is_made_by_the_next_call(
    comparison, tiny_moe, text_dataset, capsys
) -> None:
    path = next((comparison / "rows").glob("low-rank-quasi-hidden-h2*"))
    row = path.read_text()
    path.unlink()
    compare_predictors(comparison, device="cpu", minutes=0)
    assert "1 predictors are left" in capsys.readouterr().err
    compare_predictors(comparison, device="cpu")
    assert json.loads(path.read_text())["rows"][0]["recall_at_k"] == pytest.approx(
        json.loads(row)["rows"][0]["recall_at_k"], abs=0.01
    )


def test_the_score_of_our_own_file_is_the_rows(comparison, rows, tmp_path) -> None:
    row = rows["low-rank", "quasi-hidden", 1, 0, "none"]
    file = comparison / "predictions" / f"{row['slug']}.safetensors"
    score(comparison, file, json=tmp_path / "score.json")
    found = json.loads((tmp_path / "score.json").read_text())
    for name in ("recall_at_k", "recall_at_k_ci", "gate_mass_recall", "exact_set"):
        assert found[name] == row[name]
    assert found["ece"] == pytest.approx(row["ece"], abs=1e-3)  # the file has half precision
    assert found["tpot_saved"] == pytest.approx(row["tpot_saved"], abs=1e-3)


def test_what_is_not_predicted_is_no_hit() -> None:
    truth = truth_of()
    assert figures_of(truth, oracle_of(truth))["recall_at_k"] == 1
    half = oracle_of(truth)
    half.expert_ids[..., 1] = -1
    found = figures_of(truth, half)
    assert found["recall_at_k"] == found["recall_at_1_5k"] == 0.5
    assert found["exact_set"] == 0


def test_predictions_of_the_next_token_are_of_the_tokens_that_follow_another() -> None:
    truth = truth_of()
    whole = oracle_of(truth)
    said = whole.confidence
    assert said is not None
    followers = ~truth.starts
    later = PredictedExperts(
        expert_ids=whole.expert_ids[followers],
        confidence=said[followers],
        target_layers=whole.target_layers,
    )
    found = figures_of(truth, later)
    assert (found["recall_at_k"], found["held_out_tokens"]) == (1, 60)
    with pytest.raises(ValueError, match="Expected predictions of 64 tokens, or of the 60"):
        figures_of(truth, whole.first(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layers": (1,)}, "1 layers"),
        ({"expert_ids": torch.zeros(64, 2, 6, dtype=torch.long)}, "without repeats"),
        ({"confidence": torch.full((64, 2, 6), 2.0)}, "probability"),
    ],
)
def test_predictions_that_make_no_sense_are_refused(change, message) -> None:
    whole = oracle_of(truth_of())
    given = {"expert_ids": whole.expert_ids, "confidence": whole.confidence}
    with pytest.raises(ValueError, match=message):
        PredictedExperts(**(given | {"target_layers": (1, 2)} | change))


def test_an_oracle_saves_time_and_one_that_knows_nothing_none() -> None:
    truth = truth_of(256)
    saved = {
        chance: max(e["saved"] for e in worth_on_profiles(truth, [oracle_of(truth, chance)], 0.0))
        for chance in (1.0, 0.0)
    }
    assert saved[1.0] > 0.05 > saved[0.0]
    slow = worth_on_profiles(truth, [oracle_of(truth)], 500.0)
    assert max(entry["saved"] for entry in slow) < saved[1.0]


def test_decayed_frequency_is_higher_for_what_was_used_later_and_starts_anew() -> None:
    previous = torch.tensor([[[-1], [2], [1], [1], [-1]]])
    starts = torch.tensor([True, False, False, False, True])
    logs = decayed_frequency(previous, starts, 3)[0]
    assert torch.equal(logs[0], torch.zeros(3))
    assert torch.equal(logs[4], torch.zeros(3))
    assert logs[3, 1] > logs[3, 2] > logs[3, 0]
    decay = 0.5 ** (1 / 20)
    difference = torch.log(torch.tensor((decay * decay + 0.1) / (1 + decay + 0.1)))
    assert logs[3, 2] - logs[3, 1] == pytest.approx(float(difference), abs=1e-5)
    assert torch.equal(previous_token(previous, 3)[0, 1], torch.tensor([0.0, 0.0, 1.0]))


def test_a_prior_gets_a_weight_where_it_helps_alone() -> None:
    truth = torch.randint(0, 8, (2, 200, 1), generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 200, 8, generator=torch.Generator().manual_seed(1))
    prior = torch.zeros(2, 200, 8)
    prior[0].scatter_(-1, truth[0], 1.0)
    weights = fit_prior_weights(noise, prior, truth)
    assert weights[0] > 0
    assert weights[1] == 0


def test_affine_forms_cost_nothing_more_and_others_what_they_take_over_the_next_router() -> None:
    common = {"input": "quasi-hidden", "horizon": 1, "device": "NVIDIA H100", "prior": "none"}
    free = common | {"form": "next-router", "us_by_layer": 20.0}
    rows = [
        free,
        common | {"form": "low-rank", "us_by_layer": 27.0},
        common | {"form": "mlp", "us_by_layer": 31.0},
        common | {"form": "mlp", "us_by_layer": 31.0, "input": "attention-readout"},
        common | {"form": "mlp", "us_by_layer": 31.0, "device": "cpu"},
    ]
    assert [extra_us(row, rows, 80.0) for row in rows] == [0, 0, 11, 111, 0]


def test_a_form_of_ones_own_is_compared_by_its_name(monkeypatch) -> None:
    monkeypatch.setitem(FORMS, "own", FORMS["linear"])
    cells = catalogue(scale_of(1024, is_quick=True), toy_geometry(0, 1), (), has_anchors=True)
    assert "own" in {cell.form for cell in cells}
    assert len({cell.slug for cell in cells}) == len(cells)
    free = catalogue(scale_of(1024, is_quick=True), toy_geometry(0, 1), (), has_anchors=False)
    assert {cell.input_kind for cell in free} == {"router-input"}


def test_the_next_token_is_predicted_of_the_same_layer() -> None:
    assert EstimatorSpec(form="linear", horizon=0, tokens_ahead=1).horizon == 0
    with pytest.raises(ValueError, match="tokens_ahead must be 0 or 1"):
        EstimatorSpec(form="linear", tokens_ahead=2)


def test_a_published_set_is_read_by_datasets_and_scores_an_oracle(comparison, tmp_path) -> None:
    from datasets import load_dataset

    traces = Traces.open(comparison / "traces-held-out")
    written = TraceSet.gather(traces, 32).write(tmp_path / "set", name="tiny")
    assert written < 1 << 20
    loaded = load_dataset(str(tmp_path / "set"))
    assert set(loaded) == {"calibrate", "test"}
    first = loaded["calibrate"].with_format("numpy")[0]
    layer = traces.read(1, 0, ("residual", "expert_ids"))
    rounded = torch.as_tensor(first["residual"][1] * first["residual_scale"][1]).float()
    assert torch.allclose(rounded, layer["residual"][0].float(), atol=0.05)
    assert first["expert_ids"][1].tolist() == layer["expert_ids"][0].tolist()
    truth = find_truth(tmp_path / "set")
    assert (truth.num_tokens, int(truth.starts.sum())) == (len(loaded["test"]), 6)
    oracle_of(truth).save(tmp_path / "oracle.safetensors")
    score(tmp_path / "set", tmp_path / "oracle.safetensors", tmp_path / "found.json", worth=False)
    assert json.loads((tmp_path / "found.json").read_text())["recall_at_k"] == 1
    with pytest.raises(ValueError, match="fewer tokens of each sequence"):
        TraceSet.gather(traces, 32).write(tmp_path / "large", name="tiny", max_bytes=1000)
