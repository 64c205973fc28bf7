"""What of a tensor a process keeps, and how it is taken out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Neighbouring rows or columns."""

    start: int
    stop: int


@dataclass(frozen=True)
class Cut:
    """How one tensor of an expert is cut."""

    axis: int
    """Which axis; -1 where it is whole and the first process' alone."""
    spans: tuple[Span, ...]
    """What this process keeps, in order."""

    @property
    def length(self) -> int:
        """Rows or columns that this process keeps."""
        return sum(span.stop - span.start for span in self.spans)


class Cuts:
    """Takes this process' share of tensors that hold an expert."""

    def __init__(self, cuts: dict[str, Cut], *, is_first: bool) -> None:
        """Cut so.

        Args:
            cuts: By the tensors' names.
            is_first: Whether this process keeps what is not cut.
        """
        self._cuts, self._is_first = cuts, is_first

    def take(self, name: str, row: int, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """This process' share of part of one expert's tensor.

        Args:
            name: Of the tensor.
            row: First row that the part covers.
            rows: Some rows of it.

        Yields:
            First row in this process' tensor, and rows of it.
        """
        cut = self._cuts[name]
        if cut.axis == 1:
            yield row, torch.cat([rows[:, start:stop] for start, stop in cut.spans], dim=1)
        elif cut.axis < 0:
            yield row, rows if self._is_first else torch.zeros_like(rows)
        else:
            kept = 0
            for start, stop in cut.spans:
                first, last = max(start, row), min(stop, row + len(rows))
                if first < last:
                    yield kept + first - start, rows[first - row : last - row]
                kept += stop - start
