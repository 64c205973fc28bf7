"""Turns a finished run into a bundle, measured again from the files just written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.traces import Traces
from foreroute.estimators import TRAINING_FREE_FORM
from foreroute.estimators.artifacts import new_folder, require_free, sha256_of, write_command
from foreroute.export.bundle import (
    Bundle,
    BundleManifest,
    PairEntry,
    load_bundle,
    save_bundle,
    save_manifest,
)
from foreroute.train.measure import measure, predictor_of
from foreroute.train.run import FinishedRun, load_run
from foreroute.train.shards import PairedShards

RECALL_TOLERANCE = 1e-3
"""How far recall may be from the run's: another device rounds otherwise."""


def export_estimator(
    run: Path, out: Path, *, traces_path: Path | None = None, overwrite: bool = False
) -> BundleManifest:
    """Write a bundle; layers where training did not pay are exported as training-free.

    Args:
        run: Folder that `train-estimator` finished.
        out: The bundle's folder; appears only when the bundle is whole and measured.
        traces_path: The traces the run was trained on, if they have moved.
        overwrite: Replace a folder that is there already.

    Returns:
        The bundle's manifest.

    Raises:
        FileNotFoundError: If the run or its traces are missing.
        ValueError: If something is damaged, or recall is not what the run says.
    """
    require_free(out, overwrite=overwrite)
    finished = load_run(run)
    traces = open_traces(finished, traces_path)
    with new_folder(out, overwrite=overwrite) as partial:
        save_bundle(
            partial,
            finished.stack,
            claimed_pairs(finished),
            num_held_out_tokens=finished.metrics["num_held_out_tokens"],
            provenance={
                "run": str(run),
                "traces": finished.plan.traces,
                "traces_sha256": finished.plan.traces_sha256,
                "num_train_tokens": finished.metrics["num_train_tokens"],
            },
        )
        bundle = load_bundle(partial)
        manifest = dataclasses.replace(
            bundle.manifest, pairs=measured_pairs(bundle, finished, traces)
        )
        save_manifest(partial, manifest)
        write_command(partial)
    return manifest


def open_traces(finished: FinishedRun, traces_path: Path | None) -> Traces:
    """Open the traces a run was trained on.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If they are others than the run's.
    """
    path = traces_path or Path(finished.plan.traces)
    try:
        traces = Traces.open(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Say where the run's traces are with --traces.") from error
    if sha256_of(path / MANIFEST_FILE) != finished.plan.traces_sha256:
        raise ValueError(
            f"{path} does not hold the traces this run was trained on; its held-out tokens would "
            "be others. Point --traces to the run's own, or train again."
        )
    return traces


def claimed_pairs(finished: FinishedRun) -> list[PairEntry]:
    """What the run's metrics say about each pair, all of them in the trained form."""
    top_k = finished.plan.geometry.top_k
    recall = finished.metrics["estimator"]["per_layer"]["recall_at_k"]
    layers = zip(finished.stack.source_layers, finished.stack.target_layers, recall, strict=True)
    return [
        PairEntry(
            source_layer=source,
            target_layer=target,
            form=finished.plan.spec.form,
            recall_at_k=claimed,
            training_free_recall_at_k=0.0,
            budget=top_k,
        )
        for source, target, claimed in layers
    ]


def measured_pairs(bundle: Bundle, finished: FinishedRun, traces: Traces) -> tuple[PairEntry, ...]:
    """Measure a bundle as loaded, and choose each pair's form.

    Raises:
        ValueError: If its recall is not what the run's metrics say.
    """
    geometry, spec = bundle.manifest.geometry, bundle.manifest.spec
    free = bundle.stack.with_trained([False] * len(spec.target_layers))
    held_out = PairedShards(traces, spec, finished.plan.split.held_out, cache_bytes=0)
    predictors = {"trained": predictor_of(bundle.stack), "free": predictor_of(free)}
    measured = measure(predictors, held_out, geometry, (geometry.top_k,))
    trained_recall, free_recall = measured["trained"].recall_at_k, measured["free"].recall_at_k
    entries = zip(bundle.manifest.pairs, trained_recall, free_recall, strict=True)
    return tuple(_measured(claimed, trained, free) for claimed, trained, free in entries)


def _measured(claimed: PairEntry, trained: float, free: float) -> PairEntry:
    """One pair's entry after measuring; the trained form must be strictly better to be used."""
    if abs(trained - claimed.recall_at_k) > RECALL_TOLERANCE:
        raise ValueError(
            f"Layer {claimed.target_layer}: the written files reach recall {trained:.4f} on the "
            f"held-out tokens, the run's metrics say {claimed.recall_at_k:.4f}. Train again."
        )
    return dataclasses.replace(
        claimed,
        form=claimed.form if trained > free else TRAINING_FREE_FORM,
        recall_at_k=max(trained, free),
        training_free_recall_at_k=free,
    )
