"""Reads a prepared model's rows as fast as its cores can check them, each block by its sha256."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from foreroute.estimators.artifacts import require_digest
from foreroute.runtime.store.host_store import ALIGNMENT_BYTES, HostExpertStore
from foreroute.runtime.store.prepared import REMEDY, PreparedModel, RowFile

ROWS = "rows"
BLOCK_BYTES = 32 << 20
"""Rows of this size have a sha256 of their own, so that all cores can check one layer."""
PIECE_BYTES = 256 << 10
"""Read at once, and hashed while a core's own cache still holds it."""
LENGTH_BYTES = 8
"""A safetensors file begins with its header's length in so many bytes."""
MOST_READERS = 16
MOST_HEADER_BYTES = 1 << 16


def block_digests(content: memoryview) -> list[str]:
    """Hex sha256 of each block of `BLOCK_BYTES`, on all cores."""
    blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(lambda block: hashlib.sha256(block).hexdigest(), blocks))


def bytes_of(rows: Tensor) -> memoryview:
    """The memory of contiguous bytes, [n, m] uint8."""
    return rows.numpy().data.cast("B")


def aligning(rows: Tensor) -> dict[str, str]:
    """Metadata of such a length that the rows of a safetensors file lie on a boundary for kernels.

    Args:
        rows: The file's one tensor, [E, row_bytes] uint8.
    """
    entry = {"dtype": "U8", "shape": list(rows.shape), "data_offsets": [0, rows.nbytes]}
    header = {"__metadata__": {"padding": ""}, ROWS: entry}
    begin = LENGTH_BYTES + len(json.dumps(header, separators=(",", ":")))
    return {"padding": " " * (-begin % ALIGNMENT_BYTES)}


def read_rows(
    prepared: PreparedModel, folder: Path, store: HostExpertStore, tick: Callable[[int], None]
) -> None:
    """Read all experts into a store, block by block on all cores, each checked against its sha256.

    Args:
        prepared: The manifest.
        folder: Where it was found.
        store: Allocated, not filled.
        tick: Called with the bytes that were read.

    Raises:
        ValueError: If a file is missing or damaged; names it.
    """
    prepared.require_fits(folder, store.layouts, [len(rows) for rows in store.rows])
    rest = folder / prepared.rest.file
    jobs = [partial(require_digest, rest, prepared.rest.sha256, REMEDY)]
    for shard, rows in zip(prepared.shards, store.rows, strict=True):
        blocks = blocks_of(folder / shard.file, bytes_of(rows), shard.blocks_sha256)
        jobs += [partial(_read_block, block, tick) for block in blocks]
    run(jobs)


def read_layer(folder: Path, shard: RowFile, rows: Tensor, tick: Callable[[int], None]) -> None:
    """Read the experts of one layer, each block checked against its sha256.

    Args:
        folder: Where the prepared model was found.
        shard: The manifest's entry.
        rows: Written, [E, row_bytes] uint8.
        tick: Called with the bytes that were read.

    Raises:
        ValueError: If the file is missing or damaged; names it.
    """
    blocks = blocks_of(folder / shard.file, bytes_of(rows), shard.blocks_sha256)
    run([partial(_read_block, block, tick) for block in blocks])


def run(calls: Sequence[Callable[[], None]]) -> None:
    """Run all of them on all cores; the first that raises ends the others.

    Args:
        calls: Take no arguments, and need no order.
    """
    with ThreadPoolExecutor(min(MOST_READERS, len(os.sched_getaffinity(0)))) as threads:
        jobs = [threads.submit(call) for call in calls]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


class Block(NamedTuple):
    """Part of a file of rows, and where it is to lie."""

    path: Path
    at: int
    """First byte in the file."""
    room: memoryview
    """Memory of the block's size."""
    sha256: str
    """What it must have, in hex."""


def blocks_of(path: Path, rows: memoryview, digests: list[str]) -> list[Block]:
    """The blocks of one layer's file.

    Args:
        path: The file.
        rows: Where they are to lie.
        digests: What the manifest says of each.

    Raises:
        ValueError: If the file is missing, or its header is not that of such rows.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing. {REMEDY}")
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        size = int.from_bytes(start, "little")
        header = file.read(size) if size <= MOST_HEADER_BYTES else b""
    starts = range(0, len(rows), BLOCK_BYTES)
    is_whole = path.stat().st_size == len(start) + len(header) + len(rows)
    if not is_whole or not _describes(header, len(rows)) or len(starts) != len(digests):
        raise damaged(path)
    begin = len(start) + len(header)
    return [
        Block(path, begin + at, rows[at : at + BLOCK_BYTES], digest)
        for at, digest in zip(starts, digests, strict=True)
    ]


def _describes(header: bytes, num_bytes: int) -> bool:
    """Whether a safetensors header is that of rows of so many bytes."""
    try:
        found = json.loads(header)
        entry, padding = found.pop(ROWS), found.pop("__metadata__", {}).pop("padding", "")
        shape = entry["shape"]
        is_shape = all(type(size) is int for size in shape) and math.prod(shape) == num_bytes
        is_at = entry["data_offsets"] == [0, num_bytes]
        is_so = entry["dtype"] == "U8" and is_shape and is_at
        return bool(is_so and not found and not padding.strip(" "))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _read_block(block: Block, tick: Callable[[int], None]) -> None:
    """A block, straight into its memory; hashed while it is in the core's cache."""
    digest, at = hashlib.sha256(), 0
    with block.path.open("rb", buffering=0) as file:
        file.seek(block.at)
        while at < len(block.room):
            piece = block.room[at : at + PIECE_BYTES]
            count = file.readinto(piece) or 0
            if not count:
                break
            digest.update(piece[:count])
            at += count
    if digest.hexdigest() != block.sha256:
        raise damaged(block.path)
    tick(at)


def damaged(path: Path) -> ValueError:
    """What is raised for a file that is not what the manifest says."""
    return ValueError(f"{path} is damaged: it is not what the manifest says. {REMEDY}")
