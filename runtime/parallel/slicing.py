"""Which part of every expert a process holds: 1/N of the intermediate dimension.

The first products of a slice give that part of the activations, its second product a part of the
sum over them; the outputs of all slices add up to the expert's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foreroute.data.adapters.weightless import ParameterShape, parameter_shapes
from foreroute.runtime.parallel.ranks import SliceRanks

FIRST, SECOND = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"


class Span(NamedTuple):
    """Neighbouring rows or columns."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Cut:
    """How one parameter is cut."""

    axis: int
    """Which axis of one expert's parameter; -1 where it is whole and the first process' alone."""
    spans: tuple[Span, ...]
    """What this process keeps, in order."""

    @property
    def length(self) -> int:
        """Rows or columns that this process keeps."""
        return sum(span.stop - span.start for span in self.spans)


class ExpertSlice:
    """Cuts one layer's experts for one process."""

    def __init__(self, experts: nn.Module, ranks: SliceRanks) -> None:
        """Work out the cuts.

        Args:
            experts: The layer's experts module, with or without weights.
            ranks: This process among the others.

        Raises:
            ValueError: If the processes do not divide the intermediate dimension, or a parameter
                is none that is known; says what would work.
        """
        self.experts, self._ranks = experts, ranks
        self.whole = parameter_shapes(experts)
        """What the parameters are before they are cut, by name."""
        self._cuts = {name: self._cut(experts, name) for name in self.whole}

    def _cut(self, experts: nn.Module, name: str) -> _Cut:
        shape = self.whole[name].shape[1:]
        matrix = name.removesuffix("_bias")
        if matrix == SECOND and name != matrix:
            return _Cut(-1, ())
        if matrix not in (*FIRST, SECOND):
            raise ValueError(f"Experts with a parameter {name} cannot be cut into slices.")
        is_first, is_bias = matrix != SECOND, name != matrix
        axis = 0 if is_bias or is_first != bool(experts.is_transposed) else 1
        is_halved = matrix == "gate_up_proj" and bool(experts.is_concatenated)
        alternates = matrix == "gate_up_proj" and not experts.is_concatenated
        length, halves = shape[axis], 1 + is_halved
        width = length // (2 if matrix == "gate_up_proj" else 1)
        num_ranks, rank = self._ranks.num_ranks, self._ranks.rank
        if width % num_ranks:
            works = ", ".join(str(n) for n in range(2, min(width, 16) + 1) if width % n == 0)
            raise ValueError(
                f"{num_ranks} processes do not divide the experts' {width} intermediate "
                f"dimensions; these do: {works}."
            )
        part = width // num_ranks * (2 if alternates else 1)
        spans = [
            Span(half * width + rank * part, half * width + (rank + 1) * part)
            for half in range(halves)
        ]
        return _Cut(axis, tuple(spans))

    def shapes(self) -> dict[str, ParameterShape]:
        """The parameters as this process holds them, by name."""
        found = {}
        for name, (shape, dtype) in self.whole.items():
            cut = self._cuts[name]
            lengths = list(shape)
            if cut.axis >= 0:
                lengths[1 + cut.axis] = cut.length
            found[name] = ParameterShape(tuple(lengths), dtype)
        return found

    def take(self, name: str, row: int, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """This process' share of part of one expert's parameter.

        Args:
            name: Of the parameter.
            row: First row that the part covers.
            rows: Some rows of the parameter.

        Yields:
            First row in this process' parameter, and rows of it.
        """
        cut = self._cuts[name]
        if cut.axis == 1:
            yield row, torch.cat([rows[:, start:stop] for start, stop in cut.spans], dim=1)
        elif cut.axis < 0:
            yield row, rows if self._ranks.is_first else torch.zeros_like(rows)
        else:
            kept = 0
            for start, stop in cut.spans:
                first, last = max(start, row), min(stop, row + len(rows))
                if first < last:
                    yield kept + first - start, rows[first - row : last - row]
                kept += stop - start
