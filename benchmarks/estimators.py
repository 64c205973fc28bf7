"""Compares every form, input and baseline on one set of held-out sequences.

    python benchmarks/estimators.py --traces traces/demo --model-name bundled
    python benchmarks/estimators.py --traces traces/code --traces-other traces/prose --device cuda

Needs traces of `collect-traces --record readout,layer-input` for all inputs; without, those that
read one are left out. Rows of the same model, form, input, horizon and texts are replaced in
benchmarks/results/estimators.json. Held-out sequences choose nothing: probabilities are fitted on
training sequences set aside for that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prediction_time import prediction_us
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import (
    FORMS,
    TRAINING_FREE_FORM,
    EstimatorSpec,
    EstimatorStack,
    InputKind,
    RecallMeter,
    default_budgets,
    predictable_layers,
)
from foreroute.estimators.artifacts import package_versions, read_json, write_json
from foreroute.estimators.calibration import expected_calibration_error, near_decision
from foreroute.train.baselines import (
    baseline_fields,
    build_stack,
    count_experts,
    frequency_predictor,
    previous_token_predictor,
)
from foreroute.train.calibrate import MarginHistogram
from foreroute.train.datamodule import BatchStream
from foreroute.train.fit import train_stack
from foreroute.train.measure import MEASURE_BATCH, Predictor, predictor_of
from foreroute.train.prepared import PreparedBatch, PreparedShards
from foreroute.train.quiet import quieten_lightning
from foreroute.train.ridge import set_to_ridge
from foreroute.train.run import FitConfig
from foreroute.train.shards import PairedShards, RoutingBatch
from foreroute.train.split import split_off_validation, split_sequences

RESULTS = Path(__file__).parent / "results" / "estimators.json"
KEY = ("model", "form", "input", "horizon", "trained_on", "tested_on")
CORE_FORMS = (TRAINING_FREE_FORM, "ridge", "low-rank")
"""Measured with every input and horizon; the others at horizon 1 (0 for pre-attention)."""
CURVE_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


class Cell(NamedTuple):
    """One row to measure, before it is."""

    form: str
    input_kind: InputKind
    horizon: int


@dataclass(frozen=True)
class ListedShards:
    """Prepared tokens in memory, as training reads them."""

    batches: tuple[PreparedBatch, ...]

    @property
    def rows(self) -> dict[int, slice]:
        """All rows of all shards."""
        return {i: slice(0, batch.num_tokens) for i, batch in enumerate(self.batches)}

    def read(self, shard_idx: int) -> PreparedBatch:
        """One shard."""
        return self.batches[shard_idx]

    def first(self, num_tokens: int) -> ListedShards:
        """The first tokens alone."""
        taken = []
        for batch in self.batches:
            if num_tokens > 0:
                taken.append(batch.select(slice(0, num_tokens)))
                num_tokens -= taken[-1].num_tokens
        return ListedShards(tuple(taken))

    def with_shuffled_labels(self) -> ListedShards:
        """The same states with the routing of other tokens."""
        generator = torch.Generator().manual_seed(0)
        shuffled = []
        for batch in self.batches:
            order = torch.randperm(batch.num_tokens, generator=generator)
            other = batch.select(order)
            shuffled.append(
                other._replace(features=batch.features, anchor_logits=batch.anchor_logits)
            )
        return ListedShards(tuple(shuffled))


class Study:
    """One model's traces, and rows of what each estimator reaches on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the traces and split them by sequence."""
        self.traces = Traces.open(options.traces)
        self.others = [Traces.open(path) for path in options.traces_other]
        for other in self.others:
            self.traces.geometry.require_match(
                other.geometry, what="Traces were", remedy="Give traces of one model."
            )
        self.names = options.texts or [t.manifest.dataset for t in (self.traces, *self.others)]
        if len(self.names) != 1 + len(self.others):
            raise ValueError(
                f"--texts: {1 + len(self.others)} names needed, {len(self.names)} given."
            )
        self.model = options.model_name or self.traces.geometry.model_name
        self.device = torch.device(options.device)
        self.config = FitConfig(
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            kept_gain=options.kept_gain,
        )
        self.split = split_sequences(self.traces.num_sequences)
        self.fitting, self.choosing = split_off_validation(self.split.train)
        self.vectors = self.traces.default_vectors()[0]
        self.rows: list[dict[str, Any]] = []
        geometry = self.traces.geometry
        self.budgets = default_budgets(geometry.top_k, geometry.num_experts)

    def cells(self, horizons: Iterable[int]) -> list[Cell]:
        """What to measure: every form with every input, core forms at more horizons."""
        recorded = self.traces.manifest.record
        inputs: list[InputKind] = ["router-input", "residual", "quasi-hidden"]
        cells = [Cell(form, kind, 1) for kind in inputs for form in FORMS]
        if "readout" in recorded:
            cells += [Cell(form, "attention-readout", 1) for form in FORMS]
        if "layer_input" in recorded:
            cells += [Cell(form, "pre-attention", 0) for form in FORMS]
        further = [h for h in horizons if h > 1]
        cells += [Cell(form, "quasi-hidden", h) for h in further for form in CORE_FORMS]
        return cells

    def spec(self, cell: Cell) -> EstimatorSpec:
        """Of all layers that the cell's horizon allows."""
        return EstimatorSpec(
            form=cell.form,
            input_kind=cell.input_kind,
            horizon=cell.horizon,
            target_layers=predictable_layers(self.traces.geometry, cell.horizon),
        )

    def stack(self, cell: Cell) -> EstimatorStack:
        """A fresh stack on the device."""
        torch.manual_seed(0)
        return build_stack(self.traces, self.spec(cell), self.vectors, self.device)

    def prepared(self, cell: Cell) -> tuple[ListedShards, ListedShards]:
        """Tokens to fit on and tokens to choose by, prepared for the cell's input."""
        stack = self.stack(cell._replace(form=TRAINING_FREE_FORM))
        parts = []
        for sequences in (self.fitting, self.choosing):
            shards = PairedShards(self.traces, stack.spec, sequences, cache_bytes=0)
            parts.append(ListedShards(tuple(PreparedShards(stack, shards, seed=0))))
        return parts[0], parts[1]

    def fit(self, stack: EstimatorStack, fitting: ListedShards, choosing: ListedShards) -> None:
        """Train a stack in place, as `train-estimator` does."""
        if stack.form.is_closed_form:
            set_to_ridge(stack, fitting.batches)
        elif list(stack.parameters()):
            with tempfile.TemporaryDirectory() as folder:
                train_stack(
                    stack, fitting, choosing, self.config, Path(folder), show_progress=False
                )

    @torch.no_grad()
    def calibrated(self, stack: EstimatorStack, choosing: ListedShards) -> Predictor:
        """Probabilities of a stack's predictions, fitted on the tokens to choose by."""
        histogram = MarginHistogram(stack.geometry.top_k)
        for tokens in choosing.batches:
            logits = stack.form(tokens.features.float(), tokens.anchor_logits)
            histogram.update(stack.ranking(logits), tokens.target_ids)
        calibration = histogram.fit("isotonic").to(self.device)
        predict = predictor_of(stack)
        return lambda batch: calibration(predict(batch))

    def measure_group(self, cells: list[Cell]) -> None:
        """Fit and measure cells of one input and horizon, which share prepared tokens."""
        start = time.monotonic()
        fitting, choosing = self.prepared(cells[0])
        stacks, probabilities = {}, {}
        for cell in cells:
            stacks[cell] = self.stack(cell)
            self.fit(stacks[cell], fitting, choosing)
            probabilities[cell] = self.calibrated(stacks[cell], choosing)
        for tested_on, traces, sequences in self.tests():
            predictors = {cell: predictor_of(stack) for cell, stack in stacks.items()}
            batches = read_batches(traces, self.spec(cells[0]), sequences, self.device)
            meters, errors = evaluate(predictors, probabilities, batches, self.budgets)
            for cell, stack in stacks.items():
                self.add(cell, tested_on, meters[cell], errors.get(cell), stack)
        kind, horizon = cells[0].input_kind, cells[0].horizon
        print(f"{kind}, horizon {horizon}: {time.monotonic() - start:.0f} s", flush=True)

    def measure_baselines(self, horizon: int = 1) -> None:
        """Frequency, previous token, and the two sanity checks."""
        geometry = self.traces.geometry
        cell = Cell(TRAINING_FREE_FORM, "router-input", horizon)
        spec = self.spec(cell)
        counts = count_experts(self.traces, spec, self.split.train).to(self.device)
        fitting, _ = self.prepared(cell._replace(input_kind="quasi-hidden"))
        shuffled = self.stack(Cell("linear", "quasi-hidden", horizon))
        self.fit(shuffled, fitting.with_shuffled_labels(), ListedShards(()))
        predictors: dict[Cell, Predictor] = {
            cell._replace(form="frequency"): frequency_predictor(counts),
            cell._replace(form="previous-token"): previous_token_predictor(counts),
            Cell("linear, shuffled labels", "quasi-hidden", horizon): predictor_of(shuffled),
        }
        for tested_on, traces, sequences in self.tests():
            batches = read_batches(traces, spec, sequences, self.device)
            meters, _ = evaluate(predictors, {}, batches, self.budgets)
            for key, meter in meters.items():
                self.add(key._replace(input_kind="none"), tested_on, meter, None, None)
        # The target layer's own router input, as if it were known ahead: must give recall 1.
        own = replace(spec, input_kind="pre-attention", horizon=0)
        shards = PairedShards(
            self.traces, own, self.split.held_out, source_fields=("router_input",), cache_bytes=0
        )
        leaked = {Cell("next-router, leaked future", "none", 0): predictor_of(self.stack(cell))}
        batches = (b.to(self.device) for b in BatchStream(shards, MEASURE_BATCH))
        meters, _ = evaluate(leaked, {}, batches, self.budgets)
        for key, meter in meters.items():
            self.add(key, self.names[0], meter, None, None)
        random = geometry.top_k / geometry.num_experts
        print(f"random floor: recall@{geometry.top_k} {random:.3f}", flush=True)

    def measure_learning_curve(self) -> list[dict[str, Any]]:
        """Recall of ridge and low-rank on quasi-hidden input by training tokens."""
        curve = []
        cells = [Cell(form, "quasi-hidden", 1) for form in ("ridge", "low-rank")]
        fitting, choosing = self.prepared(cells[0])
        total = sum(batch.num_tokens for batch in fitting.batches)
        for share in CURVE_SHARES:
            part = fitting.first(round(total * share))
            stacks = {cell: self.stack(cell) for cell in cells}
            for stack in stacks.values():
                self.fit(stack, part, choosing)
            predictors = {cell: predictor_of(stack) for cell, stack in stacks.items()}
            batches = read_batches(
                self.traces, self.spec(cells[0]), self.split.held_out, self.device
            )
            meters, _ = evaluate(predictors, {}, batches, self.budgets)
            for cell, meter in meters.items():
                curve.append(
                    {
                        "model": self.model,
                        "form": cell.form,
                        "input": cell.input_kind,
                        "train_tokens": round(total * share),
                        "recall_at_k": round(mean(meter.compute().recall_at_k), 4),
                    }
                )
        return curve

    def tests(self) -> Iterator[tuple[str, Traces, range]]:
        """What to measure on: its name, its traces and the sequences of them."""
        yield self.names[0], self.traces, self.split.held_out
        for name, other in zip(self.names[1:], self.others, strict=True):
            yield name, other, range(other.num_sequences)

    def add(
        self,
        cell: Cell,
        tested_on: str,
        meter: RecallMeter,
        ece: float | None,
        stack: EstimatorStack | None,
    ) -> None:
        """Keep a row."""
        metrics, intervals = meter.compute(), meter.intervals()
        half = self.budgets[1]
        params = 0 if stack is None else sum(p.numel() for p in stack.form.parameters())
        self.rows.append(
            {
                "model": self.model,
                "form": cell.form,
                "input": cell.input_kind,
                "horizon": cell.horizon,
                "trained_on": self.names[0],
                "tested_on": tested_on,
                "recall_at_k": round(mean(metrics.recall_at_k), 4),
                "recall_at_k_ci": rounded(intervals.recall_at_k),
                "recall_at_1_5k": round(mean(metrics.recall_at_budgets[half]), 4),
                "recall_at_1_5k_ci": rounded(intervals.recall_at_budgets[half]),
                "gate_mass_recall": round(mean(metrics.gate_mass_recall), 4),
                "gate_mass_recall_ci": rounded(intervals.gate_mass_recall),
                "exact_set": round(mean(metrics.exact_set), 4),
                "exact_set_ci": rounded(intervals.exact_set),
                "ece": None if ece is None else round(ece, 4),
                "params": params,
                "us_per_token": None if stack is None else round(prediction_us(stack), 1),
                "recall_per_layer": [round(value, 4) for value in metrics.recall_at_k],
                "held_out_tokens": meter.num_tokens,
            }
        )


