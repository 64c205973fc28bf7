"""bfloat16 in 12 bits without loss: trained weights use few of the exponents that 8 bits name.

A row is three runs of 32-bit words that a product reads as they lie, and a line with the row's
base and the few weights that its fifteen codes do not reach; docs/lossless.md has the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foreroute.runtime.store.encodings.encoding import Encoding, Part

PLANES = 8
"""Equal runs of a row's columns; a word holds bits of one column of several of them."""
PAIRS = (((0, 2), -7), ((1, 3), -3), ((4, 6), 1), ((5, 7), 5))
"""Planes whose numbers lie in one word when they are decoded, and how far up their codes are."""
LARGEST_CODE = 15
LARGEST_BASE = 191
"""So that kernels can multiply by 2 ** (base - 64)."""
IN_LINE = 3
"""Exceptions that a line holds, behind a word that says whose they are."""
WEIGHTS_PER_SPARE_LINE = 8192
FEWEST_SPARE_LINES = 16
MOST_SPARE_LINES = (1 << 16) - 1
MOST_LINES_OF_ROW = 255
MOST_COLUMNS = 1 << 16
WORTH_IT = 0.9
"""A matrix that takes more than this share of bfloat16's bytes stays as it is."""
MANTISSAS, SIGNS, CODES = 0x007F007F, -0x7FFF8000, 0x07800780
"""Bits of the two numbers in a word."""


class TooManyExceptions(ValueError):
    """A matrix has more exceptions than there is room for; it is to stay as it is."""

    parameter = ""
    """Which one, where that is known."""


