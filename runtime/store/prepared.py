"""Prepared models: the rest of a model as it is, and its experts' rows as the store holds them.

`foreroute pack` writes one, and wherever a model is loaded it can be given in the model's place:
its rows are read straight into the store's memory. docs/formats.md says what is in the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from torch import Tensor

from foreroute.estimators.artifacts import Count, first_line, read_versioned
from foreroute.estimators.fingerprint import is_same_checkpoint
from foreroute.runtime.store.encodings import Encoder, encoder_named, without
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout

FORMAT_VERSION = 1
REMEDY = "Pack the model again with foreroute pack."
ROWS = "rows"
READ_BYTES = 16 << 20
MOST_READERS = 8
MOST_HEADER_BYTES = 1 << 16
"""A file of rows has one tensor, which is soon described."""
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
        if encoder is None:
            return None
        for name in self.stays:
            encoder = without(encoder, name)
        return encoder

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
            layouts: Of a row, by layer.
            num_experts: By layer.

        Raises:
            ValueError: If the model, or the way it is to be loaded, does not fit the rows.
        """
        laid_out = [(shard.parameters, shard.row_bytes, shard.experts) for shard in self.shards]
        if laid_out != [
            (describe_layout(layout), layout.row_bytes, count)
            for layout, count in zip(layouts, num_experts, strict=True)
        ]:
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


def read_rows(
    prepared: PreparedModel, folder: Path, store: HostExpertStore, tick: Callable[[int], None]
) -> None:
    """Read all experts into a store, several layers at once, each checked against its sha256.

    Args:
        prepared: The manifest.
        folder: Where it was found.
        store: Allocated, not filled.
        tick: Called with the bytes that were read.

    Raises:
        ValueError: If a file is missing or damaged; names it.
    """
    prepared.require_fits(folder, store.layouts, [len(rows) for rows in store.rows])
    fillers = [partial(_read_into, rows, tick) for rows in store.rows]
    read_shards(prepared, folder, fillers)


def read_shards(
    prepared: PreparedModel, folder: Path, readers: Sequence[Callable[[RowStream], None]]
) -> None:
    """Read all layers, several at once, each checked against its sha256.

    Args:
        prepared: The manifest.
        folder: Where it was found.
        readers: By layer; each reads all rows of its shard.

    Raises:
        ValueError: If a file is missing or damaged; names it.
    """
    num_threads = min(MOST_READERS, len(os.sched_getaffinity(0)), len(readers))
    with ThreadPoolExecutor(num_threads) as threads:
        jobs = [
            threads.submit(_read_shard, folder / shard.file, shard, reader)
            for shard, reader in zip(prepared.shards, readers, strict=True)
        ]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


class RowStream:
    """A layer's file while it is read, front to back."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        """Read on from where the rows begin.

        Args:
            file: Opened without a buffer.
            digest: Gets all that is read.
        """
        self._file, self._digest = file, digest

    def read_into(self, view: memoryview) -> int:
        """Fill some bytes of memory with the file's next ones; gives how many there were."""
        at = 0
        while at < len(view):
            count = self._file.readinto(view[at : at + READ_BYTES]) or 0  # type: ignore[attr-defined]
            self._digest.update(view[at : at + count])
            at += count
            if not count:
                break
        return at


def _read_into(rows: Tensor, tick: Callable[[int], None], stream: RowStream) -> None:
    """All rows of a layer, straight into their memory."""
    view = rows.numpy().data.cast("B")
    for at in range(0, len(view), READ_BYTES):
        tick(stream.read_into(view[at : at + READ_BYTES]))


def _read_shard(path: Path, entry: RowFile, reader: Callable[[RowStream], None]) -> None:
    """One layer's rows, as the manifest describes them."""
    if not path.is_file():
        raise ValueError(f"{path} is missing. {REMEDY}")
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), MOST_HEADER_BYTES))
        digest.update(start + header)
        is_whole = _describes(header, [entry.experts, entry.row_bytes])
        if is_whole:
            reader(RowStream(file, digest))
            is_whole = not file.read(1)
    if not is_whole or digest.hexdigest() != entry.sha256:
        raise ValueError(f"{path} is damaged: it is not what the manifest says. {REMEDY}")


def _describes(header: bytes, shape: list[int]) -> bool:
    """Whether a safetensors header is that of such rows and nothing else."""
    try:
        entry = json.loads(header)[ROWS]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    place = {"dtype": "U8", "shape": shape, "data_offsets": [0, math.prod(shape)]}
    return bool(entry == place)
