"""The folder of one training run: what was asked for, how far it came, what it gave."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foreroute.estimators import EstimatorSpec, EstimatorStack, MoEGeometry
from foreroute.estimators.artifacts import (
    read_json,
    read_tensors,
    require_free,
    write_command,
    write_json,
    write_tensors,
)
from foreroute.estimators.types import NormKind
from foreroute.train.losses import LossName
from foreroute.train.split import SequenceSplit

FORMAT_VERSION = 1
PLAN_NAME = "run.json"
METRICS_NAME = "metrics.json"
TENSORS_NAME = "estimators.safetensors"
CHECKPOINT_PATH = Path("checkpoints", "last.ckpt")

DeviceChoice = Literal["auto", "cpu", "cuda"]
InitName = Literal["ridge", "zero"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How the estimators are fitted."""

    epochs: int = 10
    """Passes over the training tokens."""
    batch_size: int = 2048
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
    seed: int = 0
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reverses it."""
        return dataclasses.asdict(self) | {
            "format_version": FORMAT_VERSION,
            "geometry": self.geometry.to_dict(),
            "spec": self.spec.to_dict(),
            "split": self.split.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunPlan:
        """Rebuild from `to_dict`'s output."""
        parts = {
            "geometry": MoEGeometry.from_dict(values["geometry"]),
            "spec": EstimatorSpec.from_dict(values["spec"]),
            "split": SequenceSplit.from_dict(values["split"]),
            "config": FitConfig(**values["config"]),
        }
        rest = {name: value for name, value in values.items() if name != "format_version"}
        return cls(**(rest | parts))


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run left behind."""

    plan: RunPlan
    stack: EstimatorStack
    metrics: dict[str, Any]
    """As in metrics.json."""


def open_run(folder: Path, plan: RunPlan, *, overwrite: bool, resume: bool) -> None:
    """Start a run's folder, or check that the one there belongs to the same plan.

    Raises:
        ValueError: If there is another run, or one that was not asked to be resumed.
    """
    if resume and (folder / PLAN_NAME).is_file():
        there = _read_plan(folder)
        if there != plan:
            ours, theirs = plan.to_dict(), there.to_dict()
            changed = [name for name in ours if ours[name] != theirs[name]]
            raise ValueError(
                f"{folder} was started with another {', '.join(changed)}; resume it with the same "
                "settings, or choose another --out."
            )
        return
    if (folder / PLAN_NAME).is_file() and not (folder / METRICS_NAME).is_file() and not overwrite:
        raise ValueError(f"{folder} holds an unfinished run. Pass --resume or --overwrite.")
    require_free(folder, overwrite=overwrite)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_command(folder)
    write_json(folder / PLAN_NAME, plan.to_dict())


def finish_run(folder: Path, stack: EstimatorStack, metrics: dict[str, Any]) -> None:
    """Write what a run gave; the metrics come last and mark it as finished."""
    write_tensors(folder / TENSORS_NAME, stack.to_tensors())
    write_json(folder / METRICS_NAME, metrics)


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
    stack = EstimatorStack.from_tensors(
        plan.geometry,
        plan.spec,
        read_tensors(folder / TENSORS_NAME),
        norm_kind=plan.norm_kind,
        norm_eps=plan.norm_eps,
    )
    return FinishedRun(plan=plan, stack=stack.eval(), metrics=read_json(folder / METRICS_NAME))


def _read_plan(folder: Path) -> RunPlan:
    path = folder / PLAN_NAME
    values = read_json(path)
    try:
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {values['format_version']}")
        return RunPlan.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or too old ({error!r}). Train again.") from error
