"""The folder of one training run: what was asked for, how far it came, what it gave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from foreroute.estimators import EstimatorSpec, EstimatorStack, MoEGeometry
from foreroute.estimators.artifacts import (
    Count,
    read_checked,
    read_tensors,
    read_versioned,
    require_digest,
    require_finite,
    sha256_of,
    write_json,
    write_tensors,
)
from foreroute.estimators.output import kind_of, new_folder
from foreroute.estimators.types import NormKind
from foreroute.train.losses import LossName
from foreroute.train.split import SequenceSplit

FORMAT_VERSION = 2  # 1 had no digest of its tensors
REMEDY = "Train again."
PLAN_NAME = "run.json"
METRICS_NAME = "metrics.json"
TENSORS_NAME = "estimators.safetensors"
CHECKPOINT_PATH = Path("checkpoints", "last.ckpt")

DeviceChoice = Literal["auto", "cpu", "cuda"]
InitName = Literal["ridge", "zero"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How the estimators are fitted."""

    epochs: Count = 10
    """Passes over the training tokens."""
    batch_size: Count = 2048
    """Tokens per optimizer step."""
    learning_rate: float = 5e-3
    """AdamW's, at the first step; follows a cosine to zero."""
    loss: LossName = "boundary"
    """What training makes small."""
    init: InitName = "ridge"
    """Where `low-rank` starts: from the ridge solution, or from the next router alone."""
    kept_gain: float = 0.9
    """Share of the corrections' gain in recall, above 0 and at most 1, that is kept when they are
    shrunk, as far as training sequences set aside allow: small ones hold better on other text.
    """
    seed: Count = 0
    """Decides the initial parameters and the order of tokens."""

    def __post_init__(self) -> None:
        """Check the numbers a user can set."""
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        if not 0 < self.kept_gain <= 1:
            raise ValueError(f"kept_gain must be above 0 and at most 1, not {self.kept_gain}.")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that decides what a run gives; a resumed run must have the same."""

    traces: str
    """Absolute path of the traces."""
    traces_sha256: str
    """sha256 of the traces' manifest, which lists every shard's own."""
    geometry: MoEGeometry
    """The recorded model's routing."""
    norm_kind: NormKind
    """The norm in front of its routers."""
    norm_eps: float
    """Added to that norm's variance."""
    spec: EstimatorSpec
    """What is predicted from what, in which form."""
    split: SequenceSplit
    """Sequences that train and sequences that measure."""
    config: FitConfig
    """How it is fitted."""

    def __post_init__(self) -> None:
        """Check what a damaged file could say.

        Raises:
            ValueError: If the numbers fit no model.
        """
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be finite and not negative, not {self.norm_eps}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, which `read_versioned` rebuilds."""
        return dataclasses.asdict(self) | {
            "format_version": FORMAT_VERSION,
            "geometry": self.geometry.to_dict(),
            "spec": self.spec.to_dict(),
            "split": self.split.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run left behind."""

    plan: RunPlan
    stack: EstimatorStack
    metrics: dict[str, Any]
    """As in metrics.json; `RunMetrics` says what is always there."""


class PerLayer(TypedDict):
    """Figures of one predictor by layer."""

    recall_at_k: list[float]
    """At a budget of K, by pair."""
    gate_mass_recall: list[float]
    """The same by gate weights."""
    exact_set: list[float]
    """Share of tokens with all K experts predicted, by pair."""
    recall_at_budgets: dict[str, list[float]]
    """Recall by budget and pair."""


class FormMetrics(TypedDict):
    """Figures of one predictor, as far as they are read again."""

    recall_at_k: float
    """At a budget of K, mean over pairs, as all that follow."""
    gate_mass_recall: float
    exact_set: float
    recall_at_budgets: dict[str, float]
    per_layer: PerLayer
    """By pair."""


class Means(TypedDict):
    """Mean recall at a budget of K by predictor."""

    random: float


class RunMetrics(TypedDict):
    """What metrics.json holds, as far as it is read again."""

    top_k: Count
    """Experts per token."""
    layers: list[Count]
    """The target layer of each pair."""
    budgets: list[Count]
    """Experts predicted."""
    num_held_out_tokens: Count
    """It was measured on."""
    mean: Means
    """By predictor."""
    form: str
    """Which was trained."""
    estimator: FormMetrics
    """The trained form's."""
    baselines: dict[str, FormMetrics]
    """By name."""
    num_train_tokens: Count
    """It was trained on."""
    tensors_sha256: str
    """The digest of the estimators' file."""


