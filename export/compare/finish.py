"""What follows from rows and predictions that are there: hybrids, worth, and the results file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foreroute.estimators import TRAINING_FREE_FORM, EstimatorSpec, find_form
from foreroute.estimators.artifacts import device_name, package_versions, write_json
from foreroute.export.compare.compare import Comparison
from foreroute.export.compare.plan import RESULTS_NAME, ROWS_FOLDER, TRUTH_FOLDER
from foreroute.export.compare.predicted import PredictedExperts
from foreroute.export.compare.score import score
from foreroute.export.compare.truth import TrueRouting

Worth = Callable[[TrueRouting, Sequence[PredictedExperts], float], list[dict[str, Any]]]
"""What predictions of 1, 2, ... layers ahead are worth, if they take so many microseconds a layer
longer than the default's; of the next token if they are of fewer tokens than the truth."""
Row = dict[str, Any]

HYBRIDS: dict[str, tuple[str, ...]] = {
    "hybrid": ("quasi-hidden", "router-input"),
    "hybrid with readout": ("quasi-hidden", "router-input", "attention-readout"),
}
"""Which inputs each may choose a layer's form from."""
FAMILY = ("form", "input", "rank", "width", "depth", "prior", "after")
"""Rows that differ in nothing of this but their horizon predict together."""
SAVED_PROFILE, SAVED_SLOTS = "h100-engine", "25%"
"""What `tpot_saved` is of."""
EXTRA_US = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)
"""What a readout is taken to cost, microseconds a layer, to see how much it may."""
WORTH_TOKENS = 2048
"""Replayed at most."""


def add_hybrids(comparison: Comparison) -> None:
    """A row for each hybrid: per layer the form that cost least on the tokens to choose by."""
    rows = first_text(comparison)
    truth = TrueRouting.load(comparison.folder / TRUTH_FOLDER / "0.safetensors")
    for name, inputs in HYBRIDS.items():
        among = candidates(rows, name)
        slugs, slug = [row["slug"] for row in among], name.replace(" ", "_")
        there = comparison.rows_of(slug)[0].get("chosen_from") if comparison.has(slug) else None
        if {row["input"] for row in among} >= {inputs[0], inputs[-1]} and slugs != there:
            _write_hybrid(comparison, name, among, truth)


