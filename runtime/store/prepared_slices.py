"""Reads a prepared model for one of several processes: this process' slice of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from foreroute.estimators.artifacts import require_digest
from foreroute.runtime.parallel import ExpertSlice, SlicedWriter
from foreroute.runtime.store.encodings import EncodedWeights
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout
from foreroute.runtime.store.prepared import REMEDY, PreparedModel
from foreroute.runtime.store.prepared_rows import read_layer
from foreroute.runtime.store.row_writer import RowWriter


def read_slices(
    prepared: PreparedModel,
    folder: Path,
    store: HostExpertStore,
    slices: Sequence[ExpertSlice],
    tick: Callable[[int], None],
) -> None:
    """Read this process' slices of all experts, each file checked against its sha256.

    What is stored rounded is cut as it is stored; what is stored without loss is decoded, cut and
    encoded again. One layer's whole rows are in memory at a time.

    Args:
        prepared: The manifest.
        folder: Where it was found.
        store: Allocated for the slices, not filled.
        slices: By layer.
        tick: Called with the bytes that were read.

    Raises:
        TooManyExceptions: If a slice of a parameter must be stored as it is.
        ValueError: If a file is missing or damaged; names it.
    """
    layouts = [part.layout for part in slices]
    prepared.require_fits(folder, layouts, [len(rows) for rows in store.rows])
    require_digest(folder / prepared.rest.file, prepared.rest.sha256, REMEDY)
    for number, (part, shard) in enumerate(zip(slices, prepared.shards, strict=True)):
        layout, rows = store.layouts[number], store.rows[number]
        whole = torch.empty(len(rows), part.layout.row_bytes, dtype=torch.uint8)
        read_layer(folder, shard, whole, tick)
        _put(part, whole, layout, rows)


class _StoredWriter:
    """Writes what is stored as it is."""

    def __init__(self, layout: RowLayout, rows: Tensor) -> None:
        self._views = layout.views(rows)

    def put(self, name: str, expert_id: int, row: int, part: Tensor) -> None:
        """Write some rows of one expert's tensor."""
        self._views[name][expert_id][row : row + len(part)].copy_(part)


def _put(part: ExpertSlice, whole: Tensor, layout: RowLayout, rows: Tensor) -> None:
    """Write this process' share of whole experts' rows into its rows."""
    stored = SlicedWriter(_StoredWriter(layout, rows), part.stored)
    parameters = SlicedWriter(RowWriter(layout, rows), part.parameters)
    tensors = part.layout.views(whole)
    for name, parameter in part.layout.encoded.items():
        if part.is_cut_as_stored(parameter):
            continue
        parts = {suffix: tensors.pop(name + suffix) for suffix in parameter.encoding.parts()}
        weights = EncodedWeights(parameter, parts)
        for expert_id in range(len(whole)):
            weight = weights[expert_id : expert_id + 1][0]
            parameters.put(name, expert_id, 0, weight)
    for name, values in tensors.items():
        for expert_id, value in enumerate(values):
            stored.put(name, expert_id, 0, value)