class Lossless(Encoding):
    """12 bits each: sign and mantissa in a byte, the exponent as a code of four bits.

    Code 1..15 stands for the exponent `base + code`, with a base for each row. Code 0 stands for
    zero, of either sign, or for an exception: those are listed, bit for bit.
    """

    @property
    def words(self) -> int:
        """Words per plane, N: a row is 2 N words of signs and mantissas, then N of codes."""
        return -(-self.columns // PLANES)

    @property
    def spare_lines(self) -> int:
        """Lines for exceptions that do not fit their rows' own."""
        lines = FEWEST_SPARE_LINES + self.rows * self.columns // WEIGHTS_PER_SPARE_LINE
        return min(lines, MOST_SPARE_LINES)

    def parts(self) -> dict[str, Part]:
        """See `Encoding.parts`; one line per row, then the spare ones."""
        return {
            "": ((self.rows, 3 * self.words), torch.int32),
            "_lines": ((self.rows + self.spare_lines, 1 + IN_LINE), torch.int32),
        }

    def keeps(self, dtype: torch.dtype) -> bool:
        """See `Encoding.keeps`."""
        return dtype == torch.bfloat16

    def pays(self, dtype: torch.dtype) -> bool:
        """See `Encoding.pays`."""
        words = sum(rows * columns for (rows, columns), _ in self.parts().values())
        is_smaller = words * 4 <= WORTH_IT * self.rows * self.columns * torch.bfloat16.itemsize
        return dtype == torch.bfloat16 and self.columns <= MOST_COLUMNS and is_smaller

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        """See `Encoding.encode`; on the CPU with all its cores, else on the matrices' device.

        Raises:
            ValueError: If the matrices are not in bfloat16.
            TooManyExceptions: If one has more exceptions than there is room for.
        """
        self._require_bfloat16(matrices)
        flat = matrices.reshape(-1, self.rows, self.columns)
        data, lines = (
            torch.empty(len(flat), *shape, dtype=dtype, device=flat.device)
            for shape, dtype in self.parts().values()
        )
        if flat.device.type == "cpu":
            self.encode_into(flat, {"": list(data), "_lines": list(lines)})
        else:
            padded = torch.nn.functional.pad(flat, (0, self.words * PLANES - self.columns))
            bits = padded.contiguous().view(torch.int16)  # [n, rows, 8 N]
            self._require(self._pack(bits, data, lines))
        outer = matrices.shape[:-2]
        return {
            "": data.view(*outer, *data.shape[1:]),
            "_lines": lines.view(*outer, *lines.shape[1:]),
        }

    def encode_into(self, matrices: Tensor, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """See `Encoding.encode_into`; with all cores, and without a copy."""
        from foreroute.runtime.store.encodings.lossless_on_cpu import pack

        self._require_bfloat16(matrices)
        self._require(pack(matrices, parts[""], parts["_lines"]))

    def _require_bfloat16(self, matrices: Tensor) -> None:
        if matrices.dtype != torch.bfloat16:
            raise ValueError(f"12 bits without loss are for bfloat16, not {matrices.dtype}.")

    def _require(self, is_done: bool) -> None:
        if not is_done:
            raise TooManyExceptions(
                f"A matrix of {self.rows} x {self.columns} has more exceptions than fit the "
                f"{self.spare_lines} lines beside its rows'."
            )

    def _pack(self, bits: Tensor, data: Tensor, lines: Tensor) -> bool:
        """Write words and lines for [n, rows, 8 N] int16; whether there was room for all."""
        exponent = (bits >> 7) & 0xFF
        base = (exponent.amax(-1, keepdim=True) - LARGEST_CODE).clamp_(0, LARGEST_BASE)
        is_exception = _out_of_reach(bits, exponent, base)
        counts = is_exception.sum(-1, dtype=torch.int32)  # [n, rows]
        crowded = (counts > IN_LINE).nonzero(as_tuple=True)
        if len(crowded[0]):
            base[crowded] = _best_base(bits[crowded], exponent[crowded])
            is_exception[crowded] = _out_of_reach(bits[crowded], exponent[crowded], base[crowded])
            counts[crowded] = is_exception[crowded].sum(-1, dtype=torch.int32)
        code = (exponent - base).clamp_(0, LARGEST_CODE)
        numbers = torch.where(is_exception, 0, (bits & -0x7F81) | (code << 7))
        data.copy_(_words(numbers.unflatten(-1, (PLANES, -1))).flatten(-2))
        return self._write_lines(bits, base.squeeze(-1).int(), counts, is_exception, lines)

    def _write_lines(
        self, bits: Tensor, base: Tensor, counts: Tensor, is_exception: Tensor, lines: Tensor
    ) -> bool:
        more = (counts - 1).clamp(min=0) // IN_LINE  # [n, rows] spare lines of each row
        first = more.cumsum(-1, dtype=torch.int32) - more
        if int(more.sum(-1).amax()) > self.spare_lines or int(more.amax()) > MOST_LINES_OF_ROW:
            return False
        lines.zero_()
        lines[:, : self.rows, 0] = base | more << 8 | first << 16
        matrix, row, column = is_exception.nonzero(as_tuple=True)
        before = counts.flatten().cumsum(0) - counts.flatten()
        nth = torch.arange(len(row), device=row.device) - before[matrix * self.rows + row]
        spare = self.rows + first[matrix, row] + nth // IN_LINE - 1
        line = torch.where(nth < IN_LINE, row, spare)
        value = column << 16 | (bits[matrix, row, column].long() & 0xFFFF)
        lines[matrix, line, 1 + nth % IN_LINE] = (value - ((value >> 31) << 32)).int()
        in_spare = nth >= IN_LINE
        lines[matrix[in_spare], line[in_spare], 0] = row[in_spare].int()
        return True

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Encoding.decode`; bfloat16."""
        outer = parts[""].shape[:-2]
        data, lines = parts[""].flatten(0, -3), parts["_lines"].flatten(0, -3)
        if data.device.type == "cuda":
            from foreroute.runtime.device.kernels.lossless import unpack

            matrices: Tensor = unpack(data, lines, self.rows, self.columns)
            return matrices.view(*outer, self.rows, self.columns)
        numbers = self._coded(data, lines[:, : self.rows, :1] & 0xFF)  # zero where exceptions are
        row = torch.arange(lines.shape[1]).repeat(len(lines), 1)
        row[:, self.rows :] = lines[:, self.rows :, 0]
        listed = lines[..., 1:]
        column = listed >> 16 & 0xFFFF
        at = row.unsqueeze(-1) * (PLANES * self.words) + column
        bits = numbers.view(torch.int16).flatten(1)
        bits.scatter_add_(1, at.flatten(1), listed.to(torch.int16).flatten(1))
        return numbers[..., : self.columns].reshape(*outer, self.rows, self.columns)

    def _coded(self, data: Tensor, base: Tensor) -> Tensor:
        """Numbers by their codes, [n, rows, 8 N] bfloat16; see `kernels/lossless.py`."""
        first, second, codes = data.unflatten(-1, (3, -1)).unbind(-2)  # [n, rows, N]
        scales = [_power_of_two(base // 2), _power_of_two(base - base // 2)]
        numbers = torch.empty(*data.shape[:2], PLANES, self.words, dtype=torch.bfloat16)
        sources = (
            (first, first << 8),
            (first >> 8, first),
            (second, second << 8),
            (second >> 8, second),
        )
        for (planes, up), (mantissas, signs) in zip(PAIRS, sources, strict=True):
            moved = codes >> up if up > 0 else codes << -up
            pair = (mantissas & MANTISSAS) | (signs & SIGNS) | (moved & CODES)
            for plane, number in zip(
                planes, pair.view(torch.bfloat16).unflatten(-1, (-1, 2)).unbind(-1), strict=True
            ):
                torch.mul(number, scales[0], out=numbers[:, :, plane]).mul_(scales[1])
        return numbers.flatten(2)


def count_exceptions(lines: Tensor) -> int:
    """Weights that are listed rather than coded, in `_lines` parts of any number of matrices."""
    return int((lines[..., 1:] != 0).sum())


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent in bfloat16, for integers of -126..127."""
    return ((exponent + 127) << 7).to(torch.int16).view(torch.bfloat16)


def _out_of_reach(bits: Tensor, exponent: Tensor, base: Tensor) -> Tensor:
    """Whether a number is neither zero nor within the codes above its row's base."""
    code = exponent - base
    return ((code < 1) | (code > LARGEST_CODE)) & ((bits & 0x7FFF) != 0)


def _best_base(bits: Tensor, exponent: Tensor) -> Tensor:
    """The highest base that leaves the fewest exceptions, for rows [r, 8 N]; [r, 1]."""
    is_number = ((bits & 0x7FFF) != 0).int()
    counts = torch.zeros(len(bits), 256, dtype=torch.int32, device=bits.device)
    counts.scatter_add_(1, exponent.long(), is_number)
    below = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))  # numbers of lesser exponents
    bases = torch.arange(LARGEST_BASE + 1, device=bits.device)
    reached = below[:, bases + LARGEST_CODE + 1] - below[:, bases + 1]
    best = LARGEST_BASE - reached.flip(-1).argmax(-1, keepdim=True)
    return best.to(torch.int16)


def _words(numbers: Tensor) -> Tensor:
    """[.., 8, N] int16 with codes for exponents to [.., 3, N] int32."""

    def pair(low: int, high: int) -> Tensor:
        return (numbers[..., low, :].int() & 0xFFFF) | numbers[..., high, :].int() << 16

    codes = torch.zeros_like(numbers[..., 0, :], dtype=torch.int32)
    signed = []
    for i, ((low, high), up) in enumerate(PAIRS):
        both = pair(low, high)
        code = both & CODES
        codes |= code << up if up > 0 else code >> -up
        if i % 2 == 0:
            signed.append((both & MANTISSAS) | (both >> 8 & 0x800080))
        else:
            signed[-1] |= (both & MANTISSAS) << 8 | (both & SIGNS)
    return torch.stack([*signed, codes], dim=-2)
