"""The manifest of a trace folder: what was recorded, from what, how, and which shards are there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foreroute.estimators.artifacts import read_versioned
from foreroute.estimators.types import MoEGeometry, NormKind

FORMAT_VERSION = 2  # 1 had no selection bias among the anchors and no positions
MANIFEST_FILE = "manifest.json"
ANCHORS_FILE = "anchors.safetensors"
READOUT_FILE = "readout_vectors.safetensors"
REMEDY = "Remove the folder and collect the traces again."

TextOrigin = Literal["dataset", "generated"]
"""Whose text is recorded: the dataset's, or what the model makes of prompts from it."""
StopReason = Literal["", "tokens-reached", "dataset-exhausted", "max-bytes"]
"""Why recording ended; empty while it goes on."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One finished shard, as the manifest lists it."""

    shard_idx: int
    """0.. in recording order."""
    num_sequences: int
    """Sequences in it."""
    num_tokens: int
    """Tokens in it, all sequences together."""
    sha256: dict[str, str]
    """Hex digest of each of its files, by path below the trace folder."""
    file_bytes: dict[str, int]
    """Size of each of its files."""

    @property
    def num_bytes(self) -> int:
        """Size of its files, all together."""
        return sum(self.file_bytes.values())


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Under which speculative execution the recorded text was generated."""

    bundle: str
    """Folder of the bundle that predicted."""
    bundle_sha256: str
    """Hex digest of its manifest."""
    on_miss: str
    """What was done about experts that were not there."""
    weights: str
    """Gate weights of predicted experts, `true` or `predicted`."""
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
    tokens: int
    """Tokens asked for; whole sequences are recorded, so a few more may be there."""
    sequence_length: int
    """Tokens per sequence as the model runs it, prompt and continuation together."""
    generated_share: float
    """Share of each sequence that the model made itself, 0..1; 0 for another source."""
    source: TextOrigin = "dataset"
    """Whose text is recorded."""
    generate: int = 0
    """Tokens at the end of each sequence that the model made and that are stored, without the
    prompt; 0 where the source is the dataset."""
    speculation: Speculation | None = None
    """Under what they were generated, if not by the unchanged model."""
    tokens_per_sequence: int = 0
    """Tokens stored of each sequence, at random positions; 0 stores all."""
    record: tuple[str, ...] = ()
    """Optional fields of `RoutingRecord` that are stored."""
    readout_tokens: int = 0
    """Tokens that the readout's default vectors are means over; 0 without a readout."""
    readout_sha256: str = ""
    """Hex digest of the readout's default vectors' file."""
    dtype: str
    """The model's dtype while it was recorded."""
    states_dtype: str
    """Dtype in which states (residual, router_input and the optional fields) are stored."""
    device: str
    """Kind of device that computed it, `cpu` or `cuda`."""
    batch_size: int
    """Sequences per forward pass."""
    shard_sequences: int
    """Sequences per shard (the last may hold fewer)."""
    seed: int
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
    format_version: int = FORMAT_VERSION
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

    def require_whole(self, folder: Path) -> None:
        """Check that every listed file is there with its size.

        Raises:
            FileNotFoundError: If one is missing; names it.
            ValueError: If one has another size; names it.
        """
        for shard in self.shards:
            for name, num_bytes in shard.file_bytes.items():
                path = folder / name
                if not path.is_file():
                    raise FileNotFoundError(f"{path} is missing. {REMEDY}")
                if path.stat().st_size != num_bytes:
                    raise ValueError(
                        f"{path} is damaged ({path.stat().st_size} bytes, the manifest says "
                        f"{num_bytes}). {REMEDY}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reverses it."""
        values = dataclasses.asdict(self)
        return values | {"geometry": self.geometry.to_dict(), "shards": list(values["shards"])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TraceManifest:
        """Rebuild from `to_dict`'s output."""
        given = values["speculation"]
        parts = {
            "shards": tuple(ShardEntry(**shard) for shard in values["shards"]),
            "geometry": MoEGeometry.from_dict(values["geometry"]),
            "record": tuple(values["record"]),
            "speculation": Speculation(**given) if given else None,
        }
        return cls(**(values | parts))


def read_manifest(folder: Path) -> TraceManifest:
    """Read a trace folder's manifest, finished or not.

    Raises:
        FileNotFoundError: If the folder holds no traces.
        ValueError: If the manifest is damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no traces: it has no {MANIFEST_FILE}.")
    return read_versioned(path, FORMAT_VERSION, TraceManifest.from_dict, REMEDY)
