"""One collection of traces: what is left to record, whether there is room, and the recording."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from foreroute.data.adapters import MoEModel
from foreroute.data.batch import RecordedBatch, record_batch
from foreroute.data.corpus import documents, token_sequences, windows
from foreroute.data.disk import free_bytes
from foreroute.data.layout import shard_bytes
from foreroute.data.manifest import MANIFEST_FILE, StopReason, TraceManifest, read_manifest
from foreroute.data.recorder import RoutingRecorder
from foreroute.data.trace_writer import TraceWriter
from foreroute.data.traces import Traces
from foreroute.estimators.byte_sizes import format_bytes

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
                self._out, self._manifest, self._moe.found_anchors, overwrite=overwrite
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
        return sum(
            shard_bytes(self._moe.geometry, self._states_dtype, n, n * length) for n in sizes
        )

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
            _Background(threaded=self._moe.model.device.type != "cpu") as background,
            RoutingRecorder(self._moe, self._states_dtype) as recorder,
        ):
            bar = progress.add_task("recording tokens", total=most * manifest.sequence_length)
            progress.advance(bar, writer.manifest.num_tokens)
            for shard_idx in range(len(writer.manifest.shards), num_shards):
                prompts = list(itertools.islice(sequences, manifest.shard_sequences))
                if not prompts:
                    return
                background.wait()
                shard = writer.begin_shard(len(prompts))
                for start in range(0, len(prompts), manifest.batch_size):
                    some = torch.tensor(prompts[start : start + manifest.batch_size])  # [B, P]
                    first_idx = shard_idx * manifest.shard_sequences + start
                    background.run(shard.add_batch, self._recorded(recorder, some, first_idx))
                    progress.advance(bar, len(some) * manifest.sequence_length)
                background.run(writer.finish_shard, shard, recorder.take_expert_sums())

    def _recorded(
        self, recorder: RoutingRecorder, prompts: Tensor, first_idx: int
    ) -> RecordedBatch:
        """Record one batch; its content depends on nothing that came before it."""
        generator = _generator(self._manifest.seed, first_idx)
        length = self._manifest.sequence_length
        return record_batch(self._moe.model, recorder, prompts, length, generator)

    def _stop_reason(self, recorded: TraceManifest, num_shards: int) -> StopReason:
        num_sequences = sum(shard.num_sequences for shard in recorded.shards)
        if num_sequences >= self._num_sequences:
            return "tokens-reached"
        if num_sequences == num_shards * self._manifest.shard_sequences:
            return "max-bytes"
        return "dataset-exhausted"


class _Background:
    """Runs one call after the other beside the caller, or on the spot."""

    def __init__(self, *, threaded: bool) -> None:
        # On the CPU, writing beside the forward pass slows it by more than writing takes.
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._running: Future[None] | None = None

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()
        self.wait()

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function once the last one is done; raises what that one raised."""
        self.wait()
        if self._pool:
            self._running = self._pool.submit(function, *arguments)
        else:
            function(*arguments)

    def wait(self) -> None:
        """Wait for the last call; raises what it raised."""
        if self._running:
            running, self._running = self._running, None
            running.result()


def _generator(seed: int, sequence_idx: int) -> torch.Generator:
    """Draws for the batch that begins with this sequence, the same whenever it is recorded."""
    digest = hashlib.sha256(f"{seed}/{sequence_idx}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
