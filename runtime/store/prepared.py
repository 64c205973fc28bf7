"""Prepared models: the rest of a model as it is, and its experts' rows as the store holds them.

`foreroute pack` writes one, and wherever a model is loaded it can be given in the model's place:
its rows are read straight into the store's memory. docs/formats.md says what is in the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from foreroute.estimators.artifacts import Count, first_line, read_versioned
from foreroute.estimators.fingerprint import is_same_checkpoint
from foreroute.runtime.store.encodings import Encoder, encoder_named, without
from foreroute.runtime.store.host_store import RowLayout

FORMAT_VERSION = 2
REMEDY = "Pack the model again with foreroute pack."
FileName = Annotated[str, msgspec.Meta(pattern=r"^(experts/layer-[0-9]{3,}|model)\.safetensors$")]
"""What a manifest may name; nothing else is opened."""


@dataclass(frozen=True)
class RowPart:
    """Where a parameter, or a part of its encoding, lies in a row."""

    shape: list[Count]
    """One expert's."""
    dtype: str
    """In torch's word."""
    offset_bytes: Count
    """From the row's beginning."""


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """The experts of one MoE layer."""

    file: FileName
    sha256: str
    """The file's, in hex."""
    blocks_sha256: list[str]
    """Those of its rows in blocks, see `prepared_rows`."""
    experts: Count
    """How many rows."""
    row_bytes: Count
    """Size of one row."""
    parameters: dict[str, RowPart]
    """What lies in a row, by name."""


@dataclass(frozen=True, kw_only=True)
class RestFile:
    """All weights that are no experts."""

    file: FileName
    sha256: str
    """The file's, in hex."""


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """The manifest of a prepared model."""

    source: str
    """The model it was made of, as its user named it."""
    revision: str | None
    """The commit or branch of the source, if it was on the Hub."""
    router_fingerprint: str
    """Fingerprint of the source's routers; bundles are made for these."""
    dtype: str
    """Dtype of the model's parameters."""
    expert_dtype: str
    """How the experts are stored."""
    stays: tuple[str, ...]
    """Parameters that this did not pay for: as the model has them."""
    plain_bytes: Count
    """Size of all experts, as the model has them."""
    exceptions: dict[str, Count]
    """Weights that 12 bits do not reach, and that are listed, by parameter."""
    shards: tuple[RowFile, ...]
    """By MoE layer."""
    rest: RestFile
    """All other weights."""

    versions: dict[str, str]
    """Versions of Python and packages when it was written."""
    format_version: int = FORMAT_VERSION
    """Version of the manifest's form."""

    @classmethod
    def read(cls, path: Path) -> PreparedModel:
        """Read a manifest, of a folder here or of the Hub's cache.

        Raises:
            ValueError: If it is damaged or of another version, or names files of other folders.
        """
        return read_versioned(path, FORMAT_VERSION, cls, REMEDY)

    @property
    def is_exact(self) -> bool:
        """Whether the experts are stored without loss."""
        return self.expert_dtype in ("auto", "lossless") or (
            self.expert_dtype == "bf16" and self.dtype == "bfloat16"
        )

    def download_rows(self, manifest: Path, repo_id: str, **hub: Any) -> None:
        """Have all files of rows in the Hub's cache, beside the manifest that names them.

        Args:
            manifest: The file, in that cache.
            repo_id: Where it came from.
            **hub: See `HubSettings`.

        Raises:
            ValueError: If the Hub does not give them, or they are not in the cache while offline.
        """
        from transformers.utils.hub import cached_files, extract_commit_hash

        commit = extract_commit_hash(str(manifest), None)  # not a later one of the same branch
        settings = {name: value for name, value in hub.items() if name != "trust_remote_code"}
        names = [shard.file for shard in self.shards]
        try:
            cached_files(repo_id, names, **(settings | {"revision": commit}), _commit_hash=commit)
        except OSError as error:
            raise ValueError(
                f"The experts of {repo_id} cannot be downloaded: {first_line(error)}"
            ) from error

    def encoder(self, asked: str, native: Encoder | None) -> Encoder | None:
        """How the rows are encoded.

        Args:
            asked: The `expert_dtype` that the user asked for.
            native: The encoder of a checkpoint in fewer bits, if the source was one.

        Raises:
            ValueError: If another than the model's own was asked for.
        """
        if asked not in ("auto", self.expert_dtype):
            raise ValueError(
                f"The prepared model holds experts in {self.expert_dtype}; expert_dtype={asked} "
                f"needs the source, {self.source}."
            )
        encoder = native or encoder_named(self.expert_dtype)
        return None if encoder is None else without(encoder, *self.stays)

    def require_routers(self, folder: Path, fingerprint: str) -> None:
        """Refuse rows that were made beside other routers than the model has.

        Raises:
            ValueError: If the fingerprints differ.
        """
        if not is_same_checkpoint(self.router_fingerprint, fingerprint):
            raise ValueError(
                f"The rows in {folder} are of another checkpoint than the weights beside them: "
                f"their routers differ. {REMEDY}"
            )

    def require_fits(
        self, folder: Path, layouts: Sequence[RowLayout], num_experts: Sequence[int]
    ) -> None:
        """Refuse rows that are laid out in another way than this program does.

        Args:
            folder: Where they are.
            layouts: How this program lays them out, by layer.
            num_experts: How many it expects, by layer.

        Raises:
            ValueError: If the model, or the way it is to be loaded, does not fit the rows.
        """
        laid_out = [shard.parameters for shard in self.shards]
        is_same = laid_out == [describe_layout(layout) for layout in layouts]
        if not is_same or [shard.experts for shard in self.shards] != list(num_experts):
            raise ValueError(
                f"The rows in {folder} are of a model in {self.dtype} with {len(self.shards)} MoE "
                "layers; it is being loaded as another (its config, its transformers, or --dtype). "
                f"{REMEDY}"
            )


def describe_layout(layout: RowLayout) -> dict[str, RowPart]:
    """What a manifest says of a row, by parameter."""
    return {
        name: RowPart(list(spec.shape), str(spec.dtype).removeprefix("torch."), spec.offset_bytes)
        for name, spec in layout.parameters.items()
    }
