"""Page-locks a store's rows: all, or as many as the system allows, those used most first."""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE
CopyRow = Callable[[Tensor, Tensor], None]
"""Copies a row of the host, the second one, to a slot."""
READ_ONLY = 8
"""CUDA's flag for memory that the device only reads."""
KEPT_OF_REFUSED = 7 / 8
"""Share of what could be locked before a refusal that is locked again: others need some too."""


class PinningRefused(RuntimeError):
    """CUDA does not page-lock so much memory; says what it said."""


def lock(
    memory: mmap.mmap, address: int, num_bytes: int, *, is_read_only: bool = False
) -> weakref.finalize[..., mmap.mmap]:
    """Page-lock part of a mapping.

    Args:
        memory: The mapping.
        address: Where the part begins.
        num_bytes: Its size.
        is_read_only: Whether it cannot be written; the device then only reads it.

    Returns:
        What ends the lock when it is called; the end of the mapping does so too.

    Raises:
        PinningRefused: If CUDA does not do it.
    """
    flags = READ_ONLY if is_read_only else 0
    status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, flags)
    if int(status) != 0:
        _forget_refusal()
        raise PinningRefused(str(status))
    return weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, address)


def _forget_refusal() -> None:
    """Take the refusal off the list of errors, or the next launch would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


@dataclass
class Pins:
    """Which rows of a store are page-locked."""

    memories: list[mmap.mmap] = field(default_factory=list)
    """What the rows lie in, one for each layer."""
    rows: list[Tensor] = field(default_factory=list)
    """By layer, [E, row_bytes] uint8."""
    are_pinned: list[Tensor] = field(default_factory=list)
    """By layer, [E] bool; what is not is handed out by the host, see `Staging`."""
    budget: int | None = None
    """Bytes that may be locked; None where everything is."""
    is_settled: bool = True
    """Whether everything is locked that will be."""

    def pin_all(self, most_bytes: int | None) -> None:
        """Lock every row; if that is too much, none yet: `settle` chooses.

        Args:
            most_bytes: That may be locked; as much as CUDA allows if None.
        """
        self.are_pinned = [torch.ones(len(rows), dtype=torch.bool) for rows in self.rows]
        total, locked = sum(rows.nbytes for rows in self.rows), 0
        if most_bytes is not None and most_bytes < total:
            self._choose_later(most_bytes)
            return
        locks = []
        for memory, rows in zip(self.memories, self.rows, strict=True):
            try:
                locks.append(lock(memory, rows.data_ptr(), rows.nbytes))
            except PinningRefused as refusal:
                for end in locks:
                    end()
                self._choose_later(int(locked * KEPT_OF_REFUSED))
                logger.warning(
                    "CUDA pinned %.1f of %.1f GiB of experts and refused more (%s): the host hands "
                    "out those that are used least. --pinned-memory says how much to pin.",
                    *(locked / 2**30, total / 2**30, refusal),
                )
                return
            locked += rows.nbytes

    def _choose_later(self, budget: int) -> None:
        self.budget, self.is_settled = budget, False
        for mask in self.are_pinned:
            mask.fill_(False)

    def settle(self, uses: Sequence[Tensor]) -> None:
        """Lock the experts that are used most, as many of each layer; once.

        Args:
            uses: By layer, how much each expert is used, [E]; of equals the first ones are locked.
        """
        if self.is_settled:
            return
        assert self.budget is not None  # else everything is locked
        self.is_settled = True
        share = self.budget / sum(rows.nbytes for rows in self.rows)
        for layer, used in enumerate(uses):
            count = int(share * len(used))
            chosen = used.float().cpu().sort(descending=True, stable=True).indices[:count]
            try:
                self._pin(layer, chosen)
            except PinningRefused as refusal:
                logger.warning("CUDA refused to pin more experts (%s).", refusal)
                break
        pinned = sum(int(mask.sum()) for mask in self.are_pinned)
        every = sum(map(len, self.are_pinned))
        logger.info("%d of %d experts are pinned; the host hands out the others.", pinned, every)

    def _pin(self, layer: int, experts: Tensor) -> None:
        """Lock experts of a layer."""
        mask = torch.zeros_like(self.are_pinned[layer])
        mask[experts] = True
        rows = self.rows[layer]
        for first, end in runs(mask):
            begin, stop = rows[first].data_ptr(), rows[end - 1].data_ptr() + rows.shape[1]
            begin, stop = begin // PAGE * PAGE, -(-stop // PAGE) * PAGE
            lock(self.memories[layer], begin, stop - begin)
            self.are_pinned[layer][first:end] = True

    @property
    def copy_row(self) -> CopyRow:
        """How to copy a row to a device, locked or not."""
        return copy_whole if self.budget is None else copy_in_parts

    def part(self, first: int, end: int) -> Pins:
        """Those of some layers, with their part of the budget."""
        some = slice(first, end)
        rows, budget = self.rows[some], self.budget
        if budget is not None:
            budget = budget * sum(r.nbytes for r in rows) // sum(r.nbytes for r in self.rows)
        return Pins(self.memories[some], rows, self.are_pinned[some], budget, self.is_settled)


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Where a mask is set, [n] bool: first and end of each run; neighbours' pages may be shared."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    starts, ends = (padded == 1).nonzero().flatten(), (padded == -1).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def copy_whole(slot: Tensor, row: Tensor) -> None:
    """Copy a row that is locked, or of whose pages none is."""
    slot.copy_(row, non_blocking=True)


def copy_in_parts(slot: Tensor, row: Tensor) -> None:
    """Copy a row whose first and last page may be locked with its neighbours', it being not.

    CUDA refuses a copy from memory of which a part is locked, so that those pages go by themselves.

    Args:
        slot: Written, [row_bytes] uint8.
        row: [row_bytes] uint8, on the host.
    """
    begin = -row.data_ptr() % PAGE
    end = max(begin, len(row) - (row.data_ptr() + len(row)) % PAGE)
    for part in (slice(0, begin), slice(begin, end), slice(end, len(row))):
        if len(row[part]):
            slot[part].copy_(row[part], non_blocking=True)
