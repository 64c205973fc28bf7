"""One collection of traces: how large it is, whether there is room, and the recording."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.early_attention import find_early_attention
from foreroute.data.adapters.vocabulary import vocabulary_size
from foreroute.data.batch import RecordedBatch, record_batch
from foreroute.data.columns import RowReading
from foreroute.data.corpus import contents, windows
from foreroute.data.disk import free_bytes
from foreroute.data.layout import shard_bytes
from foreroute.data.manifest import MANIFEST_FILE, StopReason, TraceManifest, read_manifest
from foreroute.data.packing import TokenSequence, token_sequences
from foreroute.data.recorder import EarlyReadout, RoutingRecorder
from foreroute.data.trace_writer import TraceWriter
from foreroute.estimators.byte_sizes import format_bytes
from foreroute.estimators.console import plain_console

logger = logging.getLogger(__name__)

READOUT_TOKENS = 4096  # that the default vectors of a readout are means over, at least


class Collection:
    """What one run of collect-traces records."""

    def __init__(self, moe: MoEModel, tokenizer: Any, manifest: TraceManifest, out: Path) -> None:
        """Say what is collected; nothing runs yet.

        Args:
            moe: The model.
            tokenizer: Its tokenizer.
            manifest: What to record, as it will stand in the folder.
            out: The folder.
        """
        self._moe = moe
        self._tokenizer = tokenizer
        self._manifest = manifest
        self.out = out
        """Folder of the traces."""
        self._states_dtype: torch.dtype = getattr(torch, manifest.states_dtype)
        self._readout: EarlyReadout | None = None
        self._num_sequences = math.ceil(manifest.tokens / manifest.stored_length)
        self._num_shards = math.ceil(self._num_sequences / manifest.shard_sequences)

    def begin(self, *, overwrite: bool) -> TraceWriter:
        """Make the folder; `prepare_readout` was called before.

        Raises:
            ValueError: If something is there already and `overwrite` is off.
        """
        vectors = self._readout.vectors if self._readout else None
        num_tokens = self._num_readout_prompts * self.prompt_length if self._readout else 0
        return TraceWriter.begin(
            self.out,
            dataclasses.replace(self._manifest, readout_tokens=num_tokens),
            self._moe.found_anchors,
            overwrite=overwrite,
            readout_vectors=vectors,
        )

    def prepare_readout(self, vectors: Tensor | None = None) -> Tensor | None:
        """Find what a readout needs, if one is recorded, and measure its default vectors.

        Args:
            vectors: Those of an earlier attempt, [L, E, D]; if None they are measured on the first
                prompts, in passes of which nothing is stored.

        Returns:
            The vectors; None without a readout.

        Raises:
            ValueError: If the model's layers do not allow it; one line says which.
        """
        if "readout" not in self._manifest.record:
            return None
        if self._readout is None:
            sites = find_early_attention(self._moe)
            vectors = self._measured_vectors() if vectors is None else vectors
            self._readout = EarlyReadout(sites=sites, vectors=vectors.to(self._moe.model.device))
        return self._readout.vectors.cpu()

    @property
    def _num_readout_prompts(self) -> int:
        return min(math.ceil(READOUT_TOKENS / self.prompt_length), self._num_sequences)

    def _measured_vectors(self) -> Tensor:
        prompts = list(itertools.islice(self.prompts(skip=0), self._num_readout_prompts))
        with RoutingRecorder(self._moe, self._states_dtype) as recorder:
            for _, some, _ in self._in_batches(prompts, shard_idx=0):
                record_batch(self._moe.model, recorder, some, some.shape[1], torch.Generator())
            sums = recorder.take_expert_sums().values()
        means = [total / count.clamp(min=1).unsqueeze(-1) for total, count in sums]
        return torch.stack(means).cpu()  # [L, E, D]

    def begun(self, *, overwrite: bool) -> TraceManifest | None:
        """The manifest of the same run's earlier attempt, if there was one.

        Raises:
            ValueError: If the folder holds another run's, or a listed file is damaged.
        """
        if overwrite or not (self.out / MANIFEST_FILE).is_file():
            return None
        begun = read_manifest(self.out)
        begun.require_same_run(self._manifest, self.out)
        return begun

    def _bytes_of(self, num_sequences: int) -> int:
        """Bytes of so many sequences, in shards."""
        per_shard = self._manifest.shard_sequences
        length, record = self._manifest.stored_length, self._manifest.record

        def of_one(n: int) -> int:
            return shard_bytes(self._moe.geometry, self._states_dtype, n, n * length, record)

        num_whole, left = divmod(num_sequences, per_shard)
        return num_whole * of_one(per_shard) + (of_one(left) if left else 0)

    def num_shards_within(self, byte_limit: int | None) -> int:
        """How many of the shards stay within a limit.

        Args:
            byte_limit: Bytes; None for no limit.

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

    def require_room(self, num_shards: int, done: int) -> None:
        """Say how much will be written.

        Args:
            num_shards: Shards to have in the end.
            done: Shards that are there.

        Raises:
            ValueError: If the disk has less.
        """
        per_shard = self._manifest.shard_sequences
        sequences = min(self._num_sequences, num_shards * per_shard) - done * per_shard
        if sequences <= 0:
            return  # a run that was killed before its last write
        needed, free = self._bytes_of(sequences), free_bytes(self.out)
        per_token = needed / (sequences * self._manifest.stored_length)
        logger.info(
            "Size: about %s to write (%s a token); %s free on the disk.",
            *(format_bytes(size) for size in (needed, per_token, free)),
        )
        if needed > free:
            raise ValueError(
                f"The traces take about {format_bytes(needed)}, but only {format_bytes(free)} are "
                f"free at {self.out}. Lower --tokens, take --states-dtype int8, or set "
                "--max-bytes."
            )

    @property
    def prompt_length(self) -> int:
        """Tokens of each prompt."""
        manifest = self._manifest
        generated = manifest.generate or round(manifest.sequence_length * manifest.generated_share)
        return max(1, manifest.sequence_length - generated)

    def prompts(self, skip: int) -> Iterator[TokenSequence]:
        """The prompts still to record; the first is made at once, so that no text fails early."""
        manifest, length = self._manifest, self.prompt_length
        reading = RowReading(
            column=manifest.column,
            prompt_tokens=manifest.prompt_tokens,
            tokenizer=self._tokenizer,
        )
        texts = windows(
            lambda: contents(manifest.dataset, manifest.split, reading),  # type: ignore[arg-type]
            manifest.sequence_length,
        )
        every = token_sequences(
            texts,
            self._tokenizer,
            length,
            self._num_sequences * length,
            vocabulary_size(self._moe.model),
        )
        left = itertools.islice(every, skip, None)
        first = list(itertools.islice(left, 1))
        return itertools.chain(first, left)

    def shards(
        self, prompts: Iterator[TokenSequence], num_shards: int
    ) -> Iterator[tuple[int, list[TokenSequence]]]:
        """The prompts of each shard, as long as there are some.

        Args:
            prompts: From the first.
            num_shards: How many shards to have in the end.
        """
        for shard_idx in range(num_shards):
            some = list(itertools.islice(prompts, self._manifest.shard_sequences))
            if not some:
                return
            yield shard_idx, some

    def record(
        self,
        writer: TraceWriter,
        shards: Iterable[tuple[int, list[TokenSequence]]],
        num_shards: int,
        *,
        is_shown: bool = True,
    ) -> None:
        """Record the shards that the writer lacks.

        Args:
            writer: Where they go.
            shards: Index and prompts of each.
            num_shards: How many there will be at most, for the progress bar.
            is_shown: Draw a progress bar.
        """
        manifest = self._manifest
        most = min(self._num_sequences, num_shards * manifest.shard_sequences)
        started, num_tokens = time.monotonic(), 0
        with (
            Progress(console=plain_console(stderr=True), disable=not is_shown) as progress,
            _Background(threaded=self._moe.model.device.type != "cpu") as background,
            self.recorder() as recorder,
        ):
            bar = progress.add_task("recording tokens", total=most * manifest.stored_length)
            for shard_idx, prompts in shards:
                if shard_idx in writer.entries:
                    progress.advance(bar, writer.entries[shard_idx].num_tokens)
                    continue
                background.wait()
                shard = writer.begin_shard(len(prompts), shard_idx)
                for batch in self.batches(recorder, prompts, shard_idx):
                    background.run(shard.add_batch, batch)
                    progress.advance(bar, batch.token_ids.numel())
                    num_tokens += batch.token_ids.numel()
                background.run(writer.finish_shard, shard, recorder.take_expert_sums())
        speed = num_tokens / (time.monotonic() - started)
        logger.info("Recorded %s tokens, %s a second.", f"{num_tokens:,}", f"{speed:,.0f}")

    def recorder(self) -> RoutingRecorder:
        """A recorder of what the manifest asks for."""
        is_int8 = self._states_dtype == torch.int8  # rounded later: a record has no scales
        return RoutingRecorder(
            self._moe,
            None if is_int8 else self._states_dtype,
            with_layer_input="layer_input" in self._manifest.record,
            readout=self._readout,
        )

    def batches(
        self, recorder: RoutingRecorder, prompts: list[TokenSequence], shard_idx: int
    ) -> Iterator[RecordedBatch]:
        """Record one shard; a batch depends on nothing before it (but for an engine's slots).

        Args:
            recorder: Open.
            prompts: The shard's.
            shard_idx: 0.. in recording order.
        """
        manifest = self._manifest
        for first_idx, some, ends in self._in_batches(prompts, shard_idx):
            yield record_batch(
                self._moe.model,
                recorder,
                some,
                manifest.sequence_length,
                _generator(f"{manifest.seed}/{first_idx}"),
                self._positions(len(some), first_idx),
                ends,
            )

    def texts(self, prompts: list[TokenSequence], shard_idx: int) -> Iterator[RecordedBatch]:
        """The same batches of text that is not generated, without records: no model runs."""
        for first_idx, some, ends in self._in_batches(prompts, shard_idx):
            positions = self._positions(len(some), first_idx)
            if positions is None:
                positions = torch.arange(some.shape[1]).expand(len(some), -1)
            yield RecordedBatch(
                token_ids=some.gather(1, positions),
                positions=positions,
                num_prompt_tokens=ends.unsqueeze(1),
                records={},
            )

    def _in_batches(
        self, prompts: list[TokenSequence], shard_idx: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first sequence's index of each batch, its prompts, [B, P], and their ends, [B]."""
        size, first_idx = self._manifest.batch_size, shard_idx * self._manifest.shard_sequences
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            ends = [
                len(ids) if num_prompt_tokens is None else num_prompt_tokens
                for ids, num_prompt_tokens in some
            ]
            yield first_idx + start, torch.tensor([ids for ids, _ in some]), torch.tensor(ends)

    def _positions(self, num_sequences: int, first_idx: int) -> Tensor | None:
        """Which tokens to keep, [B, N], ascending; None for all."""
        manifest = self._manifest
        first = manifest.sequence_length - manifest.generate if manifest.generate else 0
        num_there = manifest.sequence_length - first
        if manifest.stored_length == manifest.sequence_length:
            return None
        if manifest.stored_length == num_there:
            return torch.arange(first, manifest.sequence_length).expand(num_sequences, -1)
        generator = _generator(f"{manifest.seed}/{first_idx}/positions")
        drawn = torch.rand(num_sequences, num_there, generator=generator)
        chosen: Tensor = drawn.topk(manifest.stored_length).indices.sort().values
        return chosen + first

    def stop_reason(self, num_sequences: int, num_shards: int) -> StopReason:
        """Why recording ended.

        Args:
            num_sequences: Sequences recorded.
            num_shards: Shards that were allowed.
        """
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


def _generator(label: str) -> torch.Generator:
    """Draws that follow from a label alone, the same whenever a batch is recorded."""
    digest = hashlib.sha256(label.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
