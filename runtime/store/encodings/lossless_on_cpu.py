"""Packs bfloat16 into 12 bits on a CPU: row after row, and matrices on all cores.

Imported by the encoding alone, when it packs, as numba takes a while to load. Every loop over
columns keeps to one width of number and carries nothing over, so that it becomes vector code.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreroute.runtime.simulator.compiled import compiled

# numba's cache looks at one file alone, so these stand here again; a test holds them together.
PLANES, LARGEST_CODE, LARGEST_BASE, IN_LINE, MOST_LINES_OF_ROW = 8, 15, 191, 3, 255
BLOCK_ROWS = 64  # a block of 2048 columns is half of a small L2; a column of it two lines
APART = 32  # columns between its rows, lest they fall upon the same lines of the cache
LANES = 64


def pack(matrices: Iterable[Tensor], data: Iterable[Tensor], lines: Iterable[Tensor]) -> bool:
    """Write words and lines of matrices, as `Lossless` lays them out.

    Args:
        matrices: [rows, columns] bfloat16 each, of any strides.
        data: Written, [rows, 3 N] int32 each.
        lines: Written, [rows + spare, 4] int32 each.

    Returns:
        Whether there was room for every exception.
    """
    triples = [
        (
            matrix.view(torch.int16).numpy().view(np.uint16),
            words.numpy().view(np.uint32),
            listed.numpy().view(np.uint32),
        )
        for matrix, words, listed in zip(matrices, data, lines, strict=True)
    ]
    if len(triples) == 1:
        return bool(_pack_matrix(*triples[0]))
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
        return all(threads.map(lambda triple: _pack_matrix(*triple), triples))


@compiled
def _take_up(bits: Any, first: int, room: Any) -> int:
    """Copy rows from `first` on into a block, whichever way they lie; how many there were."""
    count, columns = min(len(room), len(bits) - first), bits.shape[1]
    if bits.strides[0] < bits.strides[1]:
        for c in range(columns):
            for r in range(count):
                room[r, c] = bits[first + r, c]
    else:
        for r in range(count):
            for c in range(columns):
                room[r, c] = bits[first + r, c]
    return count


@compiled
def _largest_exponent(row: Any, tops: Any) -> int:
    """The largest of a row; `tops` is room for `LANES` numbers."""
    tops[:] = 0
    whole = len(row) // LANES * LANES
    for start in range(0, whole, LANES):
        for i in range(LANES):
            exponent = np.uint16(row[start + i] & np.uint16(0x7F80))
            tops[i] = exponent if exponent > tops[i] else tops[i]
    for c in range(whole, len(row)):
        tops[0] = max(tops[0], np.uint16(row[c] & np.uint16(0x7F80)))
    return int(tops.max()) >> 7


@compiled
def _code(row: Any, base: int, coded: Any, is_listed: Any) -> int:
    """Code a row by its base: a byte of sign and mantissa, above it the code.

    What is out of reach becomes zero and is marked; gives how many there are.
    """
    lowest, first_code = np.uint16(base << 7), np.uint16(1 << 7)
    num_sizes = np.uint16(LARGEST_CODE << 7)
    for c in range(len(row)):
        number = row[c]
        size = np.uint16(number & np.uint16(0x7FFF))
        above = np.uint16(size - lowest)
        is_coded = np.uint16(above - first_code) < num_sizes
        sign = np.uint16((number >> np.uint16(8)) & np.uint16(0x80))
        rest = np.uint16((above & np.uint16(0x7F)) | ((above << np.uint16(1)) & np.uint16(0xF00)))
        is_kept = is_coded | (size == np.uint16(0))
        coded[c] = np.uint16(sign | (rest if is_coded else np.uint16(0))) if is_kept else 0
        is_listed[c] = np.uint8(not is_kept)
    count = 0
    for c in range(len(row)):
        count += is_listed[c]
    return count


@compiled
def _best_base(row: Any) -> int:
    """The highest base that leaves the fewest exceptions."""
    counts = np.zeros(256, np.int64)
    for number in row:
        if number & 0x7FFF:
            counts[(number >> 7) & 0xFF] += 1
    best, most = 0, -1
    for base in range(LARGEST_BASE + 1):
        reached = counts[base + 1 : base + LARGEST_CODE + 1].sum()
        if reached >= most:
            best, most = base, reached
    return best


@compiled
def _list(row: Any, is_listed: Any, lines: Any, r: int, spare: int) -> None:
    """Write a row's exceptions into its line, then into spare lines from `spare` on."""
    nth, eights = 0, is_listed.view(np.uint64)
    for eighth in range(len(eights)):
        if eights[eighth] == 0:
            continue
        for c in range(8 * eighth, 8 * eighth + 8):
            if is_listed[c]:
                line = r if nth < IN_LINE else spare + nth // IN_LINE - 1
                if line != r:
                    lines[line, 0] = r
                lines[line, 1 + nth % IN_LINE] = c << 16 | row[c]
                nth += 1


@compiled
def _pack_matrix(bits: Any, data: Any, lines: Any) -> bool:
    """One matrix; see `pack`."""
    num_rows, num_words = len(bits), data.shape[1] // 3
    num_spare, used = len(lines) - num_rows, 0
    width = PLANES * num_words
    block = np.zeros((BLOCK_ROWS, width + APART), np.uint16)
    coded, is_listed = np.empty(width, np.uint16), np.empty(width, np.uint8)
    tops = np.empty(LANES, np.uint16)
    lines[:] = 0
    for first in range(0, num_rows, BLOCK_ROWS):
        for i in range(_take_up(bits, first, block)):
            r, row = first + i, block[i, :width]
            base = min(max(_largest_exponent(row, tops) - LARGEST_CODE, 0), LARGEST_BASE)
            count = _code(row, base, coded, is_listed)
            if count > IN_LINE:
                base = _best_base(row)
                count = _code(row, base, coded, is_listed)
            more = max(count - 1, 0) // IN_LINE
            if more > MOST_LINES_OF_ROW or used + more > num_spare:
                return False
            lines[r, 0] = base | more << 8 | used << 16
            if count:
                _list(row, is_listed, lines, r, num_rows + used)
            used += more
            _combine(coded, data[r], num_words)
    return True


@compiled
def _combine(coded: Any, words: Any, num_words: int) -> None:
    """Coded numbers, [8 N], to words, [3 N]: bytes plane by plane, then codes."""
    byte, eight = np.uint32(0xFF), np.uint32(8)
    for j in range(num_words):
        first, second, codes = np.uint32(0), np.uint32(0), np.uint32(0)
        for plane in range(4):
            low = np.uint32(coded[plane * num_words + j])
            high = np.uint32(coded[(4 + plane) * num_words + j])
            first |= (low & byte) << np.uint32(8 * plane)
            second |= (high & byte) << np.uint32(8 * plane)
            nibble = plane + 2 * (plane // 2)  # planes 0, 1, 2, 3: nibbles 0, 1, 4, 5
            codes |= low >> eight << np.uint32(4 * nibble)
            codes |= high >> eight << np.uint32(4 * nibble + 8)
        words[j] = first
        words[num_words + j] = second
        words[2 * num_words + j] = codes
