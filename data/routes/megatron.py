"""Reads Megatron's router trace: one JSON record per step and layer, with every token's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from foreroute.data.routes.assemble import ReadOptions, fill_cells, route_of
from foreroute.data.routes.route import Route

FIELDS = {"step", "layer", "top_indices"}


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
        if record.get("block", "decoder") != "decoder":
            continue
        step, layer, rows = int(record["step"]), int(record["layer"]), record["top_indices"]
        if tokens.setdefault(step, len(rows)) != len(rows):
            raise ValueError(
                f"{path}, line {number}: step {step} had {tokens[step]} tokens before."
            )
        for token, experts in enumerate(rows):
            cells[(step << 32) + token, layer] = list(map(int, experts))
    order = [(step << 32) + token for step in sorted(tokens) for token in range(tokens[step])]
    decodes = np.array([tokens[token >> 32] == 1 for token in order])
    array = fill_cells(path, cells, order)
    return route_of(path, array, options, is_decode=decodes if decodes.any() else None)


def _records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not FIELDS.issubset(record):
            raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(FIELDS))}.")
        records.append((number, record))
    return records
