"""Writes traces: shards one after the other, each listed in the manifest once it lies whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from foreroute.data.manifest import (
    ANCHORS_FILE,
    MANIFEST_FILE,
    ShardEntry,
    StopReason,
    TraceManifest,
    layer_path,
    tokens_path,
)
from foreroute.data.traces import ANCHOR_TENSORS, SUM_TENSORS, LayerShard, TokenShard
from foreroute.estimators.artifacts import (
    PARTIAL_SUFFIX,
    new_folder,
    sha256_of,
    write_command,
    write_json,
    write_tensors,
)
from foreroute.estimators.types import LayerAnchors, RoutingRecord


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

    def add_shard(self, tokens: TokenShard, layers: Iterable[tuple[int, LayerShard]]) -> None:
        """Write the next shard and list it.

        Args:
            tokens: Its tokens.
            layers: Decoder layer index and content of every MoE layer, taken one at a time.
        """
        shard_idx = len(self.manifest.shards)
        paths = [self._write(tokens_path(shard_idx), vars(tokens))]
        for layer_idx, layer in layers:
            sums = {name: getattr(layer, name) for name in SUM_TENSORS}
            path = layer_path(layer_idx, shard_idx)
            paths.append(self._write(path, _stored(layer.record) | sums))
        entry = ShardEntry(
            shard_idx=shard_idx,
            num_sequences=len(tokens.sequence_offsets) - 1,
            num_tokens=len(tokens.token_ids),
            sha256={path: sha256_of(self.folder / path) for path in paths},
            file_bytes={path: (self.folder / path).stat().st_size for path in paths},
        )
        self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, entry))
        self._write_manifest()

    def finish(self, stop_reason: StopReason) -> None:
        """Mark the traces as complete."""
        self.manifest = dataclasses.replace(
            self.manifest, is_complete=True, stop_reason=stop_reason
        )
        self._write_manifest()

    def _write(self, path: str, tensors: Mapping[str, Tensor]) -> str:
        (self.folder / path).parent.mkdir(exist_ok=True)
        write_tensors(self.folder / path, tensors)
        return path

    def _write_manifest(self) -> None:
        write_json(self.folder / MANIFEST_FILE, self.manifest.to_dict())


def _stored(record: RoutingRecord) -> dict[str, Tensor]:
    """A record's tensors as they lie on disk; `sizes` counts on these types."""
    return vars(record) | {
        "router_logits": record.router_logits.float(),
        "gate_weights": record.gate_weights.float(),
        "expert_ids": record.expert_ids.to(torch.int16),
    }


def _remove_unlisted(folder: Path, manifest: TraceManifest) -> None:
    """Delete what a killed run left behind: half-written files and shards not in the manifest."""
    listed = {name for shard in manifest.shards for name in shard.sha256}
    for path in [*folder.glob("*/shard_*"), *folder.glob(f"*{PARTIAL_SUFFIX}")]:
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()
