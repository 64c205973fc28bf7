"""Traces on disk: one folder per run, safetensors shards per layer, a manifest that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from foreroute.estimators.artifacts import (
    PARTIAL_SUFFIX,
    read_json,
    read_tensors,
    sha256_of,
    write_json,
    write_tensors,
)
from foreroute.estimators.types import LayerAnchors, MoEGeometry, NormKind, RoutingRecord

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ANCHORS_FILE = "anchors.safetensors"
PREFILL, DECODE = 0, 1
ANCHOR_TENSORS = ("router_weight", "router_bias", "norm_weight", "norm_bias")
SUM_TENSORS = ("expert_output_sum", "expert_count")
REMEDY = "Remove the folder and collect the traces again."

StopReason = Literal["", "tokens-reached", "dataset-exhausted", "max-bytes"]
"""Why recording ended; empty while it goes on."""


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """The tokens of one shard, sequence after sequence."""

    token_ids: Tensor
    """[T], int64."""
    phases: Tensor
    """[T], uint8: 0 the token came from the dataset (prefill), 1 the model made it (decode)."""
    sequence_offsets: Tensor
    """[N + 1], int64: sequence i is rows offsets[i] to offsets[i + 1]."""


@dataclass(frozen=True, kw_only=True)
class LayerShard:
    """What one shard stores of one MoE layer."""

    record: RoutingRecord
    """Its routing, T tokens."""
    expert_output_sum: Tensor
    """Sum of each expert's unweighted outputs over the tokens that chose it, [E, D], float32."""
    expert_count: Tensor
    """How many tokens chose each expert, [E], int64."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One finished shard, as the manifest lists it."""

    shard_idx: int
    """0.. in recording order."""
    num_sequences: int
    """Sequences in it."""
    num_tokens: int
    """Tokens in it, all sequences together."""
    num_bytes: int
    """Size of its files on disk."""
    sha256: dict[str, str]
    """Hex digest of each of its files, by path below the trace folder."""


@dataclass(frozen=True, kw_only=True)
class TraceManifest:
    """What was recorded, from what, and how; equal headers mean equal shards."""

    geometry: MoEGeometry
    """Shape of the recorded model's routing."""
    model: str
    """What the user called the model."""
    dataset: str
    """What the user called the dataset."""
    split: str
    """`train` or `held-out`."""
    tokens: int
    """Tokens asked for; whole sequences are recorded, so a few more may be there."""
    sequence_length: int
    """Tokens per sequence."""
    generated_share: float
    """Share of each sequence that the model made itself, 0..1."""
    dtype: str
    """The model's dtype while it was recorded."""
    states_dtype: str
    """Dtype in which residual and router_input are stored."""
    device: str
    """Kind of device that computed it, `cpu` or `cuda`."""
    batch_size: int
    """Sequences per forward pass."""
    shard_sequences: int
    """Sequences per shard (the last may hold fewer)."""
    seed: int
    """Seed of the sampled continuations."""
    norm_kind: NormKind
    """Kind of the norms that feed the routers."""
    norm_eps: float
    """Their epsilon."""
    command: str
    """The command that makes these traces, less --out and --device."""
    versions: dict[str, str]
    """Versions of the packages it ran on."""
    anchors_sha256: str = ""
    """Hex digest of the anchors' file."""
    shards: tuple[ShardEntry, ...] = ()
    """The finished shards."""
    is_complete: bool = False
    """Whether recording came to its end."""
    stop_reason: StopReason = ""
    """Why it ended."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the finished shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the finished shards on disk."""
        return sum(shard.num_bytes for shard in self.shards)

    def header(self) -> dict[str, Any]:
        """What must agree before two runs may share a folder: all but progress and versions."""
        progress = ("shards", "is_complete", "stop_reason", "versions", "anchors_sha256")
        return {name: value for name, value in self.to_dict().items() if name not in progress}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reverses it."""
        values = dataclasses.asdict(self)
        return values | {"geometry": self.geometry.to_dict(), "shards": list(values["shards"])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TraceManifest:
        """Rebuild from `to_dict`'s output."""
        shards = tuple(ShardEntry(**shard) for shard in values["shards"])
        geometry = MoEGeometry.from_dict(values["geometry"])
        return cls(**(values | {"geometry": geometry, "shards": shards}))


def read_manifest(folder: Path) -> TraceManifest:
    """Read a trace folder's manifest, finished or not.

    Raises:
        FileNotFoundError: If the folder holds no traces.
        ValueError: If the manifest is damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no traces: it has no {MANIFEST_FILE}.")
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values.get('format_version')}; this foreroute reads "
            f"version {FORMAT_VERSION}. {REMEDY}"
        )
    try:
        return TraceManifest.from_dict(values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}). {REMEDY}") from error


def tokens_path(shard_idx: int) -> str:
    """Where a shard's tokens lie below the trace folder."""
    return f"tokens/shard_{shard_idx:05d}.safetensors"


def layer_path(layer_idx: int, shard_idx: int) -> str:
    """Where a shard of a decoder layer lies below the trace folder."""
    return f"layer_{layer_idx:03d}/shard_{shard_idx:05d}.safetensors"


