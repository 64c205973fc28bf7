"""Checkpoints of an unfinished fit: whole or not there, and read only if nobody changed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from foreroute.estimators.artifacts import new_file, read_json, sha256_of, write_json

DIGESTS_NAME = "last.json"
REMEDY = "Remove the folder it lies in, to start the fit again from its beginning."


class Digests(TypedDict):
    """Hex sha256 of the checkpoints that may lie there."""

    sha256: list[str]
    """The digests of the last one, and of the one before: a kill may come between."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint beside its place, on the same disk, and renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, and beside it its digest."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as partial:
            torch.save(checkpoint, partial)
            before = [sha256_of(place)] if place.is_file() else []
            digests = {"sha256": [sha256_of(partial), *before]}
            write_json(place.with_name(DIGESTS_NAME), digests)


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not as it was written; it stays where it is.

    Raises:
        ValueError: If it is not; names it, and says what to do.
    """
    path = checkpoint.with_name(DIGESTS_NAME)
    known = read_json(path, Digests, REMEDY)["sha256"] if path.is_file() else []
    if sha256_of(checkpoint) not in known:
        raise ValueError(f"{checkpoint} is damaged (not as it was written). {REMEDY}")