def open_run(
    folder: Path,
    plan: RunPlan,
    *,
    overwrite: bool,
    resume: bool,
    inputs: Sequence[Path | str | None] = (),
) -> None:
    """Start a run's folder, or check that the one there belongs to the same plan.

    Args:
        folder: The run's; somebody has claimed it.
        plan: What will be done.
        overwrite: Replace another run.
        resume: Go on with a run of the same plan, if there is one.
        inputs: What the run reads.

    Raises:
        ValueError: If there is another run, or one that was not asked to be resumed.
    """
    is_begun = (folder / PLAN_NAME).is_file() and kind_of(folder) in ("run", None)
    if resume and is_begun:
        there = _read_plan(folder)
        if there != plan:
            ours, theirs = plan.to_dict(), there.to_dict()
            changed = [name for name in ours if ours[name] != theirs[name]]
            raise ValueError(
                f"{folder} was started with another {', '.join(changed)}; resume it with the same "
                "settings, or choose another --out."
            )
        return
    if is_begun and not (folder / METRICS_NAME).is_file() and not overwrite:
        raise ValueError(f"{folder} holds an unfinished run. Pass --resume or --overwrite.")
    with new_folder(folder, "run", overwrite=overwrite, inputs=inputs) as partial:
        write_json(partial / PLAN_NAME, plan.to_dict())


def finish_run(folder: Path, stack: EstimatorStack, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write what a run gave; the metrics come last and mark it as finished.

    Returns:
        The metrics, with the digest of the estimators' file.
    """
    write_tensors(folder / TENSORS_NAME, stack.to_tensors())
    metrics = metrics | {"tensors_sha256": sha256_of(folder / TENSORS_NAME)}
    write_json(folder / METRICS_NAME, metrics)
    return metrics


def load_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If it is unfinished or damaged; the message names the file.
    """
    if not (folder / PLAN_NAME).is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no {PLAN_NAME}.")
    if not (folder / METRICS_NAME).is_file():
        raise ValueError(f"{folder} is unfinished. Run train-estimator with --resume first.")
    plan = _read_plan(folder)
    metrics = read_metrics(folder)
    path, num_layers = folder / TENSORS_NAME, len(plan.spec.target_layers)
    if len(metrics["estimator"]["per_layer"]["recall_at_k"]) != num_layers:
        raise ValueError(f"{folder / METRICS_NAME} is damaged (not of {num_layers} layers).")
    require_digest(path, metrics["tensors_sha256"], REMEDY)
    tensors = read_tensors(path)
    require_finite(tensors, path, REMEDY)
    stack = EstimatorStack.from_tensors(
        plan.geometry,
        plan.spec,
        tensors,
        norm_kind=plan.norm_kind,
        norm_eps=plan.norm_eps,
    )
    return FinishedRun(plan=plan, stack=stack.eval(), metrics=metrics)


def read_metrics(folder: Path) -> dict[str, Any]:
    """What a finished run measured, as it is in its file; `RunMetrics` says what is always there.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged; names file and field.
    """
    path = folder / METRICS_NAME
    known, content = read_checked(path, RunMetrics, REMEDY)
    num_layers, budgets = len(known["layers"]), set(map(str, known["budgets"]))
    for figures in (known["estimator"], *known["baselines"].values()):
        by_budget, by_layer = figures["recall_at_budgets"], figures["per_layer"]
        lists = [by_layer[name] for name in ("recall_at_k", "gate_mass_recall", "exact_set")]
        lists += by_layer["recall_at_budgets"].values()
        if not num_layers or {len(values) for values in lists} != {num_layers}:
            raise ValueError(f"{path} is damaged (not of {num_layers} layers). {REMEDY}")
        if not budgets <= by_budget.keys() & by_layer["recall_at_budgets"].keys():
            raise ValueError(f"{path} is damaged (a budget is missing). {REMEDY}")
    return content


def _read_plan(folder: Path) -> RunPlan:
    return read_versioned(folder / PLAN_NAME, FORMAT_VERSION, RunPlan, REMEDY)
