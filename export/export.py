"""Turns finished runs into a bundle, measured again from the files just written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.opening import open_traces
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import sha256_of
from foreroute.estimators.calibration import uncalibrated
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.output import new_folder
from foreroute.export.bundle import (
    Bundle,
    BundleManifest,
    PairEntry,
    load_bundle,
    save_bundle,
    save_manifest,
)
from foreroute.export.choose import Choice, choose
from foreroute.train.measure import Probabilities, judge, measure, predictor_of
from foreroute.train.run import FinishedRun, load_run
from foreroute.train.shards import PairedShards
from foreroute.train.split import split_held_out

RECALL_TOLERANCE = 1e-3
"""How far recall may be from the run's: another device rounds otherwise."""


def export_estimator(
    run: Path,
    out: Path,
    *,
    also: Sequence[Path] = (),
    costs: FetchCosts | None = None,
    traces_path: Path | None = None,
    overwrite: bool = False,
) -> BundleManifest:
    """Write a bundle: calibrated, each layer in the form that costs least on held-out tokens.

    The held-out sequences are split: the first half calibrates and chooses, the second half gives
    the figures in the manifest.

    Args:
        run: Folder that `train-estimator` finished.
        out: The bundle's folder; appears only when the bundle is whole and measured.
        also: Further runs, on the same traces, layers and horizon, to choose each layer from.
        costs: What a prefetch gains and loses; one copy each if None.
        traces_path: The traces the runs were trained on, if they have moved.
        overwrite: Replace a folder that is there already.

    Returns:
        The bundle's manifest.

    Raises:
        FileNotFoundError: If a run or its traces are missing.
        ValueError: If something is damaged, runs do not belong together, there are too few held-out
            sequences, or recall is not what a run says.
    """
    folders, traces_read = (run, *also), [traces_path] if traces_path else []
    with new_folder(out, "bundle", overwrite=overwrite, inputs=(*folders, *traces_read)) as partial:
        return _fill_bundle(partial, folders, costs or FetchCosts(), traces_path)


def _fill_bundle(
    partial: Path, folders: Sequence[Path], costs: FetchCosts, traces_path: Path | None
) -> BundleManifest:
    """Choose among the runs, and write and measure the bundle."""
    runs = load_comparable(folders)
    finished = next(iter(runs.values()))
    traces = traces_of(finished, traces_path)
    for name, other in runs.items():
        check_claims(other, traces, name)
    parts = split_held_out(finished.plan.split.held_out)
    choice = choose(runs, traces, parts, costs)
    save_bundle(
        partial,
        choice.stack,
        _entries(choice),
        num_held_out_tokens=0,
        provenance={
            "runs": {name: str(folder) for name, folder in zip(runs, folders, strict=True)},
            "traces": finished.plan.traces,
            "traces_sha256": finished.plan.traces_sha256,
            "num_train_tokens": finished.metrics["num_train_tokens"],
        },
        calibration=choice.calibration,
    )
    manifest = measure_bundle(load_bundle(partial), traces, parts.report)
    save_manifest(partial, manifest)
    return manifest


