"""Reads traces: safetensors shards per layer, listed in a manifest, checked as they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    Stored,
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
from foreroute.estimators.artifacts import read_tensors, require_digest, require_finite
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
        self._verified: set[str] = set()

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
        tensors = self._read_shard(tokens_path(shard_idx), shard_idx, layout)
        offsets = tensors["sequence_offsets"]
        if offsets[0] != 0 or offsets[-1] != shard.num_tokens or (offsets.diff() < 0).any():
            raise ValueError(
                f"{self.folder / tokens_path(shard_idx)} is damaged (its sequences do not begin "
                f"where others end). {REMEDY}"
            )
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
        wanted = {name: layout[name] for name in (*names, *scales)}
        tensors = self._read_shard(path, shard_idx, wanted)
        for scale in scales:
            name = scale.removesuffix(SCALE_SUFFIX)
            tensors[name] = from_int8(tensors[name], tensors.pop(scale))
        if "expert_ids" in tensors:
            ids = tensors["expert_ids"] = tensors["expert_ids"].long()
            if not 0 <= int(ids.min()) <= int(ids.max()) < self.geometry.num_experts:
                raise ValueError(
                    f"{self.folder / path} is damaged (expert_ids outside 0.."
                    f"{self.geometry.num_experts - 1}). {REMEDY}"
                )
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
        layout = {READOUT_VECTORS: Stored(torch.float32, shape)}
        found = _read_checked(self.folder / READOUT_FILE, layout)[READOUT_VECTORS]
        require_digest(self.folder / READOUT_FILE, self.manifest.readout_sha256, REMEDY)
        return found

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

    def _read_shard(self, name: str, shard_idx: int, layout: Layout) -> dict[str, Tensor]:
        """Some tensors of one of a shard's files, as stored; its digest is compared once."""
        tensors = _read_checked(self.folder / name, layout)
        if name not in self._verified:
            require_digest(self.folder / name, self.manifest.shards[shard_idx].sha256[name], REMEDY)
            self._verified.add(name)
        return tensors

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

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Compare every file with its recorded sha256.

        Args:
            part: Which part of the files to compare, where several processes divide them.
            num_parts: How many parts there are.

        Raises:
            ValueError: If one differs; names the first.
        """
        digests = {} if self.anchors is None else {ANCHORS_FILE: self.manifest.anchors_sha256}
        if "readout" in self.manifest.record:
            digests[READOUT_FILE] = self.manifest.readout_sha256
        for shard in self.manifest.shards:
            digests |= shard.sha256
        for name, digest in list(digests.items())[part::num_parts]:
            if name not in self._verified:
                require_digest(self.folder / name, digest, REMEDY)
                self._verified.add(name)


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
    layout = {name: Stored(torch.float32, shape) for name, shape in shapes.items()}
    path = folder / ANCHORS_FILE
    tensors = _read_checked(path, layout)
    require_digest(path, manifest.anchors_sha256, REMEDY)
    require_finite(tensors, path, REMEDY)
    return LayerAnchors(**tensors, norm_kind=manifest.norm_kind, norm_eps=manifest.norm_eps)


def _lacks(folder: Path, field: str) -> str:
    flag = field.replace("_", "-")
    return f"{folder} holds no {flag}. Collect it again with collect-traces --record {flag}."


def _read_checked(path: Path, layout: Layout) -> dict[str, Tensor]:
    """Read the named tensors and refuse any that are not what the manifest says."""
    try:
        tensors = read_tensors(path, tuple(layout))
    except ValueError as error:
        raise ValueError(f"{error} {REMEDY}") from error
    for name, stored in layout.items():
        found = tensors[name]
        if tuple(found.shape) != stored.shape:
            raise ValueError(
                f"{path} is damaged ({name} has shape {list(found.shape)}, the manifest "
                f"says {list(stored.shape)}). {REMEDY}"
            )
        if found.dtype != stored.dtype:
            raise ValueError(
                f"{path} is damaged ({name} is {found.dtype}, not {stored.dtype}). {REMEDY}"
            )
    return tensors
