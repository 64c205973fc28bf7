"""Reads traces: safetensors shards per layer, listed in a manifest, checked as they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foreroute.data.int8_rows import from_int8
from foreroute.data.layout import (
    READOUT_VECTORS,
    SCALE_SUFFIX,
    SUM_TENSORS,
    Layout,
    anchor_shapes,
    layer_layout,
    layer_path,
    optional_fields,
    token_layout,
    tokens_path,
)
from foreroute.data.manifest import (
    ANCHORS_FILE,
    READOUT_FILE,
    REMEDY,
    TraceManifest,
    read_manifest,
)
from foreroute.estimators.artifacts import read_tensors, sha256_of
from foreroute.estimators.types import LayerAnchors, MoEGeometry, RoutingRecord


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """The tokens of one shard, sequence after sequence."""

    token_ids: Tensor
    """[T], int64."""
    phases: Tensor
    """[T], uint8: 0 the token came from the dataset (prefill), 1 the model made it (decode)."""
    positions: Tensor
    """[T], int64: place of the token in its sequence; gaps are tokens that were not stored."""
    sequence_offsets: Tensor
    """[N + 1], int64: sequence i is rows offsets[i] to offsets[i + 1]."""


class Traces:
    """Reads finished traces; nothing is loaded before it is asked for."""

    def __init__(self, folder: Path, manifest: TraceManifest, anchors: LayerAnchors | None) -> None:
        """Take what was read of a folder; `open` reads it.

        Args:
            folder: Where the shards are.
            manifest: What they hold.
            anchors: Copies of the model's routers, if they can be made.
        """
        self.folder = folder
        self.manifest = manifest
        self.anchors = anchors
        """Copies of the model's routers; None where the manifest says why they cannot be made."""

    @classmethod
    def open(cls, folder: Path) -> Traces:
        """Open a folder of stored traces; `opening.open_traces` opens any.

        Raises:
            FileNotFoundError: If there are no traces, or a shard is missing; names it.
            ValueError: If they are unfinished, damaged or live; names the file and what to do.
        """
        manifest, anchors = read_finished(folder)
        if manifest.live_sha256:
            raise ValueError(f"{folder} stores no traces: they are made of a model while it runs.")
        return cls(Path(folder), manifest, anchors)

    @property
    def geometry(self) -> MoEGeometry:
        """Shape of the recorded model's routing."""
        return self.manifest.geometry

    @property
    def num_tokens(self) -> int:
        """Tokens recorded."""
        return self.manifest.num_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences recorded."""
        return sum(shard.num_sequences for shard in self.manifest.shards)

    def tokens(self, shard_idx: int) -> TokenShard:
        """The tokens of one shard.

        Raises:
            ValueError: If its file is damaged; names it.
        """
        shard = self.manifest.shards[shard_idx]
        layout = token_layout(shard.num_sequences, shard.num_tokens)
        shapes = {name: stored.shape for name, stored in layout.items()}
        tensors = self._read_shard(tokens_path(shard_idx), shard_idx, shapes)
        return TokenShard(**(tensors | {"positions": tensors["positions"].long()}))

    def read(self, layer_idx: int, shard_idx: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Some of the tensors of one layer's shard.

        Args:
            layer_idx: Decoder layer index, as the model counts.
            shard_idx: 0.. in recording order.
            names: Fields of `RoutingRecord`.

        Returns:
            By name, T rows each; floats as stored (int8 states are float32), expert ids int64.

        Raises:
            ValueError: If there is no such layer, it has no such field, or the file is damaged.
        """
        layout = self._layout(layer_idx, shard_idx)
        self._require_fields(layer_idx, names, layout)
        scales = tuple(n + SCALE_SUFFIX for n in names if n + SCALE_SUFFIX in layout)
        path = layer_path(layer_idx, shard_idx)
        shapes = {name: layout[name].shape for name in (*names, *scales)}
        tensors = self._read_shard(path, shard_idx, shapes)
        for scale in scales:
            name = scale.removesuffix(SCALE_SUFFIX)
            tensors[name] = from_int8(tensors[name], tensors.pop(scale))
        if "expert_ids" in tensors:
            tensors["expert_ids"] = tensors["expert_ids"].long()
        return tensors

    def record(self, layer_idx: int, shard_idx: int) -> RoutingRecord:
        """The whole record of one layer's shard."""
        layout = self._layout(layer_idx, shard_idx)
        fields = dataclasses.fields(RoutingRecord)
        names = tuple(field.name for field in fields if field.name in layout)
        return RoutingRecord(**self.read(layer_idx, shard_idx, names))

    def readout_vectors(self) -> Tensor:
        """The default vectors that the recorded readout stands on, [L, E, D], float32.

        Raises:
            ValueError: If no readout was recorded, or the file is damaged.
        """
        geometry = self.geometry
        if "readout" not in self.manifest.record:
            raise ValueError(_lacks(self.folder, "readout"))
        shape = (geometry.num_layers, geometry.num_experts, geometry.hidden_size)
        return _read_checked(self.folder / READOUT_FILE, {READOUT_VECTORS: shape})[READOUT_VECTORS]

    def _layout(self, layer_idx: int, shard_idx: int) -> Layout:
        self.geometry.position(layer_idx)
        optional = optional_fields(self.geometry, self.manifest.record, layer_idx)
        states_dtype = getattr(torch, self.manifest.states_dtype)
        num_tokens = self.manifest.shards[shard_idx].num_tokens
        return layer_layout(self.geometry, states_dtype, num_tokens, optional)

    def _require_fields(self, layer_idx: int, names: tuple[str, ...], layout: Layout) -> None:
        for name in names:
            if name not in layout and name in self.manifest.record:
                raise ValueError(
                    f"The last MoE layer ({layer_idx}) has no next one to make {name} of."
                )
            if name not in layout:
                raise ValueError(_lacks(self.folder, name))

    def _read_shard(
        self, name: str, shard_idx: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """Some tensors of one of a shard's files, as stored."""
        return _read_checked(self.folder / name, shapes)

    def default_vectors(self, shard_indices: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean unweighted output of each expert over the tokens that chose it.

        Args:
            shard_indices: Shards to average over; all if None.

        Returns:
            The vectors, [L, E, D], float32, 0 where no token chose the expert; and how many tokens
            did, [L, E], int64.
        """
        geometry = self.geometry
        shape = (geometry.num_layers, geometry.num_experts)
        sums = torch.zeros(*shape, geometry.hidden_size)  # [L, E, D]
        counts = torch.zeros(shape, dtype=torch.int64)  # [L, E]
        indices = range(len(self.manifest.shards)) if shard_indices is None else shard_indices
        for shard_idx in indices:
            for position, layer_idx in enumerate(geometry.layer_indices):
                part = self.read(layer_idx, shard_idx, SUM_TENSORS)
                sums[position] += part["expert_output_sum"]
                counts[position] += part["expert_count"]
        return sums / counts.clamp(min=1).unsqueeze(-1), counts

    def verify(self) -> None:
        """Compare every file with its recorded sha256.

        Raises:
            ValueError: If one differs; names the first.
        """
        digests = {} if self.anchors is None else {ANCHORS_FILE: self.manifest.anchors_sha256}
        if "readout" in self.manifest.record:
            digests[READOUT_FILE] = self.manifest.readout_sha256
        for shard in self.manifest.shards:
            digests |= shard.sha256
        for name, digest in digests.items():
            if sha256_of(self.folder / name) != digest:
                raise ValueError(
                    f"{self.folder / name} is damaged (its sha256 is not the recorded one). "
                    f"{REMEDY}"
                )


def read_finished(folder: Path) -> tuple[TraceManifest, LayerAnchors | None]:
    """What finished traces say of themselves, and the copies of the model's routers.

    Raises:
        FileNotFoundError: If there are no traces, or a shard is missing; names it.
        ValueError: If they are unfinished or damaged; names the file and what to do.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.is_complete:
        raise ValueError(
            f"{folder} is unfinished ({manifest.num_tokens} of {manifest.tokens} tokens). "
            "Run the same collect-traces command again; it goes on where it stopped."
        )
    manifest.require_whole(folder)
    return manifest, _read_anchors(folder, manifest)


def _read_anchors(folder: Path, manifest: TraceManifest) -> LayerAnchors | None:
    if manifest.anchors_problem:
        return None
    shapes = anchor_shapes(manifest.geometry, has_selection_bias=manifest.has_selection_bias)
    tensors = _read_checked(folder / ANCHORS_FILE, shapes)
    return LayerAnchors(**tensors, norm_kind=manifest.norm_kind, norm_eps=manifest.norm_eps)


def _lacks(folder: Path, field: str) -> str:
    flag = field.replace("_", "-")
    return f"{folder} holds no {flag}. Collect it again with collect-traces --record {flag}."


def _read_checked(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the named tensors and refuse any whose shape is not what the manifest says."""
    try:
        tensors = read_tensors(path, tuple(shapes))
    except ValueError as error:
        raise ValueError(f"{error} {REMEDY}") from error
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{path} is damaged ({name} has shape {list(tensors[name].shape)}, the manifest "
                f"says {list(shape)}). {REMEDY}"
            )
    return tensors