def traces_of(finished: FinishedRun, traces_path: Path | None) -> Traces:
    """Open the traces a run was trained on.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If they are others than the run's.
    """
    path = traces_path or Path(finished.plan.traces)
    try:
        traces = open_traces(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Say where the run's traces are with --traces.") from error
    if sha256_of(path / MANIFEST_FILE) != finished.plan.traces_sha256:
        raise ValueError(
            f"{path} does not hold the traces this run was trained on; its held-out tokens would "
            "be others. Point --traces to the run's own, or train again."
        )
    return traces


def load_comparable(folders: Sequence[Path]) -> dict[str, FinishedRun]:
    """Read finished runs whose layers can be exchanged, by folder name.

    Raises:
        FileNotFoundError: If a folder is not a run.
        ValueError: If one is damaged, named like another, or differs in traces, layers or horizon.
    """
    runs = {folder.name: load_run(folder) for folder in folders}
    if len(runs) < len(folders):
        raise ValueError(
            f"Expected runs of different names, got {', '.join(map(str, folders))}; rename one."
        )
    first = next(iter(runs.values()))
    for name, other in runs.items():
        require_comparable(first, other, name)
    return runs


def require_comparable(finished: FinishedRun, other: FinishedRun, name: str) -> None:
    """Refuse a run whose layers cannot be exchanged with the first run's.

    Raises:
        ValueError: If traces, horizon, layers or held-out sequences differ; names which.
    """
    ours, theirs = (
        {
            "traces": plan.traces_sha256,
            "horizon": plan.spec.horizon,
            "layers": plan.spec.target_layers,
            "held-out sequences": plan.split.held_out,
        }
        for plan in (finished.plan, other.plan)
    )
    changed = [what for what in ours if ours[what] != theirs[what]]
    if changed:
        raise ValueError(
            f"Run {name} has other {' and '.join(changed)} than the first run; only runs on the "
            "same ones can be compared. Train it again like the first, or leave it out."
        )


def check_claims(finished: FinishedRun, traces: Traces, name: str) -> None:
    """Measure a run as its files have it.

    Raises:
        ValueError: If its recall is not what its metrics say.
    """
    plan, stack = finished.plan, finished.stack
    held_out = PairedShards(traces, plan.spec, plan.split.held_out, cache_bytes=0)
    top_k = plan.geometry.top_k
    measured = measure({name: predictor_of(stack)}, held_out, plan.geometry, (top_k,))[name]
    claims = finished.metrics["estimator"]["per_layer"]["recall_at_k"]
    rows = zip(stack.target_layers, measured.recall_at_k, claims, strict=True)
    for layer, recall, claimed in rows:
        if abs(recall - claimed) > RECALL_TOLERANCE:
            raise ValueError(
                f"Run {name}, layer {layer}: the written files reach recall {recall:.4f} on the "
                f"held-out tokens, the run's metrics say {claimed:.4f}. Train again."
            )


def measure_bundle(bundle: Bundle, traces: Traces, sequences: range) -> BundleManifest:
    """Measure a bundle as loaded, on sequences that chose nothing.

    Returns:
        Its manifest with the pairs' figures.
    """
    stack, manifest = bundle.stack, bundle.manifest
    assert stack.calibration is not None
    assert manifest.calibration is not None
    geometry, spec = manifest.geometry, manifest.specs[0]
    held_out = PairedShards(
        traces, spec, sequences, source_fields=stack.input_fields, cache_bytes=0
    )
    predictors = {"chosen": predictor_of(stack)}
    if traces.anchors is not None:
        predictors["free"] = predictor_of(stack.with_trained([False] * len(manifest.pairs)))
    recalls = measure(predictors, held_out, geometry, (geometry.top_k,))
    free = recalls.get("free", recalls["chosen"])
    before_fit = functools.partial(uncalibrated, top_k=geometry.top_k)
    methods: dict[str, Probabilities] = {"before": before_fit, "after": stack.calibration}
    judged = judge(
        {"chosen": (predictors["chosen"], methods)}, held_out, geometry, manifest.calibration.costs
    )
    before, after = judged["chosen", "before"], judged["chosen", "after"]
    pairs = tuple(
        dataclasses.replace(
            pair,
            recall_at_k=recalls["chosen"].recall_at_k[at],
            training_free_recall_at_k=free.recall_at_k[at],
            expected_cost=after.expected_cost[at],
            calibration_error=after.calibration_error[at],
            uncalibrated_error=before.calibration_error[at],
        )
        for at, pair in enumerate(manifest.pairs)
    )
    return dataclasses.replace(manifest, pairs=pairs, num_held_out_tokens=held_out.num_tokens)


def _entries(choice: Choice) -> list[PairEntry]:
    """What is known about each pair before the written files are measured."""
    stack = choice.stack
    used = sorted({candidate.run_idx for candidate in choice.chosen})
    layers = zip(stack.source_layers, stack.target_layers, strict=True)
    return [
        PairEntry(
            source_layer=source,
            target_layer=target,
            form=candidate.form,
            recall_at_k=0.0,
            training_free_recall_at_k=0.0,
            budget=stack.geometry.top_k,
            stack=used.index(candidate.run_idx),
            compared=compared,
        )
        for (source, target), candidate, compared in zip(
            layers, choice.chosen, choice.compared, strict=True
        )
    ]
