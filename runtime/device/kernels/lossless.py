"""Products with bfloat16 stored in 12 bits, as it lies: two weights in one register at a time.

A word of codes holds eight columns' exponents less their row's base. Put where a bfloat16 has its
exponent, they make numbers of 2 ** -126 .. 2 ** -111 (and zeros); inputs are multiplied by 2 ** 64,
sums by 2 ** (base - 64): powers of two, so that nothing is rounded that would not be.
`store/encodings/lossless.py` has the layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNPACK_ROWS, UNPACK_WORDS = 8, 128


@triton.jit
def packed_sums(  # noqa: ANN201
    words, lines, num_rows, row, state, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Sums over rows of several matrices, or of parts of one, [G, R] float32.

    Args:
        words: Pointers to matrices' words, [G, 1].
        lines: Pointers to their lines, [G, 1].
        num_rows: Of each matrix.
        row: Outputs, [G, R]; those beyond the matrix give 0.
        state: Pointers to inputs, [G, 1] or [1, 1].
        COLUMNS: Of each matrix.
        AT_ONCE: Words of a plane that are read at once, C.
    """
    NUM_WORDS: tl.constexpr = (COLUMNS + 7) // 8
    is_row = row < num_rows
    own = lines + 4 * row
    head = tl.load(own, mask=is_row, other=0)
    few = tl.arange(0, 4)[None, None, :]  # the first of a line is no exception
    listed = tl.load(own[:, :, None] + few, mask=is_row[:, :, None] & (few > 0), other=0)
    base = (words + row * (3 * NUM_WORDS))[:, :, None]
    mask = is_row[:, :, None]
    total = tl.zeros([row.shape[0], row.shape[1], AT_ONCE], dtype=tl.float32)
    if NUM_WORDS <= 4 * AT_ONCE:
        for start in tl.static_range(0, NUM_WORDS, AT_ONCE):
            total = _add_tile(total, base, mask, state, start, COLUMNS, AT_ONCE)
    else:
        for start in range(0, NUM_WORDS, AT_ONCE):
            total = _add_tile(total, base, mask, state, start, COLUMNS, AT_ONCE)
    scale = (((head & 0xFF) + 63) << 23).to(tl.float32, bitcast=True)  # 2 ** (base - 64)
    sums = tl.sum(total, 2) * scale + tl.sum(_listed_products(listed, state), 2)
    num_spare = (head >> 8) & 0xFF
    most = tl.max(tl.max(num_spare, 1), 0)
    if most > 0:  # few rows have more exceptions than their own line holds
        first = lines + 4 * (num_rows + ((head >> 16) & 0xFFFF))
        for i in range(0, most):
            has_more = (i < num_spare)[:, :, None] & (few > 0)
            listed = tl.load((first + 4 * i)[:, :, None] + few, mask=has_more, other=0)
            sums += tl.sum(_listed_products(listed, state), 2)
    return sums


@triton.jit
def _listed_products(listed, state):
    """Exceptions times their inputs, [G, R, 4] float32."""
    where = state[:, :, None] + ((listed >> 16) & 0xFFFF)
    inputs = tl.load(where, mask=listed != 0, other=0.0).to(tl.float32)
    return (listed << 16).to(tl.float32, bitcast=True) * inputs


@triton.jit
def _add_tile(total, base, mask, state, start, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Add a tile of coded numbers times inputs, [G, R, C] float32."""
    NUM_WORDS: tl.constexpr = (COLUMNS + 7) // 8
    word = start + tl.arange(0, AT_ONCE)[None, None, :]
    if NUM_WORDS % AT_ONCE != 0:
        mask = mask & (word < NUM_WORDS)
    pairs = load_pairs(base + word, mask, NUM_WORDS)
    total += low_number(pairs[0]) * _inputs(state, word, 0, COLUMNS, AT_ONCE)
    total += low_number(pairs[1]) * _inputs(state, word, 1, COLUMNS, AT_ONCE)
    total += high_number(pairs[0]) * _inputs(state, word, 2, COLUMNS, AT_ONCE)
    total += high_number(pairs[1]) * _inputs(state, word, 3, COLUMNS, AT_ONCE)
    total += low_number(pairs[2]) * _inputs(state, word, 4, COLUMNS, AT_ONCE)
    total += low_number(pairs[3]) * _inputs(state, word, 5, COLUMNS, AT_ONCE)
    total += high_number(pairs[2]) * _inputs(state, word, 6, COLUMNS, AT_ONCE)
    total += high_number(pairs[3]) * _inputs(state, word, 7, COLUMNS, AT_ONCE)
    return total


@triton.jit
def _inputs(state, word, PLANE: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Inputs of a plane's columns, scaled, [G or 1, 1, C] float32."""
    NUM_WORDS: tl.constexpr = (COLUMNS + 7) // 8
    column = PLANE * NUM_WORDS + word
    where = state[:, :, None] + column
    if NUM_WORDS % AT_ONCE != 0 or COLUMNS % 8 != 0:
        loaded = tl.load(where, mask=(word < NUM_WORDS) & (column < COLUMNS), other=0.0)
    else:
        loaded = tl.load(where)
    return loaded.to(tl.float32) * 1.8446744073709552e19  # 2 ** 64


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
def low_number(pair):  # noqa: ANN201
    """The number in a pair's low half, float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_number(pair):  # noqa: ANN201
    """The number in a pair's high half, float32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _unpack_kernel(
    data,
    lines,
    out,
    num_rows,
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


def unpack(data: Tensor, lines: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Decode matrices on a GPU, bit for bit.

    Args:
        data: [n, rows, 3 N] int32; a matrix's rows contiguous.
        lines: [n, rows + spare, 4] int32; likewise.
        num_rows: Of each.
        num_columns: Of each.

    Returns:
        [n, rows, columns] bfloat16.
    """
    num_words = data.shape[2] // 3
    out = torch.empty(len(data), num_rows, num_columns, dtype=torch.int16, device=data.device)
    _unpack_kernel[(triton.cdiv(num_rows, UNPACK_ROWS), len(data))](
        data,
        lines,
        out,
        num_rows,
        num_words,
        data.stride(0),
        lines.stride(0),
        NUM_COLUMNS=num_columns,
        ROWS=UNPACK_ROWS,
        WORDS=min(UNPACK_WORDS, triton.next_power_of_2(num_words)),
        num_warps=4,
    )
    return out.view(torch.bfloat16)
