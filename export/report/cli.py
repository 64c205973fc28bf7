"""The command `foreroute report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def report(
    run: Path,
    out: Path = Path("report"),
    also: str = "",
    bundle: Path | None = None,
    learning_curve: bool = False,
    traces: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
) -> None:
    """Write one page of pictures and tables about estimators, beside their baselines.

    Args:
        run: Folder that train-estimator finished.
        out: Folder of the page, its pictures and report.json, made new.
        also: Further runs on the same traces; a comma list.
        bundle: Folder that export-estimator wrote from them, or a Hub id.
        learning_curve: Fit on 1/16, 1/8, 1/4, 1/2 of the training tokens too (minutes).
        traces: Where the runs' traces lie now, if they have moved.
        device: Where to predict and fit: auto, cpu or cuda.
        overwrite: Replace the folder if it is there already.
    """
    from foreroute.export.report.report import write_report

    page = write_report(
        run,
        out,
        also=[Path(part.strip()) for part in also.split(",") if part.strip()],
        bundle=bundle,
        learning_curve=learning_curve,
        traces_path=traces,
        device=device,
        overwrite=overwrite,
    )
    print(page)
