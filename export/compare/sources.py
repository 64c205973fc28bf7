"""Finds the true routing that predictions are scored on, in whatever folder holds it."""

from __future__ import annotations

from pathlib import Path

from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.traces import Traces
from foreroute.export.compare.plan import PLAN_NAME, TRUTH_FOLDER
from foreroute.export.compare.published import CARD_NAME, read_published
from foreroute.export.compare.truth import TrueRouting


def find_truth(folder: Path) -> TrueRouting:
    """The routing of a published trace set's test tokens, of all traces, or of a comparison.

    Raises:
        FileNotFoundError: If the folder is not there.
        ValueError: If it holds none of them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if (folder / MANIFEST_FILE).is_file():
        traces = Traces.open(folder)
        return TrueRouting.of_traces(traces, range(traces.num_sequences))
    if (folder / PLAN_NAME).is_file():
        return TrueRouting.load(folder / TRUTH_FOLDER / "0.safetensors")
    if (folder / CARD_NAME).is_file():
        return read_published(folder)
    raise ValueError(
        f"{folder} holds neither traces of collect-traces, nor a comparison of "
        "compare-predictors, nor a published trace set."
    )
