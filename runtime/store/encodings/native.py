"""Encodings that checkpoints come in, read as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foreroute.runtime.store.encodings.encoding import Encoder, Encoding, Part
from foreroute.runtime.store.encodings.fewer_bits import nibbles

MXFP4_GROUP = 32
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_BLOCK = 128


class Mxfp4(Encoding):
    """Floats of 4 bits (e2m1) in groups of 32 that share a power of two: GPT-OSS's checkpoints."""

    is_native = True

    @property
    def grain(self) -> tuple[int, int]:
        """See `Encoding.grain`."""
        return 1, MXFP4_GROUP

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
        numbers = table[nibbles(parts["_blocks"]).int()]  # [n, rows, groups, 32]
        exponents = parts["_scales"].int() - 127
        return torch.ldexp(numbers, exponents.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Fp8Blocks(Encoding):
    """Floats of 8 bits (e4m3), a float32 factor per block of 128 x 128: DeepSeek, Qwen."""

    is_native: ClassVar[bool] = True
    stacked: int = 1
    """Matrices that lie one below the other, each with blocks of its own (gate and up: 2)."""
    block: int = FP8_BLOCK

    @property
    def grain(self) -> tuple[int, int]:
        """See `Encoding.grain`."""
        return self.block, self.block

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
