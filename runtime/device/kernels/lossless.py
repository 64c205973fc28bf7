"""Products with bfloat16 stored in 12 bits, as it lies: two weights in one register at a time.

A word of codes holds eight columns' exponents less their row's base. Put where a bfloat16 has its
exponent, they make numbers of 2 ** -126 .. 2 ** -111 (and zeros); inputs are multiplied by 2 ** 64,
sums by 2 ** (base - 64): powers of two, so that nothing is rounded that would not be.
`store/encodings/lossless.py` has the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from foreroute.runtime.store.encodings import Lossless

UNPACK_ROWS, UNPACK_WORDS = 8, 128


@triton.jit
def add_rows(  # noqa: ANN201
    total,
    extra,
    factor,
    weight,
    lines,
    num_rows,
    row,
    state,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add some rows' products with one token's inputs, lane by lane, so that sums come last.

    Args:
        total: Of coded weights so far, [R, C] float32.
        extra: Of exceptions so far, [R, 4] float32.
        factor: What these products are multiplied with.
        weight: Pointer to the matrix's words.
        lines: Pointer to its lines.
        num_rows: Of the matrix.
        row: Outputs, [R].
        state: Pointer to the inputs.
        COLUMNS: Of the matrix.
        AT_ONCE: Words of a plane that are read at once, C.

    Returns:
        `total`, `extra`, and how many spare lines the row with most of them has.
    """
    NUM_WORDS: tl.constexpr = (COLUMNS + 7) // 8
    is_row = row < num_rows
    head = tl.load(lines + 4 * row, mask=is_row, other=0)
    listed, inputs = _listed(lines + 4 * row, is_row, state)
    base = weight + row * (3 * NUM_WORDS)
    coded = tl.zeros(total.shape, dtype=tl.float32)
    if NUM_WORDS <= 8 * AT_ONCE:
        for start in tl.static_range(0, NUM_WORDS, AT_ONCE):
            coded += _coded(base, is_row, state, start, COLUMNS, AT_ONCE)
    else:
        for start in range(0, NUM_WORDS, AT_ONCE):
            coded += _coded(base, is_row, state, start, COLUMNS, AT_ONCE)
    scale = factor * (((head & 0xFF) + 63) << 23).to(tl.float32, bitcast=True)  # 2 ** (base - 64)
    total += coded * scale[:, None]
    extra += factor * listed * inputs
    return total, extra, tl.max((head >> 8) & 0xFF, 0)


@triton.jit
def add_spare(extra, factor, lines, num_rows, row, state, num_steps):  # noqa: ANN201
    """Add the products of exceptions in spare lines, which few rows have.

    Args:
        extra: See `add_rows`, also what follows.
        factor: ..
        lines: ..
        num_rows: ..
        row: ..
        state: ..
        num_steps: At least the lines of the row with most of them.
    """
    head = tl.load(lines + 4 * row, mask=row < num_rows, other=0)
    first = lines + 4 * (num_rows + ((head >> 16) & 0xFFFF))
    for i in range(0, num_steps):
        listed, inputs = _listed(first + 4 * i, i < ((head >> 8) & 0xFF), state)
        extra += factor * listed * inputs
    return extra


@triton.jit
def _listed(line, mask, state):
    """Exceptions of a line each, and their inputs, [R, 4] float32; the first is none."""
    few = tl.arange(0, 4)
    is_listed = mask[:, None] & (few > 0)[None, :]
    listed = tl.load(line[:, None] + few[None, :], mask=is_listed, other=0)
    inputs = tl.load(state + ((listed >> 16) & 0xFFFF), mask=listed != 0, other=0.0)
    return (listed << 16).to(tl.float32, bitcast=True), inputs.to(tl.float32)


