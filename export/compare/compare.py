"""Compares predictors of one model: records, fits, measures, and writes a row for each."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from foreroute.estimators import TRAINING_FREE_FORM, EstimatorStack
from foreroute.estimators.artifacts import device_name, package_versions, read_json, write_json
from foreroute.export.compare.cells import Cell, catalogue
from foreroute.export.compare.plan import (
    PREDICTIONS_FOLDER,
    ROWS_FOLDER,
    TRUTH_FOLDER,
    ComparisonPlan,
)
from foreroute.export.compare.predicted import PredictedExperts
from foreroute.export.compare.prediction_time import layer_by_layer_us, prediction_us
from foreroute.export.compare.recording import record
from foreroute.export.compare.rows import read_rows
from foreroute.export.compare.score import score
from foreroute.export.compare.study import Group, Outcome, Study
from foreroute.export.compare.truth import TrueRouting

Say = Callable[[str], None]
CELLS_NAME = "cells.json"


class _Cells(TypedDict):
    slugs: list[str]


class Comparison:
    """A comparison's folder: which rows are there, and which are left to make."""

    def __init__(
        self, plan: ComparisonPlan, folder: Path, device: torch.device, say: Say = print
    ) -> None:
        """Look at what is there.

        Args:
            plan: What to do.
            folder: As `open_comparison` left it.
            device: Where to compute.
            say: Told of each step, one line.
        """
        self.plan, self.folder, self.device, self._say = plan, folder, device, say
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was opened."""
        return time.monotonic() - self._start

    def has(self, slug: str) -> bool:
        """Whether a row is there."""
        return (self.folder / ROWS_FOLDER / f"{slug}.json").is_file()

    def rows(self) -> list[dict[str, Any]]:
        """All rows that are there."""
        paths = sorted((self.folder / ROWS_FOLDER).glob("*.json"))
        return [row for path in paths for row in self.rows_of(path.stem)]

    def rows_of(self, slug: str) -> list[dict[str, Any]]:
        """The rows of one predictor, which are there."""
        texts = (self.plan.dataset, *self.plan.other_datasets)
        return read_rows(self.folder / ROWS_FOLDER / f"{slug}.json", texts)

    def measure(self, minutes: float) -> int:
        """Record, fit and measure what is missing, as long as there is time.

        Args:
            minutes: Nothing is begun after so many.

        Returns:
            How many predictors are left for another call.
        """
        listed = self._listed()
        missing = [slug for slug in listed if not self.has(slug)]
        if listed and (not missing or minutes <= 0):
            return len(missing)
        traces, tests = record(self.plan, self.folder, self.device)
        self._say(f"[{self.seconds:.0f} s] {traces.num_tokens:,} tokens to train on")
        for place, test in enumerate(tests):
            path = self.folder / TRUTH_FOLDER / f"{place}.safetensors"
            if not path.is_file():
                sequences = range(test.traces.num_sequences)
                TrueRouting.of_traces(test.traces, sequences).save(path)
        study = Study(traces, tests, self.device)
        cells = catalogue(
            self.plan.scale,
            traces.geometry,
            traces.manifest.record,
            has_anchors=traces.anchors is not None,
        )
        forms, inputs = self.plan.forms, self.plan.inputs
        cells = [c for c in cells if not forms or c.form in forms]
        cells = [c for c in cells if not inputs or c.input_kind in inputs]
        write_json(self.folder / CELLS_NAME, {"slugs": [cell.slug for cell in cells]})
        left = 0
        for _, group in itertools.groupby(cells, key=_group_of):
            wanted = [cell for cell in group if not self.has(cell.slug)]
            if wanted and self.seconds < 60 * minutes:
                left += self._measure_group(study, wanted, minutes)
            else:
                left += len(wanted)
        return left

    def _listed(self) -> list[str]:
        """Names of all predictors to compare, once it is known what the model allows."""
        path = self.folder / CELLS_NAME
        return read_json(path, _Cells, "Remove it.")["slugs"] if path.is_file() else []

    def _measure_group(self, study: Study, cells: Sequence[Cell], minutes: float) -> int:
        """Measure cells of one group; returns how many there was no time for."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the group before: what is kept depends on free memory
        group = Group(study, cells)
        self._say(
            f"[{self.seconds:.0f} s] {cells[0].input_kind}, horizon {cells[0].horizon}: ready"
        )
        self._measure_baselines(study, group, cells[0])
        for done, cell in enumerate(cells):
            if self.seconds >= 60 * minutes:
                return len(cells) - done
            self._keep(cell, group.measure(cell))
        return 0

    def _measure_baselines(self, study: Study, group: Group, cell: Cell) -> None:
        """What any predictor must beat, and two checks, with the groups that have their tokens."""
        is_default = (cell.input_kind, cell.horizon, cell.tokens_ahead) == ("quasi-hidden", 1, 0)
        found: dict[str, Callable[[], dict[str, PredictedExperts]]] = {}
        if is_default or cell.tokens_ahead:
            found["frequency"] = lambda: group.predict_by_frequency(cell)
            found["previous-token"] = lambda: group.predict_by_prior("previous-token", cell)
            found["decayed-frequency"] = lambda: group.predict_by_prior("decayed-frequency", cell)
        if is_default:
            linear = dataclasses.replace(cell, form="linear", loss="boundary", is_curve=False)
            found["linear, shuffled labels"] = lambda: group.predict_shuffled(linear)
        if is_default and study.traces.anchors is not None:
            free = dataclasses.replace(
                cell, form=TRAINING_FREE_FORM, input_kind="router-input", horizon=1
            )
            found["next-router, leaked future"] = lambda: study.predict_leaked(free)
        for name, predict in found.items():
            horizon = 0 if "leaked" in name else cell.horizon
            facts = {"form": name, "input": "none", "horizon": horizon}
            slug = f"{name.replace(', ', '-').replace(' ', '_')}-h{horizon}t{cell.tokens_ahead}"
            if not self.has(slug):
                facts |= {"tokens_ahead": cell.tokens_ahead, "prior": "none", "params": 0}
                self._write(slug, facts, predict())

    def _keep(self, cell: Cell, outcome: Outcome) -> None:
        """Score a cell's predictions and write its row."""
        stack = outcome.stack
        facts = {
            "form": cell.form,
            "input": cell.input_kind,
            "horizon": cell.horizon,
            "tokens_ahead": cell.tokens_ahead,
            "prior": cell.prior,
            "after": cell.after,
            "rank": cell.rank,
            "width": cell.width,
            "depth": cell.depth,
            "loss": cell.loss,
            "is_curve": cell.is_curve,
            "params": sum(p.numel() for p in stack.form.parameters()),
            "training_tokens": outcome.training_tokens,
            "fit_seconds": outcome.seconds,
            "us_per_token": None if cell.is_curve else round(prediction_us(stack), 1),
            "us_by_layer": None if cell.is_curve else round(by_layer_us(stack), 2),
            "chosen_cost_per_layer": [round(cost, 4) for cost in outcome.chosen_cost],
        }
        self._write(cell.slug, facts, outcome.predicted)

    def _write(
        self, slug: str, facts: dict[str, Any], predicted: Mapping[str, PredictedExperts]
    ) -> None:
        rows = []
        for place, (tested_on, said) in enumerate(predicted.items()):
            truth = TrueRouting.load(self.folder / TRUTH_FOLDER / f"{place}.safetensors")
            row = {"slug": slug, "model": self.plan.name, "trained_on": self.plan.dataset}
            row |= {"tested_on": tested_on, **facts, **score(truth, said)}
            row |= {"device": device_name(self.device), "torch": package_versions()["torch"]}
            rows.append(row)
        if not facts.get("is_curve"):
            next(iter(predicted.values())).save(self.predictions_path(slug))
        write_json(self.folder / ROWS_FOLDER / f"{slug}.json", {"rows": rows})
        first = rows[0]
        self._say(f"[{self.seconds:.0f} s]   {slug}: recall@K {first['recall_at_k']:.4f}")

    def predictions_path(self, slug: str) -> Path:
        """Where a predictor's predictions of the first text are."""
        return self.folder / PREDICTIONS_FOLDER / f"{slug}.safetensors"


def by_layer_us(stack: EstimatorStack) -> float:
    """Microseconds of one token's prediction at one layer, as decoding calls it."""
    return layer_by_layer_us(stack) / len(stack.target_layers)


def _group_of(cell: Cell) -> tuple[str, int, int]:
    return cell.input_kind, cell.horizon, cell.tokens_ahead
