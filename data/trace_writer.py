"""Writes traces: shards one after the other, each listed in the manifest once it lies whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from foreroute.data.batch import RecordedBatch
from foreroute.data.layout import (
    ANCHOR_TENSORS,
    DECODE,
    PREFILL,
    SUM_TENSORS,
    layer_layout,
    layer_path,
    token_layout,
    tokens_path,
)
from foreroute.data.manifest import (
    ANCHORS_FILE,
    MANIFEST_FILE,
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
        cls, folder: Path, manifest: TraceManifest, anchors: LayerAnchors, *, overwrite: bool
    ) -> TraceWriter:
        """Make a trace folder without shards; it appears whole or not at all.

        Raises:
            ValueError: If something is there already and `overwrite` is off.
        """
        with new_folder(folder, overwrite=overwrite) as partial:
            tensors = {name: getattr(anchors, name) for name in ANCHOR_TENSORS}
            write_tensors(partial / ANCHORS_FILE, tensors)
            digest = sha256_of(partial / ANCHORS_FILE)
            manifest = dataclasses.replace(manifest, anchors_sha256=digest)
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


class ShardWriter:
    """Takes one shard's batches as they are recorded."""

    def __init__(self, folder: Path, manifest: TraceManifest, num_sequences: int) -> None:
        self._idx = len(manifest.shards)
        self._folder = folder
        self._num_sequences = num_sequences
        self._sequence_length = manifest.sequence_length
        num_tokens = num_sequences * manifest.sequence_length
        geometry, states_dtype = manifest.geometry, getattr(torch, manifest.states_dtype)
        layer = layer_layout(geometry, states_dtype, num_tokens)
        layouts = {tokens_path(self._idx): token_layout(num_sequences, num_tokens)}
        layouts |= {layer_path(i, self._idx): layer for i in geometry.layer_indices}
        self._files = {path: ShardFile(folder / path, layout) for path, layout in layouts.items()}

    def add_batch(self, batch: RecordedBatch) -> None:
        """Write the next sequences."""
        phases = torch.full(batch.token_ids.shape, PREFILL)
        phases[:, batch.num_prompt_tokens :] = DECODE
        tokens = {"token_ids": batch.token_ids.flatten(), "phases": phases.flatten()}
        self._files[tokens_path(self._idx)].append(tokens)
        for layer_idx, record in batch.records.items():
            self._files[layer_path(layer_idx, self._idx)].append(vars(record))

    def finish(self, expert_sums: ExpertSums) -> ShardEntry:
        """Write what belongs to the whole shard, and give its files their final names."""
        offsets = torch.arange(self._num_sequences + 1) * self._sequence_length
        self._files[tokens_path(self._idx)].append({"sequence_offsets": offsets})
        for layer_idx, sums in expert_sums.items():
            tensors = dict(zip(SUM_TENSORS, sums, strict=True))
            self._files[layer_path(layer_idx, self._idx)].append(tensors)
        digests = {path: file.close() for path, file in self._files.items()}
        return ShardEntry(
            shard_idx=self._idx,
            num_sequences=self._num_sequences,
            num_tokens=self._num_sequences * self._sequence_length,
            sha256=digests,
            file_bytes={path: (self._folder / path).stat().st_size for path in digests},
        )


def _remove_unlisted(folder: Path, manifest: TraceManifest) -> None:
    """Delete what a killed run left behind: half-written files and shards not in the manifest."""
    listed = {name for shard in manifest.shards for name in shard.sha256}
    for path in [*folder.glob("*/shard_*"), *folder.glob(f"*{PARTIAL_SUFFIX}")]:
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()
