"""Products with four-bit floats (MXFP4), as a checkpoint has them: two numbers in one register.

A word holds eight consecutive columns. Put where a bfloat16 has its sign, two bits of exponent and
a bit of mantissa, a code makes 2 ** -126 of its number; inputs are multiplied by 2 ** 64, sums of
a word by the scale of its group, and all of them by 2 ** 62: powers of two, so that nothing is
rounded. Inputs must lie below 2 ** 64; sums below 2 ** -64 lose bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreroute.runtime.device.kernels.lossless import high_number, low_number

WORDS_OF_GROUP = tl.constexpr(4)
OF_INPUT, OF_SUM = tl.constexpr(2.0**64), tl.constexpr(2.0**62)
"""Together 2 ** 126, and apart so that inputs and sums stay within float32's range."""


@triton.jit
def float4_sums(  # noqa: ANN201
    words,
    scales,
    num_rows,
    row,
    state,
    COLUMNS: tl.constexpr,
    WORD_STEP: tl.constexpr,
    PLANE_STEP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums over rows of several matrices, or of parts of one, [G, R] float32.

    Args:
        words: Pointers to matrices' words, [G, 1].
        scales: Pointers to their scales, e8m0, [G, 1].
        num_rows: Of each matrix.
        row: Outputs, [G, R]; those beyond the matrix give anything.
        state: Pointers to inputs, [G, 1] or [1, 1].
        COLUMNS: Of each matrix.
        WORD_STEP: From an input to that of the next word's same column.
        PLANE_STEP: From an input to that of the same word's next column.
        AT_ONCE: Words of a row that are read at once, C.
        UNROLL: Times that are read before the first sum.
    """
    NUM_WORDS: tl.constexpr = COLUMNS // 8
    row = tl.minimum(row, num_rows - 1)
    own = (words + row * NUM_WORDS)[:, :, None]
    own_scales = (scales + row * (NUM_WORDS // WORDS_OF_GROUP))[:, :, None]
    state = state[:, :, None]
    total = tl.zeros([row.shape[0], row.shape[1], AT_ONCE], dtype=tl.float32)
    for start in tl.range(0, NUM_WORDS, AT_ONCE, loop_unroll_factor=UNROLL):
        at = start + tl.arange(0, AT_ONCE)[None, None, :]
        # Not masked but read again: a thread then takes one word of every row, not four of one
        word = tl.minimum(at, NUM_WORDS - 1)
        codes = tl.load(own + word)
        exponent = tl.load(own_scales + word // WORDS_OF_GROUP).to(tl.int32)
        inputs = state + word * WORD_STEP
        is_there = at < NUM_WORDS
        # Numbers i and i + 4 of a word, for i from 0 to 3
        first = ((codes << 12) & -0x7FFF8000) | ((codes << 6) & 0x01C001C0)
        second = ((codes << 8) & -0x7FFF8000) | ((codes << 2) & 0x01C001C0)
        third = ((codes << 4) & -0x7FFF8000) | ((codes >> 2) & 0x01C001C0)
        fourth = (codes & -0x7FFF8000) | ((codes >> 6) & 0x01C001C0)
        sums = low_number(first) * _input(inputs, 0 * PLANE_STEP, is_there)
        sums += low_number(second) * _input(inputs, 1 * PLANE_STEP, is_there)
        sums += low_number(third) * _input(inputs, 2 * PLANE_STEP, is_there)
        sums += low_number(fourth) * _input(inputs, 3 * PLANE_STEP, is_there)
        sums += high_number(first) * _input(inputs, 4 * PLANE_STEP, is_there)
        sums += high_number(second) * _input(inputs, 5 * PLANE_STEP, is_there)
        sums += high_number(third) * _input(inputs, 6 * PLANE_STEP, is_there)
        sums += high_number(fourth) * _input(inputs, 7 * PLANE_STEP, is_there)
        scale = tl.maximum(exponent << 23, 1 << 22)  # 2 ** (exponent - 127), for 0 too
        total += sums * scale.to(tl.float32, bitcast=True)
    return tl.sum(total, 2) * OF_SUM


@triton.jit
def _input(inputs, PLANE: tl.constexpr, is_there):
    """A column's input of every word, scaled; 0 where there is no such word."""
    return tl.load(inputs + PLANE, mask=is_there, other=0.0).to(tl.float32) * OF_INPUT
