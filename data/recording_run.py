"""One run of collect-traces, by one process or by several: what is done, what is whose, the end."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from foreroute.data.collection import Collection
from foreroute.data.manifest import REMEDY, ShardEntry, read_manifest
from foreroute.data.packing import TokenSequence
from foreroute.data.prompt_file import PromptFile
from foreroute.data.trace_writer import (
    PENDING,
    TraceWriter,
    remove_pending,
    remove_unlisted,
)
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import require_digest
from foreroute.estimators.output import LockOwner, claim, owner_of
from foreroute.estimators.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


class ShardsElsewhere(Exception):
    """The traces cannot be put together yet; the message says what to do."""


class Opened(NamedTuple):
    """What rank 0 found or made, and all go by."""

    owner: LockOwner | None
    """Who holds the folder on rank 0's disk."""
    vectors: Tensor | None
    """Default vectors of the readout, [L, E, D], if one is recorded."""
    prompts: str
    """Hex sha256 of the prompts; empty for a process alone, which makes them as it goes."""


def run_collection(
    collection: Collection, byte_limit: int | None, *, overwrite: bool, ranks: Ranks = ALONE
) -> Traces:
    """Record what is missing.

    Shards are dealt out to the processes, and are the same whoever records them.

    Args:
        collection: What to record, and where to.
        byte_limit: Stop before the traces take more bytes; None for no limit.
        overwrite: Replace traces that lie there.
        ranks: The processes that share the work.

    Returns:
        The finished traces.

    Raises:
        ShardsElsewhere: If all is recorded, but other machines did so on disks of their own.
        ValueError: If the folder holds something else, somebody else writes it, or the disk has
            too little room.
    """
    with contextlib.ExitStack() as held:
        return _RecordingRun(collection, ranks, held).run(byte_limit, overwrite=overwrite)


