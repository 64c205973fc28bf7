"""Reads checkpoints in fewer bits: every matrix as its number values, decoded when it is indexed.

A matrix's form is told by the tensors that lie beside it; the config says only what they leave
open. So layers that were left in 16 bits are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

WORD_BITS = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of 8 numbers AWQ keeps the n-th."""
SCALE_SUFFIXES = ("_scale_inv", "_scale")
PACKED, GPTQ = ".weight_packed", ".qweight"
COMPRESSED_FORMATS = (
    "dense",
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
)
READABLE = "mxfp4, fp8, fbgemm_fp8, modelopt (FP8), compressed-tensors (fp8, int8, int4), gptq, awq"
Index = Any
"""What indexes a tensor's first dimension, or `...`."""


def require_readable(quantization: Mapping[str, Any]) -> None:
    """Refuse checkpoints in a form that cannot be decoded here.

    Args:
        quantization: The config's own words.

    Raises:
        ValueError: If it is one; names what can be read.
    """
    method, bits = quantization.get("quant_method"), quantization.get("bits")
    how = f"{method!r}"
    if method == "compressed-tensors":
        groups = (quantization.get("config_groups") or {}).values()
        forms = {quantization.get("format"), *(g.get("format") for g in groups)} - {None}
        is_known = forms - {"mixed-precision"} <= set(COMPRESSED_FORMATS)
        how += f" ({', '.join(sorted(map(str, forms)))})"
    elif method in ("gptq", "awq"):
        is_known = bits in (4, 8) and quantization.get("version", "gemm") in ("gemm", None)
        how += f" ({bits} bits)"
    elif method == "modelopt":
        is_known = quantization.get("quant_algo") == "FP8"
        how += f" ({quantization.get('quant_algo')})"
    else:
        is_known = method in ("mxfp4", "fp8", "fbgemm_fp8")
    if not is_known:
        raise ValueError(
            f"The checkpoint is quantised as {how}, which cannot be read; known: {READABLE}. "
            "Use the checkpoint in full precision."
        )


