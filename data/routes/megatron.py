"""Reads Megatron's router trace: one JSON record per step and layer, with every token's experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foreroute.data.routes.assemble import ReadOptions, fill_cells, route_of
from foreroute.data.routes.route import Route
from foreroute.estimators.artifacts import Count, parse_json


@dataclass(frozen=True)
class Record:
    """What one line says."""

    step: Count
    """Its place in the run."""
    layer: Count
    """Decoder layer index."""
    top_indices: list[list[Count]]
    """Experts of each of the step's tokens."""
    block: str = "decoder"
    """Or that of multi-token prediction."""


def is_megatron(path: Path) -> bool:
    """Whether the first line is such a record."""
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        return False
    with path.open(errors="replace") as lines:
        return '"top_indices"' in next(lines, "")


def read_megatron(path: Path, options: ReadOptions) -> Route:
    """Read one rank's file; steps after the first that hold one token are decode steps.

    Records of multi-token prediction blocks are passed over.

    Raises:
        ValueError: If a line is no record; names it.
    """
    cells: dict[tuple[int, int], list[int]] = {}
    tokens: dict[int, int] = {}  # per step, how many
    for number, record in _records(path):
        if record.block != "decoder":
            continue
        step, rows = record.step, record.top_indices
        if tokens.setdefault(step, len(rows)) != len(rows):
            raise ValueError(
                f"{path}, line {number}: step {step} had {tokens[step]} tokens before."
            )
        for token, experts in enumerate(rows):
            cells[(step << 32) + token, record.layer] = experts
    order = [(step << 32) + token for step in sorted(tokens) for token in range(tokens[step])]
    decodes = np.array([tokens[token >> 32] == 1 for token in order])
    array = fill_cells(path, cells, order)
    return route_of(path, array, options, is_decode=decodes if decodes.any() else None)


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, parse_json(line, Record, f"{path}, line {number}")
