"""Weights as slots hold them, in 16 bits or fewer, read by kernels one output (a row) at a time.

Scales are applied to sums of a group, so that nothing is rounded between decoding and summing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.store.encodings import (
    ChannelScaled,
    EncodedWeights,
    Fp8Blocks,
    Int4,
    Lossless,
    Mxfp4,
)

PLAIN, INT8, FP8, FP8_BLOCKS, INT4, MXFP4, LOSSLESS = range(7)
GROUPED = (FP8_BLOCKS, INT4)
KIND_PLAIN, KIND_FP8, KIND_FP8_BLOCKS, KIND_INT4 = map(tl.constexpr, (PLAIN, FP8, FP8_BLOCKS, INT4))
KIND_MXFP4, KIND_LOSSLESS = tl.constexpr(MXFP4), tl.constexpr(LOSSLESS)
"""The same for kernels. Up to `FP8` a row has one scale at most; from `FP8_BLOCKS` on groups of
elements share scales; in `INT4` a byte holds two numbers. From `MXFP4` on they are read by words
of eight numbers (`float4.py`, `lossless.py`), not by what is here."""


@dataclass(frozen=True, kw_only=True)
class SlotMatrix:
    """One parameter of every slot."""

    kind: int
    """How a number is stored: `PLAIN` or one of the others."""
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    data: Tensor
    """[S, rows, elements]: numbers, bytes of one or two of them, or words of eight."""
    scales: Tensor
    """[S, rows or blocks of rows, groups]; `data` again where there are none; lines where
    `LOSSLESS`."""
    offsets: Tensor
    """Only `INT4` has them; as `scales`."""
    group: int = 1
    """Elements of a row that share a scale, if not all do."""
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
            return cls._plain(weight)
        encoding, parts = weight.parameter.encoding, weight.parts
        sized = partial(cls, rows=encoding.rows, columns=encoding.columns)
        if isinstance(encoding, Mxfp4):
            data, scales = parts["_blocks"].flatten(2).view(torch.int32), parts["_scales"]
            return sized(kind=MXFP4, data=data, scales=scales, offsets=scales)
        data = parts[""]
        if isinstance(encoding, Lossless):
            lines = parts["_lines"]
            return sized(kind=LOSSLESS, data=data, scales=lines, offsets=lines)
        if isinstance(encoding, Int4):
            steps, offsets, group = parts["_steps"], parts["_offsets"], encoding.group // 2
            return sized(kind=INT4, data=data, scales=steps, offsets=offsets, group=group)
        if isinstance(encoding, Fp8Blocks):
            scales, size = parts["_scale_inv"], encoding.block
            return sized(
                kind=FP8_BLOCKS,
                data=data.view(torch.uint8),
                scales=scales,
                offsets=scales,
                group=size,
                block=size,
                height=encoding.rows // encoding.stacked,
            )
        if isinstance(encoding, ChannelScaled):
            scales, is_float = parts["_scales"], data.dtype.is_floating_point
            bits, kind = (data.view(torch.uint8), FP8) if is_float else (data, INT8)
            return sized(kind=kind, data=bits, scales=scales, offsets=scales)
        return cls._plain(data)

    @classmethod
    def _plain(cls, data: Tensor) -> SlotMatrix:
        _, rows, columns = data.shape
        return cls(kind=PLAIN, rows=rows, columns=columns, data=data, scales=data, offsets=data)

    def arguments(self, tile: int) -> dict[str, Any]:
        """Those of a kernel that calls `row_sums`.

        Args:
            tile: Elements of a row that a program reads at once, at most; a power of two.
        """
        is_grouped = self.kind in GROUPED
        elements = self.data.shape[2] // (3 if self.kind == LOSSLESS else 1)
        padded = triton.next_power_of_2(self.group) if is_grouped else 1
        steps = elements // self.group if is_grouped else elements
        if self.kind == FP8_BLOCKS:
            steps = triton.cdiv(elements, self.group)
        at_once = max(1, min(tile // padded, triton.next_power_of_2(steps)))
        return {
            "weight": self.data,
            "scales": self.scales,
            "offsets": self.offsets,
            "num_rows": self.rows,
            "num_elements": elements,
            "num_steps": steps,
            "slot_stride": self.data.stride(0),
            "row_stride": self.data.stride(1),
            "scale_slot_stride": self.scales.stride(0),
            "scale_row_stride": self.scales.stride(1),
            "height": self.height,
            "KIND": self.kind,
            "COLUMNS": self.columns,
            "GROUP": self.group,
            "PADDED": padded,
            "AT_ONCE": at_once,
            "SHARED_ROWS": self.block,
        }


@triton.jit
def load_inputs(  # noqa: ANN201
    state,
    start,
    num_elements,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Where a tile's elements are in a row, which are there, and what they are multiplied with.

    Args:
        state: Pointer to a token's inputs.
        start: First element, or first group of them where groups share scales.
        num_elements: Of a row.
        KIND: See `SlotMatrix`, also what follows.
        GROUP: ..
        PADDED: ..
        AT_ONCE: ..

    Returns:
        Elements and whether they are there, inputs of their low numbers, inputs of their high ones
        (the same where an element is one number): [C], or [groups, elements] by group.
    """
    at = start + tl.arange(0, AT_ONCE)
    if KIND < KIND_FP8_BLOCKS:
        element, is_there = at, at < num_elements
    else:
        within = tl.arange(0, PADDED)
        element = at[:, None] * GROUP + within[None, :]
        is_there = (element < num_elements) & (within < GROUP)[None, :]
    if KIND < KIND_INT4:
        low = tl.load(state + element, mask=is_there, other=0.0).to(tl.float32)
        high = low
    else:
        low = tl.load(state + 2 * element, mask=is_there, other=0.0).to(tl.float32)
        high = tl.load(state + 2 * element + 1, mask=is_there, other=0.0).to(tl.float32)
    return element, is_there, low, high


