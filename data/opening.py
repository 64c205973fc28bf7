"""Opens traces, whether they are stored or made while they are read."""

from __future__ import annotations

from pathlib import Path

from foreroute.data.live_traces import LiveTraces
from foreroute.data.manifest import read_manifest
from foreroute.data.traces import Traces


def open_traces(folder: Path) -> Traces:
    """Open a trace folder; live traces load the model that they are made of.

    Args:
        folder: What collect-traces wrote, or what lies beside a run that was trained live.

    Raises:
        FileNotFoundError: If there are no traces, or a shard is missing (names it), or what live
            traces are made of is gone.
        ValueError: If they are unfinished or damaged; names the file and what to do.
    """
    folder = Path(folder)
    return (LiveTraces if read_manifest(folder).live_sha256 else Traces).open(folder)
