"""Maps a prepared model's rows, so that all engines of a host have one copy of them."""

from __future__ import annotations

import hashlib
import mmap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from foreroute.estimators.artifacts import require_digest
from foreroute.runtime.store.encodings import Encoder
from foreroute.runtime.store.host_store import ALIGNMENT_BYTES, HostExpertStore, RowLayout
from foreroute.runtime.store.pinning import PinningRefused, lock
from foreroute.runtime.store.prepared import REMEDY, PreparedModel, RowFile
from foreroute.runtime.store.prepared_rows import Block, blocks_of, bytes_of, damaged, run


def map_rows(
    prepared: PreparedModel,
    folder: Path,
    experts: Sequence[nn.Module],
    encoder: Encoder | None,
    tick: Callable[[int], None],
    *,
    is_pinned: bool,
) -> HostExpertStore:
    """A store whose rows are the files' pages in memory, each block checked against its sha256.

    Whoever maps the same files has the same pages. For a GPU they are page-locked, by each process
    for itself, and cannot be written.

    Args:
        prepared: The manifest.
        folder: Where it was found.
        experts: The experts modules, in the manifest's order.
        encoder: How the rows are encoded.
        tick: Called with the bytes that were checked.
        is_pinned: Page-lock the memory, so that a CUDA device can copy from it unattended.

    Raises:
        ValueError: If a file is missing, damaged or cannot be page-locked; names it.
    """
    store = HostExpertStore([], is_pinned=False)
    store.layouts = [RowLayout.of(module, encoder) for module in experts]
    prepared.require_fits(folder, store.layouts, [shard.experts for shard in prepared.shards])
    jobs = [partial(require_digest, folder / prepared.rest.file, prepared.rest.sha256, REMEDY)]
    for shard in prepared.shards:
        path = folder / shard.file
        rows = _mapped(path, shard, is_pinned=is_pinned)
        blocks = blocks_of(path, bytes_of(rows), shard.blocks_sha256)
        jobs += [partial(_check, block, tick) for block in blocks]
        store.rows.append(rows)
    run(jobs)
    return store


def _mapped(path: Path, shard: RowFile, *, is_pinned: bool) -> Tensor:
    """One layer's rows, [E, row_bytes] uint8, the last of the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing. {REMEDY}")
    num_bytes = shard.experts * shard.row_bytes
    begin = path.stat().st_size - num_bytes
    if begin < 0:
        raise damaged(path)
    # what is written to a copy-on-write page is this process' own; a locked page must be shared
    access = mmap.ACCESS_READ if is_pinned else mmap.ACCESS_COPY
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=access)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
    if is_pinned:
        _lock(memory, whole, path, begin)
    return whole[begin:].view(shard.experts, shard.row_bytes)


def _lock(memory: mmap.mmap, whole: Tensor, path: Path, begin: int) -> None:
    """Page-lock a mapping until it ends."""
    if begin % ALIGNMENT_BYTES:
        raise ValueError(f"{path} has rows where no GPU reads them at full rate. {REMEDY}")
    try:
        lock(memory, whole.data_ptr(), whole.nbytes, is_read_only=True)
    except PinningRefused as refusal:
        raise ValueError(
            f"CUDA could not lock {path} in memory (status {refusal}): lay the prepared model into "
            "/dev/shm, or load it without share_experts."
        ) from refusal


def _check(block: Block, tick: Callable[[int], None]) -> None:
    if hashlib.sha256(block.room).hexdigest() != block.sha256:
        raise damaged(block.path)
    tick(len(block.room))