def candidates(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows that a hybrid chooses from."""
    return [
        row
        for row in rows
        if is_form(row)
        and row["horizon"] == 1
        and row["input"] in HYBRIDS[name]
        and row["prior"] == "none"
    ]


def cheapest(among: Sequence[Row]) -> list[Row]:
    """For each layer, the one of some rows whose predictions cost least, [P]."""
    costs = torch.tensor([row["chosen_cost_per_layer"] for row in among])  # [rows, P]
    return [among[place] for place in costs.argmin(dim=0).tolist()]


def _write_hybrid(
    comparison: Comparison, name: str, among: Sequence[Row], truth: TrueRouting
) -> None:
    chosen = cheapest(among)
    said = {
        row["slug"]: PredictedExperts.load(comparison.predictions_path(row["slug"]))
        for row in chosen
    }
    parts = [(said[row["slug"]], layer) for layer, row in enumerate(chosen)]
    confidence = [p.confidence[:, layer] for p, layer in parts if p.confidence is not None]
    predicted = dataclasses.replace(
        parts[0][0],
        expert_ids=torch.stack([p.expert_ids[:, layer] for p, layer in parts], dim=1),
        confidence=torch.stack(confidence, dim=1),
    )
    slug = name.replace(" ", "_")
    predicted.save(comparison.predictions_path(slug))
    us = [row["us_by_layer"] for row in chosen if row["us_by_layer"] is not None]
    row = {
        **{key: among[0][key] for key in ("model", "trained_on", "tested_on", "device", "torch")},
        "slug": slug,
        "form": name,
        "input": "of each layer",
        "horizon": 1,
        "tokens_ahead": 0,
        "prior": "none",
        "params": sum(row["params"] // len(chosen) for row in chosen),
        "training_tokens": max(row["training_tokens"] for row in chosen),
        "us_per_token": None,
        "us_by_layer": round(sum(us) / len(us), 2) if len(us) == len(chosen) else None,
        "chosen_from": [row["slug"] for row in among],
        "chosen_per_layer": [f"{row['form']}, {row['input']}" for row in chosen],
        **score(truth, predicted),
    }
    write_json(comparison.folder / ROWS_FOLDER / f"{slug}.json", {"rows": [row]})


def add_worth(comparison: Comparison, worth: Worth, readout_us: float = 0.0) -> None:
    """Say in each row that has calibrated predictions what they are worth.

    Args:
        comparison: With all its rows.
        worth: Replays predictions.
        readout_us: What running one attention early takes, microseconds a layer.
    """
    truth = TrueRouting.load(comparison.folder / TRUTH_FOLDER / "0.safetensors")
    rows = first_text(comparison)
    for row in rows:
        if "worth" in row or not (is_form(row) or row["form"] in HYBRIDS):
            continue
        family = _family(rows, row)
        if family is None:
            continue
        said = [PredictedExperts.load(comparison.predictions_path(r["slug"])) for r in family]
        extra = extra_us(row, rows, readout_us)
        found = worth(truth, said, extra)
        path = comparison.folder / ROWS_FOLDER / f"{row['slug']}.json"
        kept = comparison.rows_of(row["slug"])
        kept[0] |= {"worth": found, "extra_us": round(extra, 2)} | saved_of(found)
        if reads_ahead(row) and row["horizon"] == 1:
            kept[0]["saved_by_extra_us"] = [
                [us, saved_of(worth(truth, said, us), "head").get("tpot_saved")] for us in EXTRA_US
            ]
        write_json(path, {"rows": kept})


def reads_ahead(row: Row) -> bool:
    """Whether a row's predictor needs an attention run early."""
    return "readout" in row["input"] or "readout" in row["form"]


def saved_of(worth: Sequence[Mapping[str, Any]], rule: str = "") -> Row:
    """The one figure that tables give: share of on-demand TPOT saved, and of what.

    Args:
        worth: What was replayed.
        rule: By this rule; by the one that saves most if empty.
    """
    there = [
        entry
        for entry in worth
        if (entry["profile"], entry["slots"]) == (SAVED_PROFILE, SAVED_SLOTS)
        and rule in ("", entry["rule"])
    ]
    if not there:
        return {}
    best = max(there, key=lambda entry: entry["saved"])
    return {
        "tpot_saved": best["saved"],
        "profile": SAVED_PROFILE,
        "slots": SAVED_SLOTS,
        "rule": best["rule"],
    }


def write_results(comparison: Comparison, left: int) -> dict[str, Any]:
    """Gather all rows into one file.

    Args:
        comparison: With its rows.
        left: Predictors that there was no time for.
    """
    rows = comparison.rows()
    content = {
        "model": comparison.plan.name,
        "plan": dataclasses.asdict(comparison.plan),
        "left": left,
        "device": device_name(comparison.device),
        "fit_seconds": round(sum(row.get("fit_seconds", 0.0) for row in rows), 1),
        "versions": package_versions(),
        "rows": [row for row in rows if not row.get("is_curve")],
        "learning_curve": [row for row in rows if is_on_curve(row, rows)],
    }
    write_json(comparison.folder / RESULTS_NAME, content)
    return content


def is_on_curve(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row is a point of a learning curve, its last one included."""
    if row.get("is_curve"):
        return True
    sizes = ("form", "input", "horizon", "width", "depth", "prior", "after")
    return bool(row.get("training_tokens")) and any(
        other.get("is_curve") and all(other.get(s) == row.get(s) for s in sizes) for other in rows
    )


def first_text(comparison: Comparison) -> list[Row]:
    """The rows measured on held-out documents of the text trained on, without curves."""
    rows = comparison.rows()
    first = comparison.plan.dataset
    return [row for row in rows if row["tested_on"] == first and not row.get("is_curve")]


def is_form(row: Row) -> bool:
    """Whether a row is of an estimator form, with calibrated predictions."""
    return "chosen_cost_per_layer" in row


def is_default(row: Row) -> bool:
    """Whether a row is of what `train-estimator` trains unless told otherwise."""
    names = (row["form"], row["input"], row["horizon"], row["prior"], row.get("after"))
    is_size = row.get("rank") == EstimatorSpec.rank
    return is_size and names == ("low-rank", "quasi-hidden", 1, "none", "")


def _family(rows: Sequence[Row], row: Row) -> list[Row] | None:
    """Rows of the same predictor at 1, 2, ... layers up to the row's; None if one is missing."""
    if row["horizon"] < 1:
        return [row] if row["tokens_ahead"] else None
    alike = {
        other["horizon"]: other
        for other in rows
        if other["tokens_ahead"] == 0 and all(other.get(n) == row.get(n) for n in FAMILY)
    }
    near = alike.get(1) or next((r for r in rows if is_default(r)), None)
    found = {1: near} | {h: other for h, other in alike.items() if h > 1}
    wanted = [found.get(distance) for distance in range(1, row["horizon"] + 1)]
    known = [other for other in wanted if other is not None]
    return known if len(known) == len(wanted) else None


def extra_us(row: Row, rows: Sequence[Row], readout_us: float) -> float:
    """What a prediction takes longer than the profile's own, which is of an affine form.

    Affine forms are folded into one matrix, whatever they read; others are timed against the next
    router on the same input. Times of a CPU say nothing of the profiles' machines and count as 0.
    """
    if row["form"] in HYBRIDS:
        chosen = cheapest(candidates(rows, row["form"]))
        return sum(extra_us(r, rows, readout_us) for r in chosen) / len(chosen)
    if row["device"] == "cpu":
        return 0.0
    attention_us = readout_us if reads_ahead(row) else 0.0
    if find_form(row["form"]).is_affine:
        return attention_us
    free = [r["us_by_layer"] for r in rows if _is_free(r) and r["input"] == row["input"]]
    own: float = row["us_by_layer"] - min(free, default=0.0)
    return own + attention_us


def _is_free(row: Row) -> bool:
    return row["form"] == TRAINING_FREE_FORM and row.get("us_by_layer") is not None