@triton.jit
def _coded(base, is_row, state, start, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """A tile of coded numbers times inputs, summed over the planes, [R, C] float32."""
    NUM_WORDS: tl.constexpr = (COLUMNS + 7) // 8
    word = start + tl.arange(0, AT_ONCE)
    is_there = word < NUM_WORDS
    mask = is_row[:, None]
    if NUM_WORDS % AT_ONCE != 0:
        mask = mask & is_there[None, :]
    pairs = load_pairs(base[:, None] + word[None, :], mask, NUM_WORDS)
    total = _low(pairs[0]) * _inputs(state, word, 0, COLUMNS, AT_ONCE)
    total += _low(pairs[1]) * _inputs(state, word, 1, COLUMNS, AT_ONCE)
    total += _high(pairs[0]) * _inputs(state, word, 2, COLUMNS, AT_ONCE)
    total += _high(pairs[1]) * _inputs(state, word, 3, COLUMNS, AT_ONCE)
    total += _low(pairs[2]) * _inputs(state, word, 4, COLUMNS, AT_ONCE)
    total += _low(pairs[3]) * _inputs(state, word, 5, COLUMNS, AT_ONCE)
    total += _high(pairs[2]) * _inputs(state, word, 6, COLUMNS, AT_ONCE)
    total += _high(pairs[3]) * _inputs(state, word, 7, COLUMNS, AT_ONCE)
    return total


@triton.jit
def _inputs(state, word, PLANE: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Inputs of a plane's columns, scaled, [1, C] float32."""
    NUM_WORDS: tl.constexpr = (COLUMNS + 7) // 8
    column = PLANE * NUM_WORDS + word
    if NUM_WORDS % AT_ONCE != 0 or COLUMNS % 8 != 0:
        is_there = (word < NUM_WORDS) & (column < COLUMNS)
        loaded = tl.load(state + column, mask=is_there, other=0.0)
    else:
        loaded = tl.load(state + column)
    return (loaded.to(tl.float32) * 1.8446744073709552e19)[None, :]  # 2 ** 64


@triton.jit
def load_pairs(where, mask, num_words):  # noqa: ANN201
    """Numbers of a tile's words, as pairs of bfloat16 whose exponents lack the base.

    Args:
        where: Pointers to signs and mantissas of the first four planes, [R, C].
        mask: Which are there.
        num_words: N, of a plane.

    Returns:
        Planes 0 and 2, 1 and 3, 4 and 6, 5 and 7: [R, C] int32 each.
    """
    first = tl.load(where, mask=mask, other=0)
    second = tl.load(where + num_words, mask=mask, other=0)
    codes = tl.load(where + 2 * num_words, mask=mask, other=0)
    return (
        (first & 0x007F007F) | ((first << 8) & -0x7FFF8000) | ((codes << 7) & 0x07800780),
        ((first >> 8) & 0x007F007F) | (first & -0x7FFF8000) | ((codes << 3) & 0x07800780),
        (second & 0x007F007F) | ((second << 8) & -0x7FFF8000) | ((codes >> 1) & 0x07800780),
        ((second >> 8) & 0x007F007F) | (second & -0x7FFF8000) | ((codes >> 5) & 0x07800780),
    )


@triton.jit
def _low(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _unpack_kernel(
    data,
    lines,
    out,
    num_rows,
    num_lines,
    num_words,
    slot_stride,
    lines_slot_stride,
    NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    lines += matrix * lines_slot_stride
    head = tl.load(lines + 4 * row, mask=is_row, other=0)
    base = (head & 0xFF)[:, None]
    to = out + matrix * num_rows * NUM_COLUMNS + row[:, None] * NUM_COLUMNS
    for start in range(0, num_words, WORDS):
        word = start + tl.arange(0, WORDS)[None, :]
        mask = is_row[:, None] & (word < num_words)
        where = data + matrix * slot_stride + row[:, None] * (3 * num_words) + word
        pairs = load_pairs(where, mask, num_words)
        _store_pair(to, word, mask, pairs[0], base, num_words, 0, 2, NUM_COLUMNS)
        _store_pair(to, word, mask, pairs[1], base, num_words, 1, 3, NUM_COLUMNS)
        _store_pair(to, word, mask, pairs[2], base, num_words, 4, 6, NUM_COLUMNS)
        _store_pair(to, word, mask, pairs[3], base, num_words, 5, 7, NUM_COLUMNS)
    tl.debug_barrier()  # exceptions go where zeros were written
    few = tl.arange(0, 4)
    count = tl.where(is_row, (head >> 8) & 0xFF, 0)
    spare = num_rows + ((head >> 16) & 0xFFFF)
    for i in range(-1, tl.max(count, 0)):
        line = tl.where(i < 0, row, spare + i)
        is_listed = (is_row & (i < count))[:, None] & (few > 0)[None, :]
        listed = tl.load(lines + 4 * line[:, None] + few[None, :], mask=is_listed, other=0)
        tl.store(to + ((listed >> 16) & 0xFFFF), listed.to(tl.int16), mask=listed != 0)


@triton.jit
def _store_pair(
    to,
    word,
    mask,
    pair,
    base,
    num_words,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
):
    _store_plane(to, LOW * num_words + word, mask, pair, base, NUM_COLUMNS)
    _store_plane(to, HIGH * num_words + word, mask, pair >> 16, base, NUM_COLUMNS)


@triton.jit
def _store_plane(to, column, mask, number, base, NUM_COLUMNS: tl.constexpr):
    bits = number & 0xFFFF
    bits = tl.where((bits & 0x780) != 0, bits + (base << 7), bits)
    tl.store(to + column, bits.to(tl.int16), mask=mask & (column < NUM_COLUMNS))


def unpack(data: Tensor, lines: Tensor, encoding: Lossless) -> Tensor:
    """Decode matrices on a GPU, bit for bit.

    Args:
        data: [n, rows, 3 N] int32; a matrix's rows contiguous.
        lines: [n, rows + spare, 4] int32; likewise.
        encoding: Their sizes.

    Returns:
        [n, rows, columns] bfloat16.
    """
    num_rows, num_columns = encoding.rows, encoding.columns
    out = torch.empty(len(data), num_rows, num_columns, dtype=torch.int16, device=data.device)
    _unpack_kernel[(triton.cdiv(num_rows, UNPACK_ROWS), len(data))](
        data,
        lines,
        out,
        num_rows,
        lines.shape[1],
        encoding.words,
        data.stride(0),
        lines.stride(0),
        NUM_COLUMNS=num_columns,
        ROWS=UNPACK_ROWS,
        WORDS=min(UNPACK_WORDS, triton.next_power_of_2(encoding.words)),
        num_warps=4,
    )
    return out.view(torch.bfloat16)
