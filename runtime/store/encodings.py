"""How an expert's matrix is stored in fewer bits, and how it becomes a matrix again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

INT8_LARGEST = 127.0
FP8_LARGEST = 448.0  # of float8_e4m3fn
INT4_STEPS = 15.0
INT4_GROUPS = (128, 64, 32)
SMALLEST_SCALE = 1e-12
MXFP4_GROUP = 32
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_BLOCK = 128
Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one stored tensor of one expert."""


@dataclass(frozen=True)
class Encoding(ABC):
    """Stores matrices of one shape; rows are output channels, columns the inputs."""

    rows: int
    columns: int
    is_native: ClassVar[bool] = False
    """Whether checkpoints hold the parts themselves, under the parameter's name and suffix."""

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """What is stored for one matrix, by the suffix that is added to the parameter's name."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrices, [n, rows, columns] float32, from parts of [n, ...] each."""

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """What to store for one matrix, [rows, columns] in any float dtype.

        Raises:
            ValueError: If the encoding only exists in checkpoints.
        """
        raise ValueError(f"{type(self).__name__} is read from checkpoints only.")


class Cast(Encoding):
    """16 bits each: bfloat16."""

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`."""
        return {"": ((self.rows, self.columns), torch.bfloat16)}

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`."""
        return {"": matrix.bfloat16()}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        return parts[""].float()


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

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`."""
        scales = matrix.float().abs().amax(-1, keepdim=True) / self.largest
        scales = scales.clamp_min(SMALLEST_SCALE)
        scaled = matrix.float() / scales
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

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`."""
        grouped = matrix.float().unflatten(-1, (-1, self.group))  # [rows, groups, group]
        offsets = grouped.amin(-1, keepdim=True).half()
        steps = ((grouped.amax(-1, keepdim=True) - offsets.float()) / INT4_STEPS).half()
        steps = steps.clamp_min(torch.finfo(torch.float16).tiny)
        codes = ((grouped - offsets.float()) / steps.float()).round().clamp(0, INT4_STEPS)
        flat = codes.flatten(-2).to(torch.uint8)  # [rows, columns]
        return {"": flat[:, 0::2] | flat[:, 1::2] << 4, "_steps": steps, "_offsets": offsets}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        codes = _nibbles(parts[""]).unflatten(-1, (-1, self.group)).float()
        grouped: Tensor = codes * parts["_steps"].float() + parts["_offsets"].float()
        return grouped.flatten(-2)


class Mxfp4(Encoding):
    """Floats of 4 bits (e2m1) in groups of 32 that share a power of two: GPT-OSS's checkpoints."""

    is_native = True

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`."""
        groups = self.columns // MXFP4_GROUP
        return {
            "_blocks": ((self.rows, groups, MXFP4_GROUP // 2), torch.uint8),
            "_scales": ((self.rows, groups), torch.uint8),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        values = [*MXFP4_VALUES, *(-value for value in MXFP4_VALUES)]
        table = torch.tensor(values, device=parts["_blocks"].device)
        numbers = table[_nibbles(parts["_blocks"]).int()]  # [n, rows, groups, 32]
        exponents = parts["_scales"].int() - 127
        return torch.ldexp(numbers, exponents.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Fp8Blocks(Encoding):
    """Floats of 8 bits (e4m3), a float32 factor per block of 128 x 128: DeepSeek, Qwen."""

    is_native: ClassVar[bool] = True
    stacked: int = 1
    """Matrices that lie one below the other, each with blocks of its own (gate and up: 2)."""
    block: int = FP8_BLOCK

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`."""
        block_rows = self.stacked * -(-self.rows // self.stacked // self.block)
        scales = (block_rows, -(-self.columns // self.block))
        return {
            "": ((self.rows, self.columns), torch.float8_e4m3fn),
            "_scale_inv": (scales, torch.float32),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        height = self.rows // self.stacked
        scales = parts["_scale_inv"].unflatten(-2, (self.stacked, -1))
        scales = scales.repeat_interleave(self.block, -2)[..., :height, :]
        scales = scales.repeat_interleave(self.block, -1)[..., : self.columns]
        matrices: Tensor = parts[""].float() * scales.flatten(-3, -2)
        return matrices


def _nibbles(packed: Tensor) -> Tensor:
    """Two numbers of 4 bits out of every byte, the low one first: twice as many columns."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


Encoder = Callable[[str, int, int], Encoding]
"""(parameter, rows, columns) -> how its matrices are stored."""
EXPERT_DTYPES: dict[str, type[Encoding]] = {
    "bf16": Cast,
    "fp8": Fp8,
    "int8": Int8,
    "int4": Int4,
}
"""What experts can be stored as when they are loaded."""


@dataclass(frozen=True)
class EncodedParameter:
    """A parameter of an experts module that is stored in fewer bits."""

    encoding: Encoding
    shape: tuple[int, ...]
    """For one expert, as the module has it."""
    dtype: torch.dtype
    """What it is decoded to."""
    is_transposed: bool
    """Whether the module has inputs as rows."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """What to store for one expert's weight, in the module's shape."""
        return self.encoding.encode(weight.T if self.is_transposed else weight)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """[n, *shape] in the parameter's dtype, from parts of [n, ...]."""
        matrices = self.encoding.decode(parts).to(self.dtype)
        return matrices.mT.contiguous() if self.is_transposed else matrices


class EncodedWeights:
    """Stands in for a parameter [n, ...]: indexing decodes the experts asked for."""

    def __init__(self, parameter: EncodedParameter, parts: Mapping[str, Tensor]) -> None:
        """Stand in for one parameter.

        Args:
            parameter: How it is stored.
            parts: What is stored, by suffix, [n, ...] each.
        """
        self.parameter = parameter
        self.parts = parts
        self.dtype = parameter.dtype
        self.shape = (len(next(iter(parts.values()))), *parameter.shape)

    def __getitem__(self, expert_ids: Tensor | slice) -> Tensor:
        """[len(expert_ids), ...] in the parameter's dtype."""
        chosen = {}
        for name, part in self.parts.items():  # as bytes: not every device can index 8-bit floats
            raw = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
            chosen[name] = raw[expert_ids].view(part.dtype)
        return self.parameter.decode(chosen)


def encoder_named(name: str) -> Encoder | None:
    """The encoder an `expert_dtype` stands for; None for `auto`.

    Raises:
        ValueError: If the name is another; the message lists the known ones.
    """
    if name == "auto":
        return None
    if name not in EXPERT_DTYPES:
        raise ValueError(f"Unknown expert_dtype {name!r}; known: auto, {', '.join(EXPERT_DTYPES)}.")
    encoding = EXPERT_DTYPES[name]
    return lambda _, rows, columns: encoding(rows, columns)


def native_encoder(quantization: Mapping[str, Any]) -> Encoder | None:
    """The encoder that keeps a quantised checkpoint's experts as they are, by its config's words.

    Returns:
        None where none does: such experts are decoded while they are read.
    """
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return lambda _, rows, columns: Mxfp4(rows, columns)
    block = tuple(quantization.get("weight_block_size") or ())
    if method == "fp8" and len(block) == 2 and len(set(block)) == 1:
        return lambda name, rows, columns: Fp8Blocks(
            rows, columns, stacked=2 if name == "gate_up_proj" else 1, block=int(block[0])
        )
    return None
