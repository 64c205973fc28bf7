"""Measures everything a report shows, on held-out sequences that chose and calibrated nothing."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from foreroute.data.traces import Traces
from foreroute.estimators import (
    EstimatorStack,
    MoEGeometry,
    RecallMeter,
    RecallMetrics,
    default_budgets,
)
from foreroute.estimators.calibration import uncalibrated
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.metrics import RecallIntervals
from foreroute.export.bundle import Bundle
from foreroute.train.baselines import baseline_fields, build_baselines
from foreroute.train.fit import train_default_vectors
from foreroute.train.measure import (
    Judgement,
    Predictor,
    Probabilities,
    count,
    count_margins,
    judge,
    predictor_of,
)
from foreroute.train.run import FinishedRun
from foreroute.train.shards import PairedShards
from foreroute.train.split import split_held_out

Kind = Literal["form", "baseline", "floor"]
BUNDLE_NAME = "bundle"
DEFAULT_METHOD = "isotonic"
TIMED_CALLS = 30
WARM_UP_CALLS = 5


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Probabilities of one predictor, before and after they were fitted."""

    before: Judgement
    """How well the sigmoid of the decision margin does."""
    after: Judgement
    """How well the fitted probabilities do."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One predictor on the report's tokens."""

    name: str
    """As the legends have it."""
    kind: Kind
    """Trained or exported, baseline, or the random floor."""
    metrics: RecallMetrics
    """Per layer."""
    intervals: RecallIntervals | None = None
    """95 % of the means over layers, by resampling sequences; None with one sequence."""
    reliability: Reliability | None = None
    """Known for trained forms and bundles."""
    num_parameters: int | None = None
    """Trained, all layers together."""
    us_per_prediction: float | None = None
    """Microseconds for one token and one layer, called from Python."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything a report shows but its learning curve."""

    title: str
    """The model and the runs."""
    layers: tuple[int, ...]
    """Decoder layer index of each predicted layer."""
    top_k: int
    """K."""
    num_tokens: int
    """That everything is measured on."""
    num_sequences: int
    """Sequences that those tokens are from."""
    device: str
    """Where predictions were timed."""
    rows: tuple[Row, ...]
    """Forms, then baselines, then the floor."""


def gather(
    runs: Mapping[str, FinishedRun],
    traces: Traces,
    device: torch.device,
    bundle: Bundle | None = None,
) -> Measured:
    """Measure runs, a bundle and all baselines on one set of tokens.

    Args:
        runs: By folder name; of the same traces, horizon and layers.
        traces: What they were trained on.
        device: Where to predict.
        bundle: Exported from them.

    Raises:
        ValueError: If there are too few held-out sequences, or the bundle predicts other layers.
    """
    plan = next(iter(runs.values())).plan
    geometry, spec, parts = traces.geometry, plan.spec, split_held_out(plan.split.held_out)
    stacks = named_stacks(runs)
    if bundle is not None:
        require_same_layers(bundle, geometry, spec.target_layers)
        stacks[BUNDLE_NAME] = bundle.stack
    for stack in stacks.values():
        stack.to(device)
    others = _baselines(runs, traces, device)
    fields = dict.fromkeys(name for stack in stacks.values() for name in stack.input_fields)
    fields |= dict.fromkeys(baseline_fields(spec))
    to_fit, to_report = (
        PairedShards(traces, spec, sequences, source_fields=tuple(fields), cache_bytes=0)
        for sequences in (range(parts.calibrate.start, parts.choose.stop), parts.report)
    )
    budgets = default_budgets(geometry.top_k, geometry.num_experts)
    forms = {name: predictor_of(stack) for name, stack in stacks.items()}
    meters = count({**forms, **others}, to_report, geometry, budgets, device)
    judged = _judge(stacks, to_fit, to_report, geometry, device)
    rows = [
        Row(
            name=name,
            kind="form",
            metrics=meters[name].compute(),
            intervals=_intervals(meters[name]),
            reliability=judged[name],
            num_parameters=count_parameters(stack),
            us_per_prediction=time_prediction(stack, device),
        )
        for name, stack in stacks.items()
    ]
    rows += [
        Row(
            name=name,
            kind="baseline",
            metrics=meters[name].compute(),
            intervals=_intervals(meters[name]),
        )
        for name in others
    ]
    floor = RecallMetrics.of_chance(
        num_pairs=len(spec.target_layers),
        top_k=geometry.top_k,
        num_experts=geometry.num_experts,
        budgets=budgets,
    )
    rows.append(Row(name="random", kind="floor", metrics=floor))
    return Measured(
        title=f"{geometry.describe()}: {', '.join(runs)}",
        layers=spec.target_layers,
        top_k=geometry.top_k,
        num_tokens=to_report.num_tokens,
        num_sequences=len(parts.report),
        device=_name_of(device),
        rows=tuple(rows),
    )


