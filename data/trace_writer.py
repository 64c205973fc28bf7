"""Writes traces: shards one after the other, each listed in the manifest once it lies whole."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from foreroute.data.batch import RecordedBatch
from foreroute.data.int8_rows import to_int8
from foreroute.data.layout import (
    DECODE,
    PREFILL,
    READOUT_VECTORS,
    SCALE_SUFFIX,
    STATE_FIELDS,
    SUM_TENSORS,
    Layout,
    anchor_shapes,
    layer_path,
    shard_layouts,
    tokens_path,
)
from foreroute.data.manifest import (
    ANCHORS_FILE,
    MANIFEST_FILE,
    READOUT_FILE,
    ShardEntry,
    StopReason,
    TraceManifest,
)
from foreroute.data.shard_file import ShardFile
from foreroute.estimators.artifacts import (
    PARTIAL_SUFFIX,
    is_finite,
    read_json,
    sha256_of,
    write_json,
    write_tensors,
)
from foreroute.estimators.output import new_folder
from foreroute.estimators.types import LayerAnchors

ExpertSums = dict[int, tuple[Tensor, Tensor]]
"""As `RoutingRecorder.take_expert_sums` gives them."""


PENDING = "pending"
"""Folder of an unfinished recording by several processes: an entry of each finished shard."""


class TraceWriter:
    """Adds shards to a trace folder; each is listed once it lies whole.

    Killed at any point, the folder holds every listed shard whole, and a new writer goes on. The
    manifest lists the shards up to the first that is missing; those after it, and all of a
    recording that several processes make together, are listed by a file each.
    """

    def __init__(self, folder: Path, manifest: TraceManifest, *, is_shared: bool = False) -> None:
        """Go on with a folder that was begun.

        Args:
            folder: As `begin` left it, perhaps with shards.
            manifest: As it lies in the folder.
            is_shared: Whether other processes write shards of it now.
        """
        self.folder = folder
        self.manifest = dataclasses.replace(manifest, is_complete=False, stop_reason="")
        self._is_shared = is_shared
        self.entries = dict(enumerate(manifest.shards)) | read_pending(folder, manifest)
        """The finished shards, by index."""

    @classmethod
    def begin(
        cls,
        folder: Path,
        manifest: TraceManifest,
        anchors: LayerAnchors | None,
        *,
        overwrite: bool,
        readout_vectors: Tensor | None = None,
    ) -> TraceWriter:
        """Make a trace folder without shards; it appears whole or not at all.

        Args:
            folder: Where.
            manifest: What will be recorded.
            anchors: Of the model; None where the manifest says why there are none.
            overwrite: Replace traces that are there.
            readout_vectors: Default vectors of the readout, [L, E, D], if it is recorded.

        Raises:
            ValueError: If something is there already and `overwrite` is off, or somebody writes it.
        """
        with new_folder(folder, "traces", overwrite=overwrite) as partial:
            if anchors is not None:
                shapes = anchor_shapes(
                    manifest.geometry, has_selection_bias=manifest.has_selection_bias
                )
                tensors = {name: getattr(anchors, name) for name in shapes}
                write_tensors(partial / ANCHORS_FILE, tensors)
                digest = sha256_of(partial / ANCHORS_FILE)
                manifest = dataclasses.replace(manifest, anchors_sha256=digest)
            if readout_vectors is not None:
                write_tensors(partial / READOUT_FILE, {READOUT_VECTORS: readout_vectors})
                digest = sha256_of(partial / READOUT_FILE)
                manifest = dataclasses.replace(manifest, readout_sha256=digest)
            write_json(partial / MANIFEST_FILE, manifest.to_dict())
        return cls(folder, manifest)

    def begin_shard(self, num_sequences: int, shard_idx: int) -> ShardWriter:
        """Open a shard for so many sequences."""
        return ShardWriter(self.folder, self.manifest, num_sequences, shard_idx)

    def finish_shard(self, shard: ShardWriter, expert_sums: ExpertSums) -> None:
        """Complete a shard whose batches are all there, and list it."""
        entry = shard.finish(expert_sums)
        is_next = entry.shard_idx == len(self.manifest.shards)
        self.entries[entry.shard_idx] = entry
        if self._is_shared or not is_next:
            (self.folder / PENDING).mkdir(exist_ok=True)
            write_json(_pending_path(self.folder, entry.shard_idx), dataclasses.asdict(entry))
        else:
            self._write_manifest()

    def finish(self, stop_reason: StopReason) -> None:
        """List all shards in the manifest, and mark the traces as complete."""
        self.manifest = dataclasses.replace(
            self.manifest, is_complete=True, stop_reason=stop_reason
        )
        self._write_manifest()
        remove_pending(self.folder)

    def _write_manifest(self) -> None:
        listed: list[ShardEntry] = []
        while len(listed) in self.entries:
            listed.append(self.entries[len(listed)])
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(listed))
        write_json(self.folder / MANIFEST_FILE, self.manifest.to_dict())


def _pending_path(folder: Path, shard_idx: int) -> Path:
    return folder / PENDING / f"shard_{shard_idx:05d}.json"


def read_pending(folder: Path, manifest: TraceManifest) -> dict[int, ShardEntry]:
    """The finished shards that the manifest of an unfinished recording does not list.

    Raises:
        ValueError: If the file of one is damaged; names it.
    """
    found = {}
    for path in sorted((folder / PENDING).glob("shard_*.json")):
        entry = read_json(path, ShardEntry, "Remove it; its shard is recorded again.")
        if path != _pending_path(folder, entry.shard_idx):
            raise ValueError(f"{path} is damaged (it describes shard {entry.shard_idx}).")
        manifest.require_entry(entry, path)
        found[entry.shard_idx] = entry
    return found


def remove_pending(folder: Path) -> None:
    """Remove the files that listed single shards, once the manifest lists them."""
    if (folder / PENDING).is_dir():
        shutil.rmtree(folder / PENDING)


class RowFile(Protocol):
    """Takes the rows of a file's tensors piece by piece."""

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the next rows of some of the tensors, converted to the dtype of the layout."""


File = TypeVar("File", bound=RowFile)


class ShardRows(Generic[File]):
    """Turns one shard's batches into rows of its files."""

    def __init__(
        self,
        manifest: TraceManifest,
        num_sequences: int,
        shard_idx: int,
        open_file: Callable[[str, Layout], File],
    ) -> None:
        """Begin an empty shard.

        Args:
            manifest: Of the traces.
            num_sequences: Sequences in the shard.
            shard_idx: 0.. in recording order.
            open_file: Makes one of its files, by path below the trace folder and layout.
        """
        self._num_sequences = num_sequences
        self._stored_length = manifest.stored_length
        self._dtype = manifest.dtype
        self._is_int8 = manifest.states_dtype == "int8"
        self.shard_idx = shard_idx
        num_tokens = num_sequences * manifest.stored_length
        states_dtype = getattr(torch, manifest.states_dtype)
        layouts = shard_layouts(
            manifest.geometry, states_dtype, num_sequences, num_tokens, manifest.record, shard_idx
        )
        self.files = {name: open_file(name, layout) for name, layout in layouts.items()}

    def add_batch(self, batch: RecordedBatch) -> None:
        """Write the next sequences."""
        is_made = batch.positions >= batch.num_prompt_tokens
        tokens = {
            "token_ids": batch.token_ids,
            "phases": torch.where(is_made, DECODE, PREFILL),
            "positions": batch.positions,
        }
        rows = {name: tensor.flatten() for name, tensor in tokens.items()}
        self.files[tokens_path(self.shard_idx)].append(rows)
        for layer_idx, record in batch.records.items():
            tensors = record.tensors
            self._require_finite(layer_idx, tensors)
            for name in STATE_FIELDS if self._is_int8 else ():
                if name in tensors:
                    tensors[name], tensors[name + SCALE_SUFFIX] = to_int8(tensors[name])
            self.files[layer_path(layer_idx, self.shard_idx)].append(tensors)

    def _require_finite(self, layer_idx: int, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise ValueError(
                    f"Layer {layer_idx} gives {name} that is not finite, in shard "
                    f"{self.shard_idx}: the model breaks down on this text in {self._dtype}. "
                    "Record with --dtype float32 or bfloat16, or leave that text out."
                )

    def complete(self, expert_sums: ExpertSums) -> None:
        """Write what belongs to the whole shard."""
        offsets = torch.arange(self._num_sequences + 1) * self._stored_length
        self.files[tokens_path(self.shard_idx)].append({"sequence_offsets": offsets})
        for layer_idx, sums in expert_sums.items():
            tensors = dict(zip(SUM_TENSORS, sums, strict=True))
            self.files[layer_path(layer_idx, self.shard_idx)].append(tensors)


class ShardWriter(ShardRows[ShardFile]):
    """Takes one shard's batches as they are recorded, and puts them on the disk."""

    def __init__(
        self, folder: Path, manifest: TraceManifest, num_sequences: int, shard_idx: int
    ) -> None:
        """Begin the files of a shard.

        Args:
            folder: Where they go.
            manifest: What is recorded.
            num_sequences: Sequences that the shard will hold.
            shard_idx: 0.. in recording order.
        """
        self._folder = folder
        super().__init__(
            manifest,
            num_sequences,
            shard_idx,
            lambda name, layout: ShardFile(folder / name, layout),
        )

    def finish(self, expert_sums: ExpertSums) -> ShardEntry:
        """Complete the shard, and give its files their final names."""
        self.complete(expert_sums)
        digests = {path: file.close() for path, file in self.files.items()}
        return ShardEntry(
            shard_idx=self.shard_idx,
            num_sequences=self._num_sequences,
            num_tokens=self._num_sequences * self._stored_length,
            sha256=digests,
            file_bytes={path: (self._folder / path).stat().st_size for path in digests},
        )


def remove_unlisted(folder: Path, entries: Collection[ShardEntry]) -> None:
    """Delete what a killed run left behind: half-written files and shards that are not listed.

    Args:
        folder: Of traces that nobody else writes.
        entries: The finished shards.
    """
    listed = {name for shard in entries for name in shard.sha256}
    patterns = ("layer_*/shard_*", "tokens/shard_*", f"*{PARTIAL_SUFFIX}-*")
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()
    for path in (folder / PENDING).glob(f"*{PARTIAL_SUFFIX}-*"):
        path.unlink()
