"""Traces of which nothing is stored: a shard is recorded when it is read, by the running model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.data.adapters import (
    MoEModel,
    discover,
    load_model,
    load_tokenizer,
    resolve_device,
)
from foreroute.data.collection import Collection
from foreroute.data.layout import Layout, shard_bytes, tokens_path
from foreroute.data.manifest import ShardEntry, TraceManifest, read_manifest
from foreroute.data.packing import TokenSequence
from foreroute.data.trace_writer import ShardRows
from foreroute.data.traces import Traces, read_finished
from foreroute.estimators.byte_sizes import format_bytes
from foreroute.estimators.types import LayerAnchors

BUFFER_BYTES = 1 << 30


class MemoryFile:
    """A shard's file that lies in memory, filled row by row."""

    def __init__(self, layout: Layout) -> None:
        """Allocate every tensor of the layout."""
        self.tensors = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in layout.items()}
        self._num_rows = dict.fromkeys(layout, 0)

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the next rows of some of the tensors, converted to the dtype of the layout."""
        for name, rows in tensors.items():
            start = self._num_rows[name]
            self.tensors[name][start : start + len(rows)] = rows
            self._num_rows[name] += len(rows)


class LiveTraces(Traces):
    """Reads like stored traces of the same request; only their manifest and anchors are on disk.

    The shards read last stay in memory as far as `buffer_bytes` allows; any other is recorded
    again, by the same passes, when it is read again.
    """

    def __init__(
        self,
        folder: Path,
        manifest: TraceManifest,
        anchors: LayerAnchors | None,
        collection: Collection,
        prompts: list[TokenSequence],
        buffer_bytes: int,
    ) -> None:
        """Take what shards are recorded by; `begin` and `open` make all of it.

        Args:
            folder: Where manifest and anchors are.
            manifest: What shards hold.
            anchors: Copies of the model's routers, if they can be made.
            collection: Records a shard.
            prompts: Of all sequences, in order.
            buffer_bytes: Most bytes of shards to keep in memory.
        """
        super().__init__(folder, manifest, anchors)
        self._collection = collection
        self._prompts = prompts
        self._buffer_bytes = buffer_bytes
        self._tokens: dict[int, MemoryFile] = {}
        self._shards: dict[int, dict[str, MemoryFile]] = {}  # oldest first
        self.num_recorded_tokens = 0
        """Tokens recorded so far, counted again each time."""
        self.peak_bytes = 0
        """Most that the buffer held."""

    @classmethod
    def begin(
        cls,
        moe: MoEModel,
        tokenizer: Any,
        manifest: TraceManifest,
        folder: Path,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        overwrite: bool = False,
    ) -> LiveTraces:
        """Make traces of a model without running it over them yet.

        Args:
            moe: The model, which will run whenever shards are read.
            tokenizer: Its tokenizer.
            manifest: What to record; shards are made as small as the buffer needs.
            folder: Where manifest and anchors go, so that the traces can be opened again.
            buffer_bytes: Most bytes of shards to keep in memory.
            overwrite: Replace what is there.

        Raises:
            ValueError: If the dataset has no text, the model's layers do not allow what is asked
                for, the buffer is too small, or the folder holds something.
        """
        one = _bytes_of(manifest, 1)
        if 2 * one > buffer_bytes:
            raise ValueError(
                f"A buffer of {format_bytes(buffer_bytes)} holds less than two sequences of "
                f"{format_bytes(one)}; raise --buffer or lower --sequence-length."
            )
        per_shard = min(manifest.shard_sequences, buffer_bytes // one // 2)
        manifest = dataclasses.replace(manifest, shard_sequences=per_shard)
        prompts = list(Collection(moe, tokenizer, manifest, folder).prompts(skip=0))
        shards = tuple(_entries(manifest, len(prompts)))
        is_whole = sum(shard.num_tokens for shard in shards) >= manifest.tokens
        manifest = dataclasses.replace(
            manifest,
            live_sha256=_digest(prompts),
            shards=shards,
            is_complete=True,
            stop_reason="tokens-reached" if is_whole else "dataset-exhausted",
        )
        collection = Collection(moe, tokenizer, manifest, folder)
        collection.prepare_readout()
        collection.begin(overwrite=overwrite)
        manifest = read_manifest(folder)
        return cls(folder, manifest, moe.found_anchors, collection, prompts, buffer_bytes)

    @classmethod
    def open(cls, folder: Path) -> LiveTraces:
        """Load the model again, to go on reading.

        Raises:
            FileNotFoundError: If model or dataset are not there any more.
            ValueError: If one of them is not the same.
        """
        folder = Path(folder)
        manifest, anchors = read_finished(folder)
        device = resolve_device(manifest.device)
        model = load_model(
            manifest.model, dtype=manifest.dtype, device=device, revision=manifest.revision or None
        )
        moe = discover(model, manifest.model)
        what = f"The traces in {folder} were"
        manifest.geometry.require_match(moe.geometry, what=what, remedy="Train again.")
        tokenizer = load_tokenizer(manifest.model, revision=manifest.revision or None)
        collection = Collection(moe, tokenizer, manifest, folder)
        prompts = list(collection.prompts(skip=0))
        if _digest(prompts) != manifest.live_sha256:
            raise ValueError(
                f"{folder} was made of other text: dataset {manifest.dataset} has changed since. "
                "Train again."
            )
        traces = cls(folder, manifest, anchors, collection, prompts, BUFFER_BYTES)
        is_read = "readout" in manifest.record
        collection.prepare_readout(traces.readout_vectors() if is_read else None)
        return traces

    def _read_shard(self, name: str, shard_idx: int, layout: Layout) -> dict[str, Tensor]:
        is_of_tokens = name == tokens_path(shard_idx)
        file = self._token_file(shard_idx) if is_of_tokens else self._shard(shard_idx)[name]
        return {tensor: file.tensors[tensor] for tensor in layout}

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the shards in memory now."""
        files = (file for shard in self._shards.values() for file in shard.values())
        return sum(tensor.nbytes for file in files for tensor in file.tensors.values())

    def _shard(self, shard_idx: int) -> dict[str, MemoryFile]:
        """A shard's files by name, recorded if they are not in the buffer."""
        if shard_idx not in self._shards:
            needed = _bytes_of(self.manifest, self.manifest.shards[shard_idx].num_sequences)
            while self._shards and self.buffered_bytes + needed > self._buffer_bytes:
                del self._shards[next(iter(self._shards))]
            self._shards[shard_idx] = self._recorded(shard_idx)
            self._tokens[shard_idx] = self._shards[shard_idx][tokens_path(shard_idx)]
            self.peak_bytes = max(self.peak_bytes, self.buffered_bytes)
        return self._shards[shard_idx]

    def _recorded(self, shard_idx: int) -> dict[str, MemoryFile]:
        rows = self._empty(shard_idx)
        with self._collection.recorder() as recorder:
            for batch in self._collection.batches(recorder, self._prompts_of(shard_idx), shard_idx):
                rows.add_batch(batch)
            rows.complete(recorder.take_expert_sums())
        self.num_recorded_tokens += self.manifest.shards[shard_idx].num_tokens
        return rows.files

    def _token_file(self, shard_idx: int) -> MemoryFile:
        """A shard's tokens, always kept; the model need not run for text that it did not make."""
        if shard_idx not in self._tokens:
            if self.manifest.generate or self.manifest.generated_share:
                self._shard(shard_idx)
            else:
                rows = self._empty(shard_idx)
                for batch in self._collection.texts(self._prompts_of(shard_idx), shard_idx):
                    rows.add_batch(batch)
                rows.complete({})
                self._tokens[shard_idx] = rows.files[tokens_path(shard_idx)]
        return self._tokens[shard_idx]

    def _empty(self, shard_idx: int) -> ShardRows[MemoryFile]:
        num_sequences = self.manifest.shards[shard_idx].num_sequences
        return ShardRows(
            self.manifest, num_sequences, shard_idx, lambda _, layout: MemoryFile(layout)
        )

    def _prompts_of(self, shard_idx: int) -> list[TokenSequence]:
        start = shard_idx * self.manifest.shard_sequences
        return self._prompts[start : start + self.manifest.shards[shard_idx].num_sequences]


def _bytes_of(manifest: TraceManifest, num_sequences: int) -> int:
    """Bytes of a shard of so many sequences."""
    return shard_bytes(
        manifest.geometry,
        getattr(torch, manifest.states_dtype),
        num_sequences,
        num_sequences * manifest.stored_length,
        manifest.record,
    )


def _entries(manifest: TraceManifest, num_sequences: int) -> Iterator[ShardEntry]:
    for shard_idx, start in enumerate(range(0, num_sequences, manifest.shard_sequences)):
        here = min(manifest.shard_sequences, num_sequences - start)
        yield ShardEntry(
            shard_idx=shard_idx,
            num_sequences=here,
            num_tokens=here * manifest.stored_length,
            sha256={},
            file_bytes={},
        )


def _digest(prompts: list[TokenSequence]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(torch.tensor(prompt.token_ids).numpy().tobytes())
    return digest.hexdigest()