class TraceWriter:
    """Adds shards to a trace folder one after the other; the manifest lists a shard once it lies.

    Killed at any point, the folder holds every listed shard whole, and a new writer goes on.
    """

    def __init__(self, folder: Path, manifest: TraceManifest, anchors: LayerAnchors) -> None:
        """Start a folder, or go on with one whose manifest is given; drops what is not listed."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unlisted(folder, manifest)
        write_tensors(
            folder / ANCHORS_FILE, {name: getattr(anchors, name) for name in ANCHOR_TENSORS}
        )
        self.manifest = dataclasses.replace(
            manifest, anchors_sha256=sha256_of(folder / ANCHORS_FILE)
        )
        self._write_manifest()

    def add_shard(self, tokens: TokenShard, layers: Mapping[int, LayerShard]) -> None:
        """Write the next shard and list it.

        Args:
            tokens: Its tokens.
            layers: By decoder layer index, every MoE layer.
        """
        shard_idx = len(self.manifest.shards)
        contents = {tokens_path(shard_idx): vars(tokens)}
        for layer_idx, layer in layers.items():
            sums = {name: getattr(layer, name) for name in SUM_TENSORS}
            contents[layer_path(layer_idx, shard_idx)] = _stored(layer.record) | sums
        for name, tensors in contents.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, tensors)
        entry = ShardEntry(
            shard_idx=shard_idx,
            num_sequences=len(tokens.sequence_offsets) - 1,
            num_tokens=len(tokens.token_ids),
            num_bytes=sum((self.folder / name).stat().st_size for name in contents),
            sha256={name: sha256_of(self.folder / name) for name in contents},
        )
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


def _stored(record: RoutingRecord) -> dict[str, Tensor]:
    """A record's tensors as they lie on disk: expert ids in the smallest type that holds them."""
    num_experts = record.router_logits.shape[-1]
    ids = record.expert_ids.to(torch.uint8 if num_experts <= 256 else torch.int16)
    return vars(record) | {"expert_ids": ids}


def _remove_unlisted(folder: Path, manifest: TraceManifest) -> None:
    """Delete what a killed run left behind: half-written files and shards not in the manifest."""
    listed = {name for shard in manifest.shards for name in shard.sha256}
    for path in [*folder.glob("*/shard_*"), *folder.glob(f"*{PARTIAL_SUFFIX}")]:
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()


class Traces:
    """Reads finished traces; nothing is loaded before it is asked for."""

    def __init__(self, folder: Path, manifest: TraceManifest, anchors: LayerAnchors) -> None:
        self.folder = folder
        self.manifest = manifest
        self.anchors = anchors

    @classmethod
    def open(cls, folder: Path) -> Traces:
        """Open a trace folder.

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
        for shard in manifest.shards:
            for name in shard.sha256:
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder / name} is missing. {REMEDY}")
        tensors = _read_checked(folder / ANCHORS_FILE, _anchor_shapes(manifest.geometry))
        anchors = LayerAnchors(**tensors, norm_kind=manifest.norm_kind, norm_eps=manifest.norm_eps)
        return cls(folder, manifest, anchors)

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
        shapes = {
            "token_ids": (shard.num_tokens,),
            "phases": (shard.num_tokens,),
            "sequence_offsets": (shard.num_sequences + 1,),
        }
        return TokenShard(**_read_checked(self.folder / tokens_path(shard_idx), shapes))

    def read(self, layer_idx: int, shard_idx: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Some of the tensors of one layer's shard.

        Args:
            layer_idx: Decoder layer index, as the model counts.
            shard_idx: 0.. in recording order.
            names: Fields of `RoutingRecord`.

        Returns:
            By name, T rows each; floats as stored, expert ids int64.

        Raises:
            ValueError: If there is no such layer, or the file is damaged; names it.
        """
        self.geometry.position(layer_idx)
        path = self.folder / layer_path(layer_idx, shard_idx)
        known = _layer_shapes(self.geometry, self.manifest.shards[shard_idx].num_tokens)
        tensors = _read_checked(path, {name: known[name] for name in names})
        if "expert_ids" in tensors:
            tensors["expert_ids"] = tensors["expert_ids"].long()
        return tensors

    def record(self, layer_idx: int, shard_idx: int) -> RoutingRecord:
        """The whole record of one layer's shard."""
        names = tuple(field.name for field in dataclasses.fields(RoutingRecord))
        return RoutingRecord(**self.read(layer_idx, shard_idx, names))

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
        digests = {ANCHORS_FILE: self.manifest.anchors_sha256}
        for shard in self.manifest.shards:
            digests |= shard.sha256
        for name, digest in digests.items():
            if sha256_of(self.folder / name) != digest:
                raise ValueError(
                    f"{self.folder / name} is damaged (its sha256 is not the recorded one). "
                    f"{REMEDY}"
                )


def _anchor_shapes(geometry: MoEGeometry) -> dict[str, tuple[int, ...]]:
    layers, experts, hidden = geometry.num_layers, geometry.num_experts, geometry.hidden_size
    return {
        "router_weight": (layers, experts, hidden),
        "router_bias": (layers, experts),
        "norm_weight": (layers, hidden),
        "norm_bias": (layers, hidden),
    }


def _layer_shapes(geometry: MoEGeometry, num_tokens: int) -> dict[str, tuple[int, ...]]:
    return {
        "residual": (num_tokens, geometry.hidden_size),
        "router_input": (num_tokens, geometry.hidden_size),
        "router_logits": (num_tokens, geometry.num_experts),
        "expert_ids": (num_tokens, geometry.top_k),
        "gate_weights": (num_tokens, geometry.top_k),
        "expert_output_sum": (geometry.num_experts, geometry.hidden_size),
        "expert_count": (geometry.num_experts,),
    }


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