@triton.jit
def row_sums(  # noqa: ANN201
    matrix,
    slot,
    row,
    start,
    tile,
    KIND: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
):
    """Sum over a tile's elements of weight times input, [R] float32.

    Args:
        matrix: Of `SlotMatrix.arguments`, in this order: weight, scales, offsets, num_rows,
            slot_stride, row_stride, scale_slot_stride, scale_row_stride, height.
        slot: Which slot.
        row: Outputs, [R].
        start: What `load_inputs` was given.
        tile: What it gave.
        KIND: See `SlotMatrix`.
        AT_ONCE: See `load_inputs`.
        SHARED_ROWS: See `SlotMatrix.block`.
    """
    weight, scales, offsets, num_rows = matrix[0], matrix[1], matrix[2], matrix[3]
    slot_stride, row_stride = matrix[4], matrix[5]
    scale_slot_stride, scale_row_stride, height = matrix[6], matrix[7], matrix[8]
    element, is_there, low, high = tile
    is_row = row < num_rows
    base = weight + slot * slot_stride
    if KIND < KIND_FP8_BLOCKS:
        where = base + row[:, None] * row_stride + element[None, :]
        raw = tl.load(where, mask=is_row[:, None] & is_there[None, :], other=0)
        number = _float8(raw) if KIND == KIND_FP8 else raw.to(tl.float32)
        total = tl.sum(number * low[None, :], 1)
        if KIND > KIND_PLAIN:
            at = slot * scale_slot_stride + row * scale_row_stride
            total *= tl.load(scales + at, mask=is_row, other=0.0)
        return total
    else:  # noqa: RET505 (what is not compiled for a kind must not follow a return)
        where = base + row[:, None, None] * row_stride + element[None, :, :]
        mask = is_row[:, None, None] & is_there[None, :, :]
        raw = tl.load(where, mask=mask, other=0)
        shared = row
        if SHARED_ROWS > 1:
            stack = row // height
            shared = stack * tl.cdiv(height, SHARED_ROWS) + (row - stack * height) // SHARED_ROWS
        group = start + tl.arange(0, AT_ONCE)
        at = slot * scale_slot_stride + shared[:, None] * scale_row_stride + group[None, :]
        has_scale = is_row[:, None] & (tl.max(is_there.to(tl.int32), 1) > 0)[None, :]
        scale = tl.load(scales + at, mask=has_scale, other=0)
        if KIND == KIND_FP8_BLOCKS:
            total = tl.sum(_float8(raw) * low[None, :, :], 2) * scale
        else:
            sums = _float_of(raw & 15) * low[None, :, :] + _float_of(raw >> 4) * high[None, :, :]
            offset = tl.load(offsets + at, mask=has_scale, other=0.0).to(tl.float32)
            total = tl.sum(sums, 2) * scale.to(tl.float32)
            total += offset * tl.sum(low + high, 1)[None, :]
        return tl.sum(total, 1)


@triton.jit
def _float_of(code):
    """A small integer, by the bits of 2**23 + code; faster than a conversion."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _float8(bits):
    """The number that e4m3 bits stand for: those of float32 with a smaller exponent."""
    wide = bits.to(tl.int32)
    moved = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
