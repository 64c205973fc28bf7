"""Reads CSV: rows with step, layer and expert, and llama.cpp's plain list of activations."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from foreroute.data.routes.assemble import ReadOptions, fill_cells, route_of
from foreroute.data.routes.route import Route

STEP_NAMES = ("step", "token", "token_idx", "token_id", "pos", "position")
EXPERT_NAMES = ("expert", "expert_id")
LAYER_NAMES = ("layer", "layer_idx", "layer_id")
DECODE_WORDS = {"1", "decode", "true", "generate"}
Columns = dict[str, int]


def is_table(path: Path) -> bool:
    """Whether the header names step, layer and expert."""
    return path.is_file() and path.suffix in (".csv", ".tsv") and "step" in _columns(path)


def is_activation_list(path: Path) -> bool:
    """Whether rows are `layer,expert` only, with or without that header."""
    if not path.is_file() or path.suffix not in (".csv", ".tsv"):
        return False
    columns, first = _columns(path), next(_rows(path), [])
    is_headless = len(first) == 2 and all(word.strip().isdigit() for word in first)
    return is_headless or ({"layer", "expert"} <= set(columns) and "step" not in columns)


def read_table(path: Path, options: ReadOptions) -> Route:
    """Read rows of (turn, phase, step, layer, slot, expert, ...); others columns are left alone.

    Raises:
        ValueError: If a row cannot be read; names it.
    """
    columns = _columns(path)
    cells: dict[tuple[int, int], list[int]] = {}
    phases: dict[int, bool] = {}
    for number, row in enumerate(itertools.islice(_rows(path), 1, None), 2):
        try:
            token = _number(row[columns["step"]])
            if "turn" in columns:
                token += _number(row[columns["turn"]]) << 32
            layer, expert = _number(row[columns["layer"]]), _number(row[columns["expert"]])
            if "phase" in columns:
                phases[token] = row[columns["phase"]].strip().lower() in DECODE_WORDS
        except (ValueError, IndexError):
            raise ValueError(f"{path}, row {number} cannot be read: {','.join(row)[:99]}") from None
        cells.setdefault((token, layer), []).append(expert)
    order = sorted({token for token, _ in cells})
    decodes = np.array([phases[token] for token in order]) if phases else None
    array = fill_cells(path, cells, order)
    return route_of(path, array, options, is_decode=decodes, num_experts=_header_experts(path))


def read_activation_list(path: Path, options: ReadOptions) -> Route:
    """Read llama.cpp's list: per forward pass and layer the rows of all tokens, K each.

    K is the most frequent length of a run of one layer: that of a decode step. Passes of one token
    after the first are decode steps.

    Raises:
        ValueError: If a row cannot be read, or the rows do not divide so.
    """
    pairs = list(_activations(path))
    runs = [
        (layer, [expert for _, expert in run])
        for layer, run in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]
    if not runs:
        raise ValueError(f"{path} has no routing in it.")
    lengths = Counter(len(experts) for _, experts in runs)
    top_k = min(lengths, key=lambda length: (-lengths[length], length))
    cells: dict[tuple[int, int], list[int]] = {}
    decodes: list[bool] = []
    base, size, before = 0, 0, -1
    for layer, experts in runs:
        if len(experts) % top_k:
            raise ValueError(
                f"{path} has {len(experts)} rows of layer {layer} in a run, no multiple of "
                f"{top_k}, the experts of a token."
            )
        if layer <= before:  # a new forward pass
            base, size = base + size, 0
        count, before = len(experts) // top_k, layer
        if count > size:
            decodes += [count == 1] * (count - size)
            size = count
        # a pass's last layer may hold the last tokens only: they stand at its end
        for token in range(count):
            at = base + size - count + token
            cells[at, layer] = experts[token * top_k : (token + 1) * top_k]
    array = fill_cells(path, cells, range(base + size))
    flags = np.array(decodes)
    return route_of(path, array, options, is_decode=flags if flags.any() else None)


def _activations(path: Path) -> Iterator[tuple[int, int]]:
    """Layer and expert of every row but a header."""
    for number, row in enumerate(_rows(path), 1):
        if number == 1 and not row[0].strip().isdigit():
            continue
        try:
            yield _number(row[0]), _number(row[1])
        except (ValueError, IndexError):
            raise ValueError(f"{path}, row {number} cannot be read: {','.join(row)[:99]}") from None


def _number(word: str) -> int:
    """A number from 0 to 2^31 - 1, as text of at most ten digits."""
    number = int(word) if len(word.strip()) <= 10 else -1
    if not 0 <= number < 1 << 31:
        raise ValueError(f"{word} is out of range")
    return number


def _rows(path: Path) -> Iterator[list[str]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(newline="", errors="replace") as lines:
        told = (line for line in lines if line.strip() and line[0] != "#")
        try:
            yield from (row for row in csv.reader(told, delimiter=delimiter) if row)
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as a table: {error}.") from error


def _columns(path: Path) -> Columns:
    """Where the known columns stand, by our names."""
    header = [word.strip().lower() for word in next(_rows(path), [])]
    columns: Columns = {}
    for name, aliases in (("step", STEP_NAMES), ("expert", EXPERT_NAMES), ("layer", LAYER_NAMES)):
        found = _first(header, aliases)
        if found is not None:
            columns[name] = found
    columns |= {name: header.index(name) for name in ("turn", "phase") if name in header}
    if "expert" not in columns or "layer" not in columns:
        columns.pop("step", None)
    return columns


def _first(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _header_experts(path: Path) -> int | None:
    """E, where a comment says `n_expert=128`."""
    with path.open(errors="replace") as lines:
        for line in itertools.takewhile(lambda text: text.startswith("#"), lines):
            found = re.search(r"\bn_expert=(\d{1,9})\b", line)
            if found:
                return int(found[1])
    return None
