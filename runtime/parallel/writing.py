"""Lets a store that knows nothing of slices hold this process' slices alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from foreroute.data.adapters.weightless import SHAPES_ATTRIBUTE
from foreroute.runtime.parallel.cuts import Cuts
from foreroute.runtime.parallel.ranks import SliceRanks
from foreroute.runtime.parallel.slicing import ExpertSlice
from foreroute.runtime.store.encodings import Encoder


class Writer(Protocol):
    """Takes parts of experts' parameters."""

    def put(self, name: str, expert_id: int, row: int, part: Tensor) -> None:
        """Write part of one expert's parameter, from a row on."""
        ...


class SlicedWriter:
    """Hands on what belongs to this process."""

    def __init__(self, writer: Writer, cuts: Cuts) -> None:
        """Write through another writer.

        Args:
            writer: Of this process' tensors.
            cuts: Of the layer's.
        """
        self._writer, self._cuts = writer, cuts

    def put(self, name: str, expert_id: int, row: int, part: Tensor) -> None:
        """Write this process' share of part of one expert's tensor.

        Args:
            name: Of the tensor.
            expert_id: Which expert.
            row: First row that the part covers.
            part: Some rows of the whole tensor.
        """
        for at, rows in self._cuts.take(name, row, part):
            self._writer.put(name, expert_id, at, rows)


def cut(
    all_experts: Sequence[nn.Module],
    ranks: SliceRanks,
    encoder: Encoder | None = None,
    *,
    is_stored: bool = False,
) -> list[ExpertSlice]:
    """Cut the experts of every layer; no cuts where there is one process.

    Args:
        all_experts: The experts modules.
        ranks: This process among the others.
        encoder: How the experts are stored.
        is_stored: Whether they come as they are stored.

    Raises:
        ValueError: If a layer cannot be cut for so many.
    """
    if ranks.is_alone:
        return []
    return [ExpertSlice(experts, ranks, encoder, is_stored=is_stored) for experts in all_experts]


@contextlib.contextmanager
def narrowed(slices: Sequence[ExpertSlice]) -> Iterator[None]:
    """While open, the experts modules have the shapes of this process' slices."""
    try:
        for part in slices:
            part.experts.__dict__[SHAPES_ATTRIBUTE] = part.shapes()
        yield
    finally:
        for part in slices:
            part.experts.__dict__[SHAPES_ATTRIBUTE] = part.whole
