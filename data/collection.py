"""One collection of traces: what is left to record, whether there is room, and the recording."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from foreroute.data.adapters import MoEModel
from foreroute.data.batch import RecordedBatch, layer_shards, record_batch, token_shard
from foreroute.data.corpus import documents, token_sequences, windows
from foreroute.data.manifest import MANIFEST_FILE, StopReason, TraceManifest, read_manifest
from foreroute.data.recorder import RoutingRecorder
from foreroute.data.sizes import format_bytes, free_bytes, shard_bytes
from foreroute.data.trace_writer import TraceWriter
from foreroute.data.traces import Traces

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # of usual text, so that a piece of a document is about one sequence


class Collection:
    """One run of collect-traces, from its arguments to the finished folder."""

    def __init__(self, moe: MoEModel, tokenizer: Any, manifest: TraceManifest, out: Path) -> None:
        self._moe = moe
        self._tokenizer = tokenizer
        self._manifest = manifest
        self._out = out
        self._states_dtype: torch.dtype = getattr(torch, manifest.states_dtype)
        self._num_sequences = math.ceil(manifest.tokens / manifest.sequence_length)
        self._num_shards = math.ceil(self._num_sequences / manifest.shard_sequences)

    def run(self, byte_limit: int | None, *, overwrite: bool) -> Traces:
        """Record what is missing."""
        begun = self._begun(overwrite=overwrite)
        num_shards = self._num_shards_within(byte_limit)
        done = len(begun.shards) if begun else 0
        if begun and begun.is_complete and (begun.stop_reason != "max-bytes" or done >= num_shards):
            logger.info("%s is complete already; nothing to do.", self._out)
            return Traces.open(self._out)
        self._require_room(num_shards, done)
        sequences = self._sequences(skip=done * self._manifest.shard_sequences)
        if begun:
            logger.info("Going on after %d of %d shards.", done, num_shards)
            writer = TraceWriter(self._out, begun)
        else:
            writer = TraceWriter.begin(
                self._out, self._manifest, self._moe.anchors, overwrite=overwrite
            )
        self.record(writer, sequences, num_shards)
        writer.finish(self._stop_reason(writer.manifest, num_shards))
        return Traces.open(self._out)

    def _begun(self, *, overwrite: bool) -> TraceManifest | None:
        """The manifest of the same run's earlier attempt, if there was one."""
        if overwrite or not (self._out / MANIFEST_FILE).is_file():
            return None
        begun = read_manifest(self._out)
        begun.require_same_run(self._manifest, self._out)
        begun.require_whole(self._out)
        return begun

    def _bytes_of(self, num_sequences: int) -> int:
        """Bytes of so many sequences, in shards."""
        per_shard = self._manifest.shard_sequences
        sizes = [per_shard] * (num_sequences // per_shard)
        sizes += [num_sequences % per_shard] * (num_sequences % per_shard > 0)
        length = self._manifest.sequence_length
        return sum(shard_bytes(self._moe.geometry, self._states_dtype, n, length) for n in sizes)

    def _num_shards_within(self, byte_limit: int | None) -> int:
        """How many of the shards stay within the limit.

        Raises:
            ValueError: If not even one does.
        """
        per_shard = self._manifest.shard_sequences
        if byte_limit is None or self._bytes_of(self._num_sequences) <= byte_limit:
            return self._num_shards
        one = self._bytes_of(min(per_shard, self._num_sequences))
        if byte_limit < one:
            raise ValueError(
                f"--max-bytes {format_bytes(byte_limit)} is less than one shard, "
                f"{format_bytes(one)}. Raise it or lower --shard-tokens."
            )
        return byte_limit // one

    def _require_room(self, num_shards: int, done: int) -> None:
        """Say how much will be written.

        Raises:
            ValueError: If the disk has less.
        """
        per_shard = self._manifest.shard_sequences
        sequences = min(self._num_sequences, num_shards * per_shard) - done * per_shard
        needed, free = self._bytes_of(sequences), free_bytes(self._out)
        per_token = needed / (sequences * self._manifest.sequence_length)
        logger.info(
            "Size: about %s to write (%s a token); %s free on the disk.",
            *(format_bytes(size) for size in (needed, per_token, free)),
        )
        if needed > free:
            raise ValueError(
                f"The traces take about {format_bytes(needed)}, but only {format_bytes(free)} are "
                f"free at {self._out}. Lower --tokens, take --states-dtype bfloat16, or set "
                "--max-bytes."
            )

    def _sequences(self, skip: int) -> Iterator[list[int]]:
        """The prompts still to record; the first is made at once, so that no text fails early."""
        manifest = self._manifest
        generated = round(manifest.sequence_length * manifest.generated_share)
        length = max(1, manifest.sequence_length - generated)
        texts = windows(
            lambda: documents(manifest.dataset, manifest.split),  # type: ignore[arg-type]
            num_characters=CHARACTERS_PER_TOKEN * manifest.sequence_length,
        )
        every = token_sequences(texts, self._tokenizer, length, self._num_sequences * length)
        left = itertools.islice(every, skip, None)
        first = list(itertools.islice(left, 1))
        return itertools.chain(first, left)

    def record(self, writer: TraceWriter, sequences: Iterator[list[int]], num_shards: int) -> None:
        """Record until there are so many shards, or no sequences are left.

        Args:
            writer: Where they go.
            sequences: Prompts, from the first that the writer lacks.
            num_shards: How many to have in the end.
        """
        manifest = self._manifest
        most = min(self._num_sequences, num_shards * manifest.shard_sequences)
        with (
            Progress(console=Console(stderr=True)) as progress,
            ThreadPoolExecutor(1) as background,
            RoutingRecorder(self._moe, self._states_dtype) as recorder,
        ):
            bar = progress.add_task("recording tokens", total=most * manifest.sequence_length)
            progress.advance(bar, writer.manifest.num_tokens)
            writing: Future[None] | None = None
            for shard_idx in range(len(writer.manifest.shards), num_shards):
                batches = []
                for batch in self._batches(recorder, sequences, shard_idx):
                    batches.append(batch)
                    progress.advance(bar, batch.token_ids.numel())
                if writing:
                    writing.result()
                if not batches:
                    return
                layers = layer_shards(batches, recorder.take_expert_sums())
                writing = background.submit(writer.add_shard, token_shard(batches), layers)
                if self._moe.model.device.type == "cpu":
                    # Writing alongside would slow the forward pass by more than it takes.
                    writing.result()
            if writing:
                writing.result()

    def _batches(
        self, recorder: RoutingRecorder, sequences: Iterator[list[int]], shard_idx: int
    ) -> Iterator[RecordedBatch]:
        """Record one shard; its content depends on nothing that came before it."""
        manifest = self._manifest
        prompts = list(itertools.islice(sequences, manifest.shard_sequences))
        for start in range(0, len(prompts), manifest.batch_size):
            first_idx = shard_idx * manifest.shard_sequences + start
            yield record_batch(
                self._moe.model,
                recorder,
                torch.tensor(prompts[start : start + manifest.batch_size]),
                manifest.sequence_length,
                _generator(manifest.seed, first_idx),
            )

    def _stop_reason(self, recorded: TraceManifest, num_shards: int) -> StopReason:
        num_sequences = sum(shard.num_sequences for shard in recorded.shards)
        if num_sequences >= self._num_sequences:
            return "tokens-reached"
        if num_sequences == num_shards * self._manifest.shard_sequences:
            return "max-bytes"
        return "dataset-exhausted"


def _generator(seed: int, sequence_idx: int) -> torch.Generator:
    """Draws for the batch that begins with this sequence, the same whenever it is recorded."""
    digest = hashlib.sha256(f"{seed}/{sequence_idx}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
