"""The manifest of a trace folder: what was recorded, from what, how, and which shards are there."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from foreroute.data.layout import (
    MOST_HEADER_BYTES,
    OPTIONAL_FIELDS,
    bytes_of,
    layer_path,
    shard_layouts,
    tokens_path,
)
from foreroute.estimators.artifacts import Count, read_versioned
from foreroute.estimators.types import MoEGeometry, NormKind

FORMAT_VERSION = 2  # 1 had no selection bias among the anchors and no positions
MANIFEST_FILE = "manifest.json"
ANCHORS_FILE = "anchors.safetensors"
READOUT_FILE = "readout_vectors.safetensors"
STATE_DTYPES = ("float32", "bfloat16", "float16", "int8")
REMEDY = "Remove the folder and collect the traces again."

TextOrigin = Literal["dataset", "generated"]
"""Whose text is recorded: the dataset's, or what the model makes of prompts from it."""
StopReason = Literal["", "tokens-reached", "dataset-exhausted", "max-bytes"]
"""Why recording ended; empty while it goes on."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One finished shard, as the manifest lists it."""

    shard_idx: Count
    """0.. in recording order."""
    num_sequences: Count
    """Sequences in it."""
    num_tokens: Count
    """Tokens in it, all sequences together."""
    sha256: dict[str, str]
    """Hex digest of each of its files, by path below the trace folder."""
    file_bytes: dict[str, Count]
    """Size of each of its files."""

    @property
    def num_bytes(self) -> int:
        """Size of its files, all together."""
        return sum(self.file_bytes.values())

    def is_in(self, folder: Path) -> bool:
        """Whether all of its files are there."""
        return all((folder / name).is_file() for name in self.file_bytes)

    def require_whole(self, folder: Path) -> None:
        """Check that every file is there with its size.

        Raises:
            FileNotFoundError: If one is missing; names it.
            ValueError: If one has another size; names it.
        """
        for name, num_bytes in self.file_bytes.items():
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing. {REMEDY}")
            if path.stat().st_size != num_bytes:
                raise ValueError(
                    f"{path} is damaged ({path.stat().st_size} bytes, the manifest says "
                    f"{num_bytes}). {REMEDY}"
                )


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Under which speculative execution the recorded text was generated."""

    bundle: str
    """Folder of the bundle that predicted."""
    bundle_sha256: str
    """Hex digest of its manifest."""
    on_miss: str
    """The rule about experts that were not there."""
    expert_slots: str
    """Slots per MoE layer, as the user gave them: a number or a share."""


@dataclass(frozen=True, kw_only=True)
class TraceManifest:
    """What was recorded, from what, and how; equal headers mean equal shards."""

    geometry: MoEGeometry
    """Shape of the recorded model's routing."""
    model: str
    """What the user called the model."""
    revision: str = ""
    """Branch, tag or commit of it; empty where none was asked for."""
    dataset: str
    """What the user called the dataset."""
    column: str = ""
    """Column of it that was asked for; empty where it was found."""
    prompt_tokens: str = ""
    """What says where the prompts of rows of token ids end: a column, or a number; empty if no
    model made a part of them."""
    split: str
    """`train` or `held-out`."""
    tokens: Count
    """Tokens asked for; whole sequences are recorded, so a few more may be there."""
    sequence_length: Count
    """Tokens per sequence as the model runs it, prompt and continuation together."""
    generated_share: float
    """Share of each sequence that the model made itself, 0..1; 0 for another source."""
    source: TextOrigin = "dataset"
    """Whose text is recorded."""
    generate: Count = 0
    """Tokens at the end of each sequence that the model made and that are stored, without the
    prompt; 0 where the source is the dataset."""
    speculation: Speculation | None = None
    """Under what they were generated, if not by the unchanged model."""
    tokens_per_sequence: Count = 0
    """Tokens stored of each sequence, at random positions; 0 stores all."""
    record: tuple[str, ...] = ()
    """Optional fields of `RoutingRecord` that are stored."""
    readout_tokens: Count = 0
    """Tokens that the readout's default vectors are means over; 0 without a readout."""
    readout_sha256: str = ""
    """Hex digest of the readout's default vectors' file."""
    dtype: str
    """The model's dtype while it was recorded."""
    states_dtype: str
    """Dtype in which states (residual, router_input and the optional fields) are stored."""
    device: str
    """Kind of device that computed it, `cpu` or `cuda`."""
    batch_size: Count
    """Sequences per forward pass."""
    shard_sequences: Count
    """Sequences per shard (the last may hold fewer)."""
    seed: Count
    """Seed of the sampled continuations and positions."""
    norm_kind: NormKind
    """Kind of the norms that feed the routers; `none` also where there are no anchors."""
    norm_eps: float
    """Their epsilon."""
    has_selection_bias: bool = False
    """Whether routers add a bias to their scores where they choose; it is among the anchors."""
    anchors_problem: str = ""
    """Why the routers could not be copied, so that only forms without anchors can be trained; empty
    if the anchors' file is there."""
    command: str
    """The command that makes these traces, less --out and --device."""
    versions: dict[str, str]
    """Versions of the packages it ran on."""
    live_sha256: str = ""
    """Hex digest of the prompts of live traces: their shards are recorded when they are read, and
    have no files. Empty for stored traces."""
    anchors_sha256: str = ""
    """Hex digest of the anchors' file."""
    shards: tuple[ShardEntry, ...] = ()
    """The finished shards."""
    is_complete: bool = False
    """Whether recording came to its end."""
    stop_reason: StopReason = ""
    """Why it ended."""
    format_version: Count = FORMAT_VERSION
    """Version of this layout."""

    @property
    def stored_length(self) -> int:
        """Tokens stored per sequence."""
        length = self.generate or self.sequence_length
        return min(self.tokens_per_sequence or length, length)

    @property
    def num_tokens(self) -> int:
        """Tokens in the finished shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the finished shards on disk."""
        return sum(shard.num_bytes for shard in self.shards)

    def require_same_run(self, other: TraceManifest, folder: Path) -> None:
        """Refuse to let another run write into this run's folder.

        Args:
            other: What the user asks for now.
            folder: Where this manifest lies, for the message.

        Raises:
            ValueError: If the model, an argument or (for unfinished traces) a version differs.
        """
        remedy = "Choose another --out, or pass --overwrite."
        self.geometry.require_match(
            other.geometry, what=f"The traces in {folder} were", remedy=remedy
        )
        progress = {"geometry", "shards", "is_complete", "stop_reason", "anchors_sha256", "command"}
        progress |= {"readout_tokens", "readout_sha256"}
        progress |= {"versions"} if self.is_complete else set()
        for field in dataclasses.fields(self):
            there, here = getattr(self, field.name), getattr(other, field.name)
            if field.name not in progress and there != here:
                raise ValueError(
                    f"The traces in {folder} were recorded with {field.name} {there}, now "
                    f"{field.name} is {here}. {remedy}"
                )

    def __post_init__(self) -> None:
        """Check what a damaged file could say.

        Raises:
            ValueError: If a value is none that a recording can have.
        """
        for name in ("sequence_length", "batch_size", "shard_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.generate >= self.sequence_length:
            raise ValueError(f"generate is {self.generate} of {self.sequence_length} tokens")
        if not set(self.record) <= set(OPTIONAL_FIELDS):
            raise ValueError(f"record {list(self.record)} names other fields than are known")
        if self.states_dtype not in STATE_DTYPES:
            raise ValueError(f"states_dtype {self.states_dtype} is none of {STATE_DTYPES}")
        if not (0 <= self.generated_share <= 1 and 0 <= self.norm_eps < math.inf):
            raise ValueError("generated_share or norm_eps is out of range")

    def require_entry(self, shard: ShardEntry, path: Path) -> None:
        """Check that a shard is one that the layout allows, in names and in sizes.

        Args:
            shard: As it was listed.
            path: Of the file that lists it, for the message.

        Raises:
            ValueError: If it is not.
        """
        num_sequences = shard.num_sequences
        layouts = {} if self.live_sha256 else self._layouts(num_sequences, shard.shard_idx)
        wrong = next(
            (
                f"it lists {name} of {shard.file_bytes.get(name)} bytes"
                for name in sorted({*shard.sha256, *shard.file_bytes, *layouts})
                if name not in layouts
                or name not in shard.sha256
                or not 0 <= shard.file_bytes.get(name, -1) - layouts[name] <= MOST_HEADER_BYTES
            ),
            "",
        )
        if not 1 <= num_sequences <= self.shard_sequences:
            wrong = f"{num_sequences} sequences in shard {shard.shard_idx}"
        if shard.num_tokens != num_sequences * self.stored_length:
            wrong = f"{shard.num_tokens} tokens in {num_sequences} sequences"
        if wrong:
            raise ValueError(f"{path} is damaged ({wrong}). {REMEDY}")

    def _layouts(self, num_sequences: int, shard_idx: int) -> dict[str, int]:
        """Bytes of the tensors of a shard's files, by path."""
        names = [tokens_path(shard_idx)]
        names += [layer_path(layer_idx, shard_idx) for layer_idx in self.geometry.layer_indices]
        num_tokens = num_sequences * self.stored_length
        sizes = _file_bytes(
            self.geometry, self.states_dtype, num_sequences, num_tokens, self.record
        )
        return dict(zip(names, sizes, strict=True))

    def require_whole(self, folder: Path) -> None:
        """Check that every listed file is there with its size; see `ShardEntry.require_whole`."""
        for shard in self.shards:
            shard.require_whole(folder)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, which `read_manifest` rebuilds."""
        values = dataclasses.asdict(self)
        return values | {"geometry": self.geometry.to_dict(), "shards": list(values["shards"])}


@functools.lru_cache(maxsize=8)  # shards are mostly of one size
def _file_bytes(
    geometry: MoEGeometry,
    states_dtype: str,
    num_sequences: int,
    num_tokens: int,
    recorded: tuple[str, ...],
) -> tuple[int, ...]:
    """Bytes of the tensors of each of a shard's files, in the layout's order."""
    dtype: torch.dtype = getattr(torch, states_dtype)
    layouts = shard_layouts(geometry, dtype, num_sequences, num_tokens, recorded)
    return tuple(bytes_of(layout) for layout in layouts.values())


def read_manifest(folder: Path) -> TraceManifest:
    """Read a trace folder's manifest, finished or not.

    Raises:
        FileNotFoundError: If the folder holds no traces.
        ValueError: If the manifest is damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no traces: it has no {MANIFEST_FILE}.")
    manifest = read_versioned(path, FORMAT_VERSION, TraceManifest, REMEDY)
    for shard_idx, shard in enumerate(manifest.shards):
        if shard.shard_idx != shard_idx:
            raise ValueError(
                f"{path} is damaged (shard {shard.shard_idx} at place {shard_idx}). {REMEDY}"
            )
        manifest.require_entry(shard, path)
    return manifest
