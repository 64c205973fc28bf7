"""Writes traces: shards one after the other, each listed in the manifest once it lies whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
    new_folder,
    sha256_of,
    write_command,
    write_json,
    write_tensors,
)
from foreroute.estimators.types import LayerAnchors

ExpertSums = dict[int, tuple[Tensor, Tensor]]
"""As `RoutingRecorder.take_expert_sums` gives them."""


class TraceWriter:
    """Adds shards to a trace folder one after the other; the manifest lists a shard once it lies.

    Killed at any point, the folder holds every listed shard whole, and a new writer goes on.
    """

    def __init__(self, folder: Path, manifest: TraceManifest) -> None:
        """Go on with a folder that was begun.

        Args:
            folder: As `begin` left it, perhaps with shards; what the manifest lacks is removed.
            manifest: As it lies in the folder.
        """
        self.folder = folder
        self.manifest = dataclasses.replace(manifest, is_complete=False, stop_reason="")
        _remove_unlisted(folder, manifest)

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
            overwrite: Replace what is there.
            readout_vectors: Default vectors of the readout, [L, E, D], if it is recorded.

        Raises:
            ValueError: If something is there already and `overwrite` is off.
        """
        with new_folder(folder, overwrite=overwrite) as partial:
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
            write_command(partial)
        return cls(folder, manifest)

    def begin_shard(self, num_sequences: int) -> ShardWriter:
        """Open the next shard for so many sequences."""
        return ShardWriter(self.folder, self.manifest, num_sequences)

    def finish_shard(self, shard: ShardWriter, expert_sums: ExpertSums) -> None:
        """Complete a shard whose batches are all there, and list it."""
        entry = shard.finish(expert_sums)
        self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, entry))
        self._write_manifest()

    def finish(self, stop_reason: StopReason) -> None:
        """Mark the traces as complete."""
        self.manifest = dataclasses.replace(
            self.manifest, is_complete=True, stop_reason=stop_reason
        )
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_json(self.folder / MANIFEST_FILE, self.manifest.to_dict())


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
            for name in STATE_FIELDS if self._is_int8 else ():
                if name in tensors:
                    tensors[name], tensors[name + SCALE_SUFFIX] = to_int8(tensors[name])
            self.files[layer_path(layer_idx, self.shard_idx)].append(tensors)

    def complete(self, expert_sums: ExpertSums) -> None:
        """Write what belongs to the whole shard."""
        offsets = torch.arange(self._num_sequences + 1) * self._stored_length
        self.files[tokens_path(self.shard_idx)].append({"sequence_offsets": offsets})
        for layer_idx, sums in expert_sums.items():
            tensors = dict(zip(SUM_TENSORS, sums, strict=True))
            self.files[layer_path(layer_idx, self.shard_idx)].append(tensors)


class ShardWriter(ShardRows[ShardFile]):
    """Takes one shard's batches as they are recorded, and puts them on the disk."""

    def __init__(self, folder: Path, manifest: TraceManifest, num_sequences: int) -> None:
        """Begin the files of the manifest's next shard.

        Args:
            folder: Where they go.
            manifest: What is recorded, and the shards so far.
            num_sequences: Sequences that the shard will hold.
        """
        self._folder = folder
        super().__init__(
            manifest,
            num_sequences,
            len(manifest.shards),
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


def _remove_unlisted(folder: Path, manifest: TraceManifest) -> None:
    """Delete what a killed run left behind: half-written files and shards not in the manifest."""
    listed = {name for shard in manifest.shards for name in shard.sha256}
    for path in [*folder.glob("*/shard_*"), *folder.glob(f"*{PARTIAL_SUFFIX}")]:
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()