class DecodedTensors(Mapping[str, Any]):
    """A quantised checkpoint's tensors as if it were none, by the names they would then have."""

    def __init__(
        self, tensors: Mapping[str, Any], quantization: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """Find what belongs together.

        Args:
            tensors: The checkpoint's.
            quantization: The config's own words.
            dtype: Of what is decoded.
        """
        self._tensors, self._dtype = tensors, dtype
        self._is_awq = quantization.get("quant_method") == "awq"
        is_old_gptq = quantization.get("checkpoint_format", "gptq") == "gptq"
        self._zeros_add = 1 if is_old_gptq and not self._is_awq else 0
        self._bits = int(quantization.get("bits") or 4)
        self._block = _block_of(quantization)
        self._decoders: dict[str, Callable[[Index], Tensor]] = {}
        parts: set[str] = set()
        for name in tensors:
            if name.endswith(PACKED):
                self._add_packed(name.removesuffix(PACKED), parts)
            elif name.endswith(GPTQ):
                self._add_words(name.removesuffix(GPTQ), parts)
            else:
                self._add_scaled(name, parts)
        self._plain = [name for name in tensors if name not in parts | set(self._decoders)]

    def __getitem__(self, name: str) -> Any:
        decode = self._decoders.get(name)
        return self._tensors[name] if decode is None else _Decoded(decode, self._dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._decoders

    def __len__(self) -> int:
        return len(self._plain) + len(self._decoders)

    def _add_scaled(self, name: str, parts: set[str]) -> None:
        """Numbers of 8 bits, and factors in a tensor beside them."""
        scales = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in self._tensors]
        if not scales:
            return
        zeros = f"{name}_zero_point"
        parts |= {*scales, zeros}

        def decode(index: Index) -> Tensor:
            numbers = self._tensors[name]
            shape = numbers.get_shape()
            values: Tensor = numbers[index].float()
            if zeros in self._tensors:
                values = values - self._spread(zeros, shape, index)
            return values * self._spread(scales[0], shape, index)

        self._decoders[name] = decode

    def _spread(self, name: str, shape: list[int], index: Index) -> Tensor:
        """Factors of blocks, one for each number that they belong to (or that broadcast)."""
        whole: Tensor = self._tensors[name][...]
        is_exponent = whole.dtype == torch.uint8
        factors = (whole.float() - 127).exp2() if is_exponent else whole.float()
        if factors.numel() == 1:
            return factors.reshape(())
        factors = factors.reshape(*factors.shape, *[1] * (len(shape) - factors.dim()))
        for dim, (has, needs) in enumerate(zip(factors.shape, shape, strict=True)):
            if has in (1, needs):
                continue
            size = needs // has
            if self._block is not None and dim >= len(shape) - 2:
                size = self._block[dim - len(shape)]
            elif needs % has:
                raise ValueError(f"{name} has {has} factors for {needs} numbers: of which size?")
            factors = factors.repeat_interleave(size, dim).narrow(dim, 0, needs)
        is_sliced = index is not ... and factors.shape[0] > 1
        return factors[index] if is_sliced else factors

    def _add_packed(self, module: str, parts: set[str]) -> None:
        """compressed-tensors: words along a row, offset by half of what the bits can say."""
        packed, shape_of = module + PACKED, f"{module}.weight_shape"
        scale, zeros, order = (f"{module}.weight_{n}" for n in ("scale", "zero_point", "g_idx"))
        parts |= {packed, shape_of, scale, zeros, order}

        def decode(index: Index) -> Tensor:
            words: Tensor = self._tensors[packed][...]
            rows, columns = (int(n) for n in self._tensors[shape_of][...].tolist())
            bits = WORD_BITS * words.shape[1] // columns
            half = 1 << (bits - 1)
            values = _unpack(words, bits)[:, :columns] - half
            scales: Tensor = self._tensors[scale][...].float().reshape(rows, -1)
            group = self._groups(order, columns, scales.shape[1])
            if zeros in self._tensors:
                zero = self._tensors[zeros][...]
                if zero.dtype == torch.int32:  # packed along the other dimension
                    zero = _unpack(zero.T, bits).T[:rows] - half
                values = values - zero.float().reshape(rows, -1)[:, group]
            matrix: Tensor = values * scales[:, group]
            return matrix[index]

        self._decoders[f"{module}.weight"] = decode

    def _groups(self, order: str, columns: int, num_groups: int) -> Tensor:
        """Which group each input belongs to, [columns]."""
        if order in self._tensors:
            given: Tensor = self._tensors[order][...].long()
            if bool((given >= 0).all()):
                return given
        return torch.arange(columns) // -(-columns // num_groups)

    def _add_words(self, module: str, parts: set[str]) -> None:
        """GPTQ packs words along a column, AWQ along a row, in an order of its own."""
        qweight, qzeros = module + GPTQ, f"{module}.qzeros"
        scale, order = f"{module}.scales", f"{module}.g_idx"
        parts |= {qweight, qzeros, scale, order}

        def decode(index: Index) -> Tensor:
            words, scales = self._tensors[qweight][...], self._tensors[scale][...].float()
            zeros = self._unpack_row(self._tensors[qzeros][...])  # [groups, outputs]
            values = self._unpack_row(words) if self._is_awq else _unpack(words.T, self._bits).T
            group = self._groups(order, len(values), len(scales))
            numbers: Tensor = (values - (zeros[group] + self._zeros_add)) * scales[group]
            return numbers.T[index]

        self._decoders[f"{module}.weight"] = decode

    def _unpack_row(self, words: Tensor) -> Tensor:
        values = _unpack(words, self._bits)
        if not self._is_awq:
            return values
        in_words: Tensor = values.unflatten(1, (-1, len(AWQ_ORDER)))
        return in_words[..., list(AWQ_ORDER)].flatten(1)


class _Decoded:
    """Stands in for a slice of a file."""

    def __init__(self, decode: Callable[[Index], Tensor], dtype: torch.dtype) -> None:
        self._decode, self._dtype = decode, dtype

    def __getitem__(self, index: Index) -> Tensor:
        return self._decode(index).to(self._dtype)


def _block_of(quantization: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows and columns that share a factor, where the config says so."""
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    said = [quantization.get("weight_block_size"), *(w.get("block_structure") for w in weights)]
    return next((tuple(map(int, block)) for block in said if block), None)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Numbers out of words, the lowest bits first, [rows, words * 32 / bits] float32."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(1).float()


def are_in_blocks(tensors: Mapping[str, Any], block: int) -> bool:
    """Whether every expert's matrix is of 8-bit floats with a factor for each block, and no other.

    Args:
        tensors: The checkpoint's.
        block: Rows and columns of one.
    """
    experts = [n for n in tensors if ".experts." in n and n.endswith((".weight", "_proj"))]
    for name in experts:
        numbers, scales = tensors[name], tensors.get(f"{name}_scale_inv")
        grid = [-(-size // block) for size in numbers.get_shape()[-2:]]
        if numbers.get_dtype() != "F8_E4M3" or scales is None:
            return False
        if scales.get_shape()[-2:] != grid or scales.get_dtype() != "F32":
            return False
    return bool(experts)
