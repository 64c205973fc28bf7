"""Reads a prepared model for one of several processes: this process' slice of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from foreroute.runtime.parallel import ExpertSlice, SlicedWriter
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout
from foreroute.runtime.store.prepared import READ_BYTES, PreparedModel, RowStream, read_shards
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
    encoded again.

    Args:
        prepared: The manifest.
        folder: Where it was found.
        store: Allocated for the slices, not filled.
        slices: By layer.
        tick: Called with the bytes that were kept.

    Raises:
        TooManyExceptions: If a slice of a parameter must be stored as it is.
        ValueError: If a file is missing or damaged; names it.
    """
    prepared.require_fits(
        folder, [part.layout for part in slices], [len(rows) for rows in store.rows]
    )
    readers = [
        partial(_read_layer, part, layout, rows, tick)
        for part, layout, rows in zip(slices, store.layouts, store.rows, strict=True)
    ]
    read_shards(prepared, folder, readers)


class _StoredWriter:
    """Writes what is stored as it is."""

    def __init__(self, layout: RowLayout, rows: Tensor) -> None:
        self._views = layout.views(rows)

    def put(self, name: str, expert_id: int, row: int, part: Tensor) -> None:
        """Write some rows of one expert's tensor."""
        self._views[name][expert_id][row : row + len(part)].copy_(part)


def _read_layer(
    part: ExpertSlice,
    layout: RowLayout,
    rows: Tensor,
    tick: Callable[[int], None],
    stream: RowStream,
) -> None:
    """A few whole experts at a time: what is this process' of them goes into its rows."""
    stored = SlicedWriter(_StoredWriter(layout, rows), part.stored)
    parameters = SlicedWriter(RowWriter(layout, rows), part.parameters)
    row_bytes = part.layout.row_bytes
    at_once = max(1, READ_BYTES // row_bytes)
    for begin in range(0, len(rows), at_once):
        some = torch.empty(min(at_once, len(rows) - begin), row_bytes, dtype=torch.uint8)
        if stream.read_into(some.numpy().data.cast("B")) < some.nbytes:
            return  # the file ends here, which its reader refuses
        _put(part, some, begin, stored, parameters)
        tick(len(some) * layout.row_bytes)


def _put(
    part: ExpertSlice, some: Tensor, begin: int, stored: SlicedWriter, parameters: SlicedWriter
) -> None:
    tensors = part.layout.views(some)
    for name, parameter in part.layout.encoded.items():
        if part.is_cut_as_stored(parameter):
            continue
        parts = {suffix: tensors.pop(name + suffix) for suffix in parameter.encoding.parts()}
        for number, weight in enumerate(parameter.decode(parts)):
            parameters.put(name, begin + number, 0, weight)
    for name, values in tensors.items():
        for number, value in enumerate(values):
            stored.put(name, begin + number, 0, value)
