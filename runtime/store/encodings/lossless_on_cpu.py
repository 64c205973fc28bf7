"""Packs bfloat16 into 12 bits on a CPU: row after row, and matrices on all cores.

Imported by the encoding alone, when it packs, as numba takes a while to load.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreroute.runtime.simulator.compiled import compiled

# numba's cache looks at one file alone, so these stand here again; a test holds them together.
LARGEST_CODE, LARGEST_BASE, IN_LINE, MOST_LINES_OF_ROW = 15, 191, 3, 255


def pack(bits: Tensor, data: Tensor, lines: Tensor, num_rows: int) -> bool:
    """Write words and lines of matrices, as `Lossless` lays them out.

    Args:
        bits: [n, rows, 8 N] int16, contiguous; numbers in bfloat16, bit for bit.
        data: Written, [n, rows, 3 N] int32.
        lines: Written, [n, rows + spare, 4] int32.
        num_rows: R.

    Returns:
        Whether there was room for every exception.
    """
    triples = [
        (source.view(np.uint16), words.view(np.uint32), listed.view(np.uint32))
        for source, words, listed in zip(bits.numpy(), data.numpy(), lines.numpy(), strict=True)
    ]
    if len(triples) == 1:
        return bool(_pack_matrix(*triples[0]))
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
        return all(threads.map(lambda triple: _pack_matrix(*triple), triples))


@compiled
def _num_out_of_reach(row: Any, base: int) -> int:
    lowest, highest = np.uint16((base + 1) << 7), np.uint16(((base + LARGEST_CODE + 1) << 7) - 1)
    count = np.uint32(0)
    for number in row:
        size = number & np.uint16(0x7FFF)
        count += np.uint32((size != 0) & ((size < lowest) | (size > highest)))
    return int(count)


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
def _pack_matrix(bits: Any, data: Any, lines: Any) -> bool:
    """One matrix; see `pack`."""
    num_rows, num_columns = bits.shape
    num_words, num_spare = num_columns // 8, len(lines) - num_rows
    used = 0
    short = np.empty(num_columns, np.uint32)  # codes in place of exponents
    lines[:] = 0
    for r in range(num_rows):
        row = bits[r]
        top = np.uint16(0)
        for number in row:
            top = max(top, number & np.uint16(0x7F80))
        base = min(max(int(top >> 7) - LARGEST_CODE, 0), LARGEST_BASE)
        count = _num_out_of_reach(row, base)
        if count > IN_LINE:
            base = _best_base(row)
            count = _num_out_of_reach(row, base)
        more = max(count - 1, 0) // IN_LINE
        if more > MOST_LINES_OF_ROW or used + more > num_spare:
            return False
        lines[r, 0] = base | more << 8 | used << 16
        low, high = np.uint32((base + 1) << 7), np.uint32(((base + LARGEST_CODE + 1) << 7) - 1)
        shift = np.uint32(base << 7)
        for c in range(num_columns):
            size = np.uint32(row[c] & np.uint16(0x7FFF))
            sign = np.uint32(row[c] & np.uint16(0x8000))
            is_coded = (size >= low) & (size <= high)
            short[c] = sign | (size - shift) if is_coded else (sign if size == 0 else np.uint32(0))
        if count:
            nth = 0
            for c in range(num_columns):
                size = row[c] & np.uint16(0x7FFF)
                if size != 0 and (size < low or size > high):
                    line = r if nth < IN_LINE else num_rows + used + nth // IN_LINE - 1
                    if line != r:
                        lines[line, 0] = r
                    lines[line, 1 + nth % IN_LINE] = c << 16 | row[c]
                    nth += 1
        used += more
        _combine(short, data[r], num_words)
    return True


@compiled
def _combine(short: Any, words: Any, num_words: int) -> None:
    """Numbers with codes for exponents, [8 N], to words, [3 N]."""
    mantissa, sign, code = np.uint32(0x7F), np.uint32(0x80), np.uint32(0xF)
    seven, eight = np.uint32(7), np.uint32(8)
    for j in range(num_words):
        signed = np.uint32(0)
        codes = np.uint32(0)
        for plane in range(4):
            number = short[plane * num_words + j]
            byte = (number & mantissa) | (number >> eight & sign)
            signed |= byte << np.uint32(8 * plane)
            nibble = plane + 2 * (plane // 2)  # planes 0, 1, 2, 3: nibbles 0, 1, 4, 5
            codes |= (number >> seven & code) << np.uint32(4 * nibble)
        words[j] = signed
        signed = np.uint32(0)
        for plane in range(4):
            number = short[(4 + plane) * num_words + j]
            byte = (number & mantissa) | (number >> eight & sign)
            signed |= byte << np.uint32(8 * plane)
            nibble = 2 + plane + 2 * (plane // 2)
            codes |= (number >> seven & code) << np.uint32(4 * nibble)
        words[num_words + j] = signed
        words[2 * num_words + j] = codes