def read_batches(
    traces: Traces, spec: EstimatorSpec, sequences: range, device: torch.device
) -> Iterator[RoutingBatch]:
    """Held-out batches on the device, with what the spec's input and the baselines read."""
    fields = baseline_fields(spec)
    shards = PairedShards(traces, spec, sequences, source_fields=fields, cache_bytes=0)
    return (batch.to(device) for batch in BatchStream(shards, MEASURE_BATCH))


@torch.inference_mode()
def evaluate(
    predictors: dict[Cell, Predictor],
    probabilities: dict[Cell, Predictor],
    batches: Iterable[RoutingBatch],
    budgets: tuple[int, ...],
) -> tuple[dict[Cell, RecallMeter], dict[Cell, float]]:
    """Recall of all predictors, and the calibration error of those with probabilities."""
    meters: dict[Cell, RecallMeter] = {}
    near: dict[Cell, list[tuple[Tensor, Tensor]]] = {cell: [] for cell in probabilities}
    for batch in batches:
        num_pairs, _, top_k = batch.target_ids.shape
        for cell, predict in predictors.items():
            scores = predict(batch)
            meter = meters.setdefault(cell, RecallMeter(num_pairs, top_k, budgets))
            meter.update(scores, batch.target_ids, batch.target_gate_weights, batch.starts)
            if cell in probabilities:
                chance = probabilities[cell](batch)
                near[cell].append(near_decision(chance, batch.target_ids, scores, top_k))
    errors = {}
    for cell, found in near.items():
        chances, is_true = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        errors[cell] = float(expected_calibration_error(chances, is_true).mean())
    return meters, errors


