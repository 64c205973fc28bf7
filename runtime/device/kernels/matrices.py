"""Weights as slots hold them, in 16 bits or fewer, read by kernels one output (a row) at a time.

Numbers are decoded to the very ones that `encodings.py` gives, rounded to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.encodings import (
    MXFP4_GROUP,
    ChannelScaled,
    EncodedWeights,
    Fp8Blocks,
    Int4,
    Mxfp4,
)

PLAIN, INT8, FP8, INT4, MXFP4 = range(5)


@dataclass(frozen=True)
class SlotMatrix:
    """One parameter of every slot."""

    data: Tensor
    """[S, rows, ..]: 16-bit or wider numbers, or bytes."""
    kind: int
    """How a number is stored: `PLAIN` or one of the others."""
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    scales: Tensor
    """[S, ..]; `data` again where there are none."""
    offsets: Tensor
    """Of `INT4`, as `scales`."""
    group: int
    """Columns that share a scale."""
    block: int = 1
    """Rows that share a scale, in stacks of `height` rows."""
    height: int = 1

    @classmethod
    def of(cls, weight: Tensor | EncodedWeights) -> SlotMatrix:
        """Take a parameter as `RowLayout.weights` gives it.

        Args:
            weight: [S, rows, columns]; stored in fewer bits or not.
        """
        if isinstance(weight, Tensor):
            _, rows, columns = weight.shape
            return cls(weight, PLAIN, rows, columns, weight, weight, columns)
        encoding, parts = weight.parameter.encoding, weight.parts
        rows, columns = encoding.rows, encoding.columns
        data = parts.get("", parts.get("_blocks"))
        assert data is not None  # every encoding has one of the two
        if isinstance(encoding, Int4):
            steps, offsets = parts["_steps"], parts["_offsets"]
            return cls(data, INT4, rows, columns, steps, offsets, encoding.group)
        if isinstance(encoding, Mxfp4):
            scales = parts["_scales"]
            return cls(data.flatten(2), MXFP4, rows, columns, scales, scales, MXFP4_GROUP)
        if isinstance(encoding, Fp8Blocks):
            scales, height = parts["_scale_inv"], rows // encoding.stacked
            bits = data.view(torch.uint8)
            size = encoding.block
            return cls(bits, FP8, rows, columns, scales, scales, size, size, height)
        if isinstance(encoding, ChannelScaled):
            kind = FP8 if data.dtype.is_floating_point else INT8
            bits = data.view(torch.uint8) if kind == FP8 else data
            return cls(bits, kind, rows, columns, parts["_scales"], parts["_scales"], columns)
        return cls(data, PLAIN, rows, columns, data, data, columns)

    @property
    def numbers_per_element(self) -> int:
        """2 where two numbers share a byte."""
        return 2 if self.kind in (INT4, MXFP4) else 1

    def tile_width(self, most: int) -> int:
        """Elements of a row that a program reads at once: a power of two, at most so many."""
        elements = -(-self.columns // self.numbers_per_element)
        return min(most, int(triton.next_power_of_2(elements)))

    def arguments(self) -> dict[str, Any]:
        """Those of a kernel that calls `row_sums`."""
        has_scales = self.kind != PLAIN
        return {
            "weight": self.data,
            "scales": self.scales,
            "offsets": self.offsets,
            "slot_stride": self.data.stride(0),
            "row_stride": self.data.stride(1),
            "scale_slot_stride": self.scales.stride(0) if has_scales else 0,
            "scale_row_stride": self.scales.stride(1) if has_scales else 0,
            "height": self.height,
            "KIND": self.kind,
            "GROUP": self.group,
            "SHARED_ROWS": self.block,
        }


@triton.jit
def load_inputs(state, column, width, KIND: tl.constexpr):  # noqa: ANN201
    """The inputs that a tile's elements are multiplied with: of the low numbers, of the high ones.

    Args:
        state: Pointer to a token's inputs.
        column: Elements of a row, [C].
        width: Numbers of a row.
        KIND: See `SlotMatrix`.
    """
    if KIND >= 3:
        low = tl.load(state + 2 * column, mask=2 * column < width, other=0.0)
        high = tl.load(state + 2 * column + 1, mask=2 * column + 1 < width, other=0.0)
        return low.to(tl.float32)[None, :], high.to(tl.float32)[None, :]
    else:  # noqa: RET505 (one return per branch is what Triton can compile)
        low = tl.load(state + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        return low, low


@triton.jit
def row_sums(  # noqa: ANN201
    weight,
    scales,
    offsets,
    slot,
    row,
    column,
    low,
    high,
    rows,
    width,
    slot_stride,
    row_stride,
    scale_slot_stride,
    scale_row_stride,
    height,
    NUMBER: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
):
    """Sum over a tile's columns of weight times input, [R] float32.

    Args:
        weight: Pointers and strides of a `SlotMatrix`.
        scales: See there.
        offsets: See there.
        slot: Which slot.
        row: Outputs, [R].
        column: Elements of a row, [C].
        low: From `load_inputs`.
        high: From `load_inputs`.
        rows: Number of outputs.
        width: Number of inputs.
        slot_stride: See `SlotMatrix`, also what follows.
        row_stride: ..
        scale_slot_stride: ..
        scale_row_stride: ..
        height: ..
        NUMBER: The model's dtype.
        KIND: ..
        GROUP: ..
        SHARED_ROWS: ..
    """
    first = 2 * column if KIND >= 3 else column
    mask = (row < rows)[:, None] & (first < width)[None, :]
    where = weight + slot * slot_stride + row[:, None] * row_stride + column[None, :]
    raw = tl.load(where, mask=mask, other=0)
    if KIND == 0:
        return tl.sum(raw.to(tl.float32) * low, 1)
    else:  # noqa: RET505
        stack = row // height
        shared = stack * tl.cdiv(height, SHARED_ROWS) + (row - stack * height) // SHARED_ROWS
        at_row = slot * scale_slot_stride + (shared if SHARED_ROWS > 1 else row) * scale_row_stride
        at = at_row[:, None] + (first // GROUP)[None, :]
        scale = tl.load(scales + at, mask=mask, other=0)
        if KIND == 1:
            value = _rounded(raw.to(tl.float32) * scale, NUMBER)
            total = value * low
        elif KIND == 2:
            value = _rounded(_float8(raw) * scale, NUMBER)
            total = value * low
        elif KIND == 3:
            step = scale.to(tl.float32)
            offset = tl.load(offsets + at, mask=mask, other=0.0).to(tl.float32)
            total = _rounded((raw & 15).to(tl.float32) * step + offset, NUMBER) * low
            total += _rounded((raw >> 4).to(tl.float32) * step + offset, NUMBER) * high
        else:
            exponent = scale.to(tl.int32)
            bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
            power = bits.to(tl.float32, bitcast=True)  # 2 ** (exponent - 127)
            total = _rounded(_float4(raw & 15) * power, NUMBER) * low
            total += _rounded(_float4(raw >> 4) * power, NUMBER) * high
        return tl.sum(total, 1)


@triton.jit
def _rounded(value, NUMBER: tl.constexpr):
    return value.to(NUMBER).to(tl.float32)


@triton.jit
def _float8(bits):
    """The number that e4m3 bits stand for: those of float32 with a smaller exponent."""
    wide = bits.to(tl.int32)
    magnitude = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    return tl.where(wide >= 0x80, -magnitude, magnitude)


@triton.jit
def _float4(bits):
    """The number that e2m1 bits stand for: 0, .5, 1, 1.5, 2, 3, 4, 6, and their negatives."""
    wide = bits.to(tl.int32)
    magnitude = ((wide & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    return tl.where(wide >= 8, -magnitude, magnitude)
