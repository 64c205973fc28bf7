"""Writes a report's folder: one HTML page, its pictures, and the numbers as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from foreroute.data.adapters import resolve_device
from foreroute.estimators.artifacts import write_json
from foreroute.estimators.output import COMMAND_FILE, new_folder
from foreroute.export.bundle import load_bundle
from foreroute.export.export import load_comparable, traces_of
from foreroute.export.report.gather import gather
from foreroute.export.report.learning_curve import fit_curve
from foreroute.export.report.page import render
from foreroute.export.report.plots import draw
from foreroute.train.run import DeviceChoice

PAGE_NAME = "index.html"
NUMBERS_NAME = "report.json"


def write_report(
    run: Path,
    out: Path,
    *,
    also: Sequence[Path] = (),
    bundle: Path | None = None,
    learning_curve: bool = False,
    traces_path: Path | None = None,
    device: DeviceChoice = "auto",
    overwrite: bool = False,
) -> Path:
    """Measure runs beside the baselines, and write what came out.

    Args:
        run: Folder that `train-estimator` finished.
        out: The report's folder; appears only when it is whole.
        also: Further runs on the same traces, layers and horizon.
        bundle: Exported from them; its own probabilities are shown.
        learning_curve: Whether to fit on parts of the training tokens too.
        traces_path: The traces the runs were trained on, if they have moved.
        device: Where to predict and fit.
        overwrite: Replace a folder that is there already.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If a run, its traces or the bundle are missing.
        ValueError: If something is damaged, or does not belong together.
    """
    chosen = resolve_device(device)
    inputs = (run, *also, bundle, traces_path)
    with new_folder(out, "report", overwrite=overwrite, inputs=inputs) as partial:
        command = (partial / COMMAND_FILE).read_text()
        runs = load_comparable([run, *also])
        first = runs[run.name]
        traces = traces_of(first, traces_path)
        loaded = None if bundle is None else load_bundle(bundle)
        measured = gather(runs, traces, chosen, loaded)
        curve = fit_curve(first.plan, traces, chosen) if learning_curve else []
        captions = draw(measured, curve, partial)
        (partial / PAGE_NAME).write_text(render(measured, curve, captions, partial, command))
        points = [dataclasses.asdict(point) for point in curve]
        write_json(
            partial / NUMBERS_NAME, dataclasses.asdict(measured) | {"learning_curve": points}
        )
    return out / PAGE_NAME