def mean(values: list[float]) -> float:
    """Over layers."""
    return sum(values) / len(values)


def rounded(interval: tuple[float, float]) -> list[float]:
    """JSON-ready ends of a confidence interval."""
    return [round(end, 4) for end in interval]


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per row."""
    print(
        f"{'form':24} {'input':17} {'h':>1} {'tested on':>14} {'recall@K':>8} {'95 % CI':>13} "
        f"{'@1.5K':>6} {'mass':>6} {'exact':>6} {'ECE':>6} {'params':>9} {'us':>7}"
    )
    for row in rows:
        low, high = row["recall_at_k_ci"]
        ece = "" if row["ece"] is None else f"{row['ece']:.4f}"
        time_us = "" if row["us_per_token"] is None else f"{row['us_per_token']:.0f}"
        print(
            f"{row['form']:24} {row['input']:17} {row['horizon']:>1} {row['tested_on'][-14:]:>14} "
            f"{row['recall_at_k']:>8.4f} {low:.4f}-{high:.4f} {row['recall_at_1_5k']:>6.4f} "
            f"{row['gate_mass_recall']:>6.4f} {row['exact_set']:>6.4f} {ece:>6} "
            f"{row['params']:>9,} {time_us:>7}"
        )


def save(path: Path, rows: list[dict[str, Any]], curve: list[dict[str, Any]], device: str) -> None:
    """Replace the rows of the same key in the results file, keep the others."""
    content = read_json(path, dict) if path.is_file() else {"rows": [], "learning_curve": []}
    new = {tuple(row[name] for name in KEY) for row in rows}
    kept = [row for row in content["rows"] if tuple(row[name] for name in KEY) not in new]
    models = {row["model"] for row in curve}
    kept_curve = [row for row in content["learning_curve"] if row["model"] not in models]
    stamp = {"device": device, "torch": package_versions()["torch"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "rows": kept + [row | stamp for row in rows],
            "learning_curve": kept_curve + curve,
        },
    )


def parse_options() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument(
        "--traces-other", type=Path, nargs="*", default=[], help="text of another kind, to test on"
    )
    parser.add_argument(
        "--texts", nargs="*", default=[], help="what to call each text; as the traces do if none"
    )
    parser.add_argument("--model-name", default="")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--kept-gain", type=float, default=FitConfig.kept_gain)
    parser.add_argument("--horizons", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--inputs", nargs="*", default=[], help="all that are recorded if none")
    parser.add_argument("--no-curve", action="store_true", help="leave out the learning curve")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure everything, print one table, write the results."""
    options = parse_options()
    quieten_lightning()
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    study = Study(options)
    groups: dict[tuple[InputKind, int], list[Cell]] = {}
    for cell in study.cells(options.horizons):
        if cell.form in options.forms and cell.input_kind in (options.inputs or [cell.input_kind]):
            groups.setdefault((cell.input_kind, cell.horizon), []).append(cell)
    study.measure_baselines()
    for cells in groups.values():
        study.measure_group(cells)
    curve = [] if options.no_curve else study.measure_learning_curve()
    print_table(study.rows)
    for point in curve:
        print(f"{point['form']:10} {point['train_tokens']:>9,} tokens {point['recall_at_k']:.4f}")
    save(options.json, study.rows, curve, device_name(study.device))
    print(f"{time.monotonic() - start:.0f} s")
    print(options.json)


def device_name(device: torch.device) -> str:
    """As the results name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
