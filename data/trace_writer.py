"""Writes traces: shards one after the other, each listed in the manifest once it lies whole."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

DTYPE_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int16: "I16",
    torch.uint8: "U8",
}


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
        path = tokens_path(shard_idx)
        digests = {path: self._write(path, {name: [t] for name, t in vars(tokens).items()})}
        for layer_idx, layer in layers:
            path = layer_path(layer_idx, shard_idx)
            digests[path] = self._write(path, _stored(layer))
        entry = ShardEntry(
            shard_idx=shard_idx,
            num_sequences=len(tokens.sequence_offsets) - 1,
            num_tokens=len(tokens.token_ids),
            sha256=digests,
            file_bytes={path: (self.folder / path).stat().st_size for path in digests},
        )
        self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, entry))
        self._write_manifest()

    def finish(self, stop_reason: StopReason) -> None:
        """Mark the traces as complete."""
        self.manifest = dataclasses.replace(
            self.manifest, is_complete=True, stop_reason=stop_reason
        )
        self._write_manifest()

    def _write(self, path: str, parts: Mapping[str, Sequence[Tensor]]) -> str:
        (self.folder / path).parent.mkdir(exist_ok=True)
        return write_tensor_parts(self.folder / path, parts)

    def _write_manifest(self) -> None:
        write_json(self.folder / MANIFEST_FILE, self.manifest.to_dict())


def _stored(layer: LayerShard) -> dict[str, list[Tensor]]:
    """A layer's tensors as they lie on disk; `sizes` counts on these types."""
    types = {
        "router_logits": torch.float32,
        "gate_weights": torch.float32,
        "expert_ids": torch.int16,
    }
    parts = {
        field.name: [
            getattr(record, field.name).to(types.get(field.name)) for record in layer.records
        ]
        for field in dataclasses.fields(RoutingRecord)
    }
    return parts | {name: [getattr(layer, name)] for name in SUM_TENSORS}


def write_tensor_parts(path: Path, parts: Mapping[str, Sequence[Tensor]]) -> str:
    """Write a safetensors file of tensors that lie in parts, neither joining nor reading again.

    Args:
        path: The file; a reader never sees half of it.
        parts: By tensor name, its parts along the first dimension, on the CPU.

    Returns:
        Hex sha256 of the file.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, pieces in parts.items():
        shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
        start, end = end, end + sum(piece.nbytes for piece in pieces)
        header[name] = {
            "dtype": DTYPE_CODES[pieces[0].dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    digest = hashlib.sha256()
    pieces = [piece for several in parts.values() for piece in several]
    raw: Iterator[Any] = (p.contiguous().view(-1).view(torch.uint8).numpy() for p in pieces)
    with partial.open("wb") as file:
        for chunk in itertools.chain([len(described).to_bytes(8, "little"), described], raw):
            digest.update(chunk)
            file.write(chunk)
    partial.replace(path)
    return digest.hexdigest()


def _remove_unlisted(folder: Path, manifest: TraceManifest) -> None:
    """Delete what a killed run left behind: half-written files and shards not in the manifest."""
    listed = {name for shard in manifest.shards for name in shard.sha256}
    for path in [*folder.glob("*/shard_*"), *folder.glob(f"*{PARTIAL_SUFFIX}")]:
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()