def require_same_layers(bundle: Bundle, geometry: MoEGeometry, layers: tuple[int, ...]) -> None:
    """Refuse a bundle that does not predict what the runs do.

    Raises:
        ValueError: If it is of another model, or predicts other layers.
    """
    bundle.require_fits(geometry)
    if bundle.stack.target_layers != layers:
        raise ValueError(
            f"The bundle predicts layers {list(bundle.stack.target_layers)}, the run "
            f"{list(layers)}; export the bundle from this run."
        )


def _judge(
    stacks: Mapping[str, EstimatorStack],
    to_fit: PairedShards,
    to_report: PairedShards,
    geometry: MoEGeometry,
    device: torch.device,
) -> dict[str, Reliability]:
    """Probabilities before and after: a stack's own calibration, or one fitted here."""
    forms = {name: predictor_of(stack) for name, stack in stacks.items()}
    margins = count_margins(forms, to_fit, geometry, device)
    before = functools.partial(uncalibrated, top_k=geometry.top_k)
    named: dict[str, tuple[Predictor, dict[str, Probabilities]]] = {}
    for name, stack in stacks.items():
        after = stack.calibration or margins[name].fit(DEFAULT_METHOD)
        named[name] = forms[name], {"before": before, "after": after}
    judged = judge(named, to_report, geometry, FetchCosts(), device)
    return {
        name: Reliability(before=judged[name, "before"], after=judged[name, "after"])
        for name in stacks
    }


def _intervals(meter: RecallMeter) -> RecallIntervals | None:
    return meter.intervals() if meter.num_sequences > 1 else None


def named_stacks(runs: Mapping[str, FinishedRun]) -> dict[str, EstimatorStack]:
    """The runs' estimators by form and input, with the run's name where that is not enough."""
    labels = {
        name: f"{finished.plan.spec.form}, {finished.plan.spec.input_kind}"
        for name, finished in runs.items()
    }
    taken = list(labels.values())
    return {
        label if taken.count(label) == 1 else f"{label} ({name})": runs[name].stack
        for name, label in labels.items()
    }


def _baselines(
    runs: Mapping[str, FinishedRun], traces: Traces, device: torch.device
) -> dict[str, Predictor]:
    """The first run's baselines, and the next router on what other runs read."""
    plan = next(iter(runs.values())).plan
    vectors = train_default_vectors(traces, plan)
    baselines = build_baselines(traces, plan.spec, plan.split, vectors, device)
    for finished in runs.values():
        stack, spec = finished.stack, finished.plan.spec
        is_known = spec.input_kind in baselines or spec.input_kind == "router-input"
        if not is_known and spec.input_kind != "residual" and traces.anchors is not None:
            free = stack.with_trained([False] * len(spec.target_layers))
            baselines[spec.input_kind] = predictor_of(free)
        if spec.form == "ridge" and spec.input_kind == plan.spec.input_kind:
            baselines.pop("ridge", None)  # it is among the forms
    return baselines


def count_parameters(stack: EstimatorStack) -> int:
    """Trained parameters of the pairs that use them, all layers together."""
    num_pairs = len(stack.target_layers)
    sizes = [sum(p.numel() for p in part.form.parameters()) / num_pairs for part in stack.parts]
    used = zip(stack.part_of_pairs, stack.is_trained, strict=True)
    return round(sum(sizes[part] for part, is_trained in used if is_trained))


def time_prediction(stack: EstimatorStack, device: torch.device) -> float:
    """Microseconds that one token's prediction for one layer takes, called from Python.

    Args:
        stack: On that device.
        device: Where it predicts.

    Returns:
        Median over layers and repeats.
    """
    with torch.inference_mode():
        return float(torch.tensor(list(_timed(stack, device))).median())


def _timed(stack: EstimatorStack, device: torch.device) -> Iterator[float]:
    geometry = stack.geometry
    chosen = torch.arange(geometry.top_k, device=device).unsqueeze(0)
    state = {
        name: torch.randn(1, geometry.hidden_size, device=device) for name in stack.input_fields
    }
    if "expert_ids" in state:
        state |= {"expert_ids": chosen, "gate_weights": torch.rand(chosen.shape, device=device)}
    for repeat in range(WARM_UP_CALLS + TIMED_CALLS):
        for source in stack.source_layers:
            start = time.perf_counter()
            stack.predict(source, **state)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= WARM_UP_CALLS:
                yield (time.perf_counter() - start) * 1e6


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