class _RecordingRun:
    """The steps of `run_collection`."""

    def __init__(self, collection: Collection, ranks: Ranks, held: contextlib.ExitStack) -> None:
        self._collection, self._ranks, self._held = collection, ranks, held
        self._out = collection.out
        self._prompts: PromptFile | Iterator[TokenSequence] | None = None

    def run(self, byte_limit: int | None, *, overwrite: bool) -> Traces:
        """See `run_collection`."""
        collection, ranks = self._collection, self._ranks
        num_shards = collection.num_shards_within(byte_limit)
        opened = ranks.first(lambda: self._open(num_shards, overwrite=overwrite))
        if opened is None:
            return Traces.open(self._out)
        if not ranks.is_alone:
            self._join(opened, num_shards, overwrite=overwrite)
        writer = TraceWriter(self._out, read_manifest(self._out), is_shared=not ranks.is_alone)
        self._require_whole(writer)
        shards, total = self._shards(writer, num_shards)
        collection.record(writer, shards, num_shards, is_shown=ranks.is_first)
        writer.entries = self._entries_of_all(writer)
        if problem := ranks.first(lambda: self._what_is_elsewhere(writer, total)):
            raise ShardsElsewhere(problem)
        ranks.first(lambda: self._finish(writer, num_shards))
        return Traces.open(self._out)

    def _open(
        self, num_shards: int, *, overwrite: bool, vectors: Tensor | None = None
    ) -> Opened | None:
        """Claim the folder on this machine's disk, and make it or find what is there.

        Args:
            num_shards: Shards to have in the end.
            overwrite: Replace what is there.
            vectors: Default vectors of the readout, if rank 0 has them already.

        Returns:
            None if nothing is left to do.
        """
        collection = self._collection
        self._held.enter_context(claim(self._out))
        begun = collection.begun(overwrite=overwrite)
        entries = TraceWriter(self._out, begun).entries if begun else {}
        if begun and begun.is_complete:
            begun.require_whole(self._out)
            if begun.stop_reason != "max-bytes" or len(entries) >= num_shards:
                remove_pending(self._out)
                logger.info("%s is complete already; nothing to do.", self._out)
                return None
        collection.require_room(num_shards, len(entries))
        prompts = PromptFile.find(self._out / PENDING, collection.prompt_length)
        made = iter(prompts) if prompts else collection.prompts(skip=0)
        if begun and vectors is None and "readout" in begun.record:
            vectors = Traces(self._out, begun, None).readout_vectors()
        vectors = collection.prepare_readout(vectors)
        if begun:
            logger.info("Going on after %d of %d shards.", len(entries), num_shards)
            remove_unlisted(self._out, entries.values())
        else:
            collection.begin(overwrite=overwrite)
        self._prompts = made
        if not self._ranks.is_alone:
            (self._out / PENDING).mkdir(exist_ok=True)
            length = collection.prompt_length
            prompts = prompts or PromptFile.write(self._out / PENDING, made, length)
            self._prompts = prompts
        return Opened(owner_of(self._out), vectors, prompts.digest if prompts else "")

    def _join(self, opened: Opened, num_shards: int, *, overwrite: bool) -> None:
        """Go by what rank 0 opened, on its disk or on one of this machine."""
        ranks, length = self._ranks, self._collection.prompt_length
        is_common = owner_of(self._out) == opened.owner
        if ranks.local_rank == 0 and not is_common:
            self._open(num_shards, overwrite=overwrite, vectors=opened.vectors)
        ranks.wait()
        self._prompts = PromptFile.find(self._out / PENDING, length)
        if self._prompts is None or self._prompts.digest != opened.prompts:
            raise ValueError(
                f"Process {ranks.rank} has other prompts in {self._out} than the first process: "
                "dataset and tokenizer must be the same on all machines."
            )
        self._collection.prepare_readout(opened.vectors)

    def _require_whole(self, writer: TraceWriter) -> None:
        """Check the bytes of the shards that are there; every process checks some."""
        ranks = self._ranks
        for shard_idx, entry in writer.entries.items():
            if shard_idx % ranks.num_ranks == ranks.rank:
                entry.require_whole(self._out)
                for name, digest in entry.sha256.items():
                    require_digest(self._out / name, digest, REMEDY)

    def _shards(
        self, writer: TraceWriter, num_shards: int
    ) -> tuple[Iterable[tuple[int, list[TokenSequence]]], int | None]:
        """The shards that this process records, and how many there are in all if that is known."""
        ranks, prompts = self._ranks, self._prompts
        if not isinstance(prompts, PromptFile):
            assert prompts is not None
            return self._collection.shards(prompts, num_shards), None
        writer.entries = self._entries_of_all(writer)
        size = writer.manifest.shard_sequences
        total = min(num_shards, math.ceil(len(prompts) / size))
        left = [shard_idx for shard_idx in range(total) if shard_idx not in writer.entries]
        mine = left[ranks.rank :: ranks.num_ranks]
        return ((i, list(prompts.rows(i * size, (i + 1) * size))) for i in mine), total

    def _entries_of_all(self, writer: TraceWriter) -> dict[int, ShardEntry]:
        """The finished shards that any of the processes knows of."""
        found: dict[int, ShardEntry] = {}
        for entries in self._ranks.gather(writer.entries):
            found |= entries
        return dict(sorted(found.items()))

    def _what_is_elsewhere(self, writer: TraceWriter, total: int | None) -> str:
        """What to do about shards that are not on this disk; empty if all are."""
        here = sum(entry.is_in(self._out) for entry in writer.entries.values())
        total = len(writer.entries) if total is None else total
        if here == total:
            return ""
        return (
            f"All {total} shards are recorded, {here} of them here and the others on other "
            f"machines. Copy their folders over {self._out}, and run the same command again: it "
            "puts the manifest together."
        )

    def _finish(self, writer: TraceWriter, num_shards: int) -> None:
        """List all shards in the manifest."""
        num_sequences = sum(entry.num_sequences for entry in writer.entries.values())
        writer.finish(self._collection.stop_reason(num_sequences, num_shards))
