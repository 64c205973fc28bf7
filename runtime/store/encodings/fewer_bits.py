"""Encodings that round: 16, 8 or 4 bits a number."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foreroute.runtime.store.encodings.encoding import Encoding, Part

INT8_LARGEST = 127.0
FP8_LARGEST = 448.0  # of float8_e4m3fn
INT4_STEPS = 15.0
INT4_GROUPS = (128, 64, 32)
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Plain(Encoding):
    """As a module has them, but for outputs being rows."""

    dtype: torch.dtype = torch.bfloat16

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`."""
        return {"": ((self.rows, self.columns), self.dtype)}

    def keeps(self, dtype: torch.dtype) -> bool:
        """See `Encoding.keeps`."""
        return dtype == self.dtype

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`."""
        return {"": matrices.to(self.dtype)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        return parts[""]


@dataclass(frozen=True)
class Cast(Plain):
    """16 bits each: bfloat16."""


class ChannelScaled(Encoding, ABC):
    """8 bits each, and a float32 factor per output channel."""

    dtype: ClassVar[torch.dtype]
    largest: ClassVar[float]

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`."""
        return {
            "": ((self.rows, self.columns), self.dtype),
            "_scales": ((self.rows, 1), torch.float32),
        }

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`."""
        scales = matrices.float().abs().amax(-1, keepdim=True) / self.largest
        scales = scales.clamp_min(SMALLEST_SCALE)
        scaled = matrices.float() / scales
        if not self.dtype.is_floating_point:
            scaled = scaled.round()
        return {"": scaled.to(self.dtype), "_scales": scales}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        return parts[""].float() * parts["_scales"]


class Int8(ChannelScaled):
    """Integers of 8 bits, scaled per output channel."""

    dtype, largest = torch.int8, INT8_LARGEST


class Fp8(ChannelScaled):
    """Floats of 8 bits (e4m3), scaled per output channel."""

    dtype, largest = torch.float8_e4m3fn, FP8_LARGEST


class Int4(Encoding):
    """4 bits each, two in a byte; a float16 step and offset per group of 128, 64 or 32 inputs.

    Where none of these divides the inputs, the largest even divisor from 16 to 128 does.
    """

    @property
    def grain(self) -> tuple[int, int]:
        """See `Encoding.grain`."""
        return 1, self.group

    @property
    def group(self) -> int:
        """Inputs that share a step.

        Raises:
            ValueError: If no group size divides the inputs.
        """
        groups: list[int] = [*INT4_GROUPS, *range(126, 15, -2)]
        for group in groups:
            if self.columns % group == 0:
                return group
        raise ValueError(
            f"int4 needs a number of inputs that groups of 16 to 128 divide, not {self.columns}; "
            "use int8."
        )

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`."""
        groups = (self.rows, self.columns // self.group, 1)
        return {
            "": ((self.rows, self.columns // 2), torch.uint8),
            "_steps": (groups, torch.float16),
            "_offsets": (groups, torch.float16),
        }

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`."""
        grouped = matrices.float().unflatten(-1, (-1, self.group))  # [rows, groups, group]
        offsets = grouped.amin(-1, keepdim=True).half()
        steps = ((grouped.amax(-1, keepdim=True) - offsets.float()) / INT4_STEPS).half()
        steps = steps.clamp_min(torch.finfo(torch.float16).tiny)
        codes = ((grouped - offsets.float()) / steps.float()).round().clamp(0, INT4_STEPS)
        flat = codes.flatten(-2).to(torch.uint8)  # [..., rows, columns]
        return {"": flat[..., 0::2] | flat[..., 1::2] << 4, "_steps": steps, "_offsets": offsets}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        codes = nibbles(parts[""]).unflatten(-1, (-1, self.group)).float()
        grouped: Tensor = codes * parts["_steps"].float() + parts["_offsets"].float()
        return grouped.flatten(-2)


def nibbles(packed: Tensor) -> Tensor:
    """Two numbers of 4 bits out of every byte, the low one first: twice as many columns."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
