"""The rows that a comparison writes and reads again, a file a predictor."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from foreroute.estimators import FORMS
from foreroute.estimators.artifacts import Count, read_checked

REMEDY = "Remove it: the same command measures that predictor again."


class Saved(TypedDict):
    """What predictions save on one machine at one number of slots."""

    profile: str
    slots: str
    rule: str
    saved: float
    wasted_bytes: float
    stall_ms: float


class KnownRow(TypedDict):
    """What a row holds, as far as it is read again."""

    slug: str
    form: str
    input: str
    horizon: Count
    tokens_ahead: Count
    prior: str
    model: str
    trained_on: str
    tested_on: str
    device: str
    torch: str
    held_out_tokens: Count
    params: Count
    recall_at_k: float
    recall_at_k_ci: tuple[float, float] | None
    recall_at_1_5k: float | None
    gate_mass_recall: float
    exact_set: float
    recall_per_layer: list[float]
    ece: float | None
    after: NotRequired[str]
    rank: NotRequired[Count]
    width: NotRequired[Count]
    depth: NotRequired[Count]
    is_curve: NotRequired[bool]
    training_tokens: NotRequired[Count]
    fit_seconds: NotRequired[float]
    us_by_layer: NotRequired[float | None]
    chosen_cost_per_layer: NotRequired[list[float]]
    chosen_from: NotRequired[list[str]]
    worth: NotRequired[list[Saved]]
    extra_us: NotRequired[float]
    tpot_saved: NotRequired[float]
    profile: NotRequired[str]
    slots: NotRequired[str]
    rule: NotRequired[str]
    saved_by_extra_us: NotRequired[list[tuple[float, float]]]


OF_FORMS = (
    "chosen_cost_per_layer",
    "after",
    "rank",
    "width",
    "depth",
    "training_tokens",
    "fit_seconds",
    "us_by_layer",
)
"""What a row has besides if its predictor is an estimator form."""
OF_SAVED = ("extra_us", "profile", "slots", "rule")
"""What it has besides if it says what share of the time is saved."""


class _Rows(TypedDict):
    rows: Annotated[list[KnownRow], msgspec.Meta(min_length=1)]


def read_rows(path: Path, texts: Collection[str]) -> list[dict[str, Any]]:
    """A predictor's rows, one for each text it was measured on, as they are in its file.

    Args:
        path: Named as the predictor's slug.
        texts: That the comparison measures on.

    Raises:
        ValueError: If it is damaged; names file and field.
    """
    known, content = read_checked(path, _Rows, REMEDY)
    for row in known["rows"]:
        by_layer = row["recall_per_layer"]
        costs = row.get("chosen_cost_per_layer", by_layer)
        is_ours = row["slug"] == path.stem and row["tested_on"] in texts
        if not is_ours or not costs or len(costs) != len(by_layer):
            raise ValueError(f"{path} is damaged (rows of something else). {REMEDY}")
        is_form = "chosen_cost_per_layer" in row or row["form"] in FORMS
        wanted = OF_FORMS * is_form + OF_SAVED * ("tpot_saved" in row)
        if missing := [name for name in wanted if name not in row]:
            raise ValueError(f"{path} is damaged (it has no {missing[0]}). {REMEDY}")
    rows: list[dict[str, Any]] = content["rows"]
    return rows
