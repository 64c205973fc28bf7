"""Holds every expert's weights in host memory, each expert's parameters contiguous in one row.

One copy then moves one expert. A slot on the device has the same layout as a row on the host.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters.weightless import parameter_shapes
from foreroute.runtime.store.encodings import (
    EncodedParameter,
    EncodedWeights,
    Encoder,
    Encoding,
    Part,
    Plain,
)
from foreroute.runtime.store.pinning import PinningRefused, Pins, lock

ALIGNMENT_BYTES = 64  # every parameter starts on a boundary that any dtype and any kernel can use


@dataclass(frozen=True)
class ParameterSpec:
    """Where one parameter lies within an expert's row."""

    shape: tuple[int, ...]
    """Shape for one expert, without the experts dimension."""
    dtype: torch.dtype
    offset_bytes: int
    """From the start of the row."""

    @property
    def num_bytes(self) -> int:
        """Size of the parameter for one expert."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class RowLayout:
    """How the parameters of one expert lie in a row of bytes."""

    parameters: Mapping[str, ParameterSpec]
    """What lies in the row, by name."""
    row_bytes: int
    encoded: Mapping[str, EncodedParameter] = field(default_factory=dict)
    """Parameters of the module whose parts these are, where it has them in another way."""

    @classmethod
    def of(cls, experts: nn.Module, encoder: Encoder | None = None) -> RowLayout:
        """Layout for an experts module whose parameters are, or would be, [E, ...].

        Args:
            experts: The module.
            encoder: How to store its matrices; as they are if None.
        """
        chosen = _chosen_encodings(experts, encoder)
        parts: dict[str, Part] = {}
        encoded: dict[str, EncodedParameter] = {}
        for name, (shape, dtype) in parameter_shapes(experts).items():
            if name not in chosen:
                parts[name] = (shape[1:], dtype)
                continue
            is_transposed = bool(experts.is_transposed)
            encoded[name] = EncodedParameter(chosen[name], shape[1:], dtype, is_transposed)
            parts |= {name + suffix: part for suffix, part in chosen[name].parts().items()}
        parameters: dict[str, ParameterSpec] = {}
        offset = 0
        for name, (part_shape, dtype) in parts.items():
            spec = ParameterSpec(tuple(part_shape), dtype, offset)
            parameters[name] = spec
            offset += math.ceil(spec.num_bytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(parameters, offset, encoded)

    @property
    def is_exact(self) -> bool:
        """Whether every number of the module comes back bit for bit."""
        return all(parameter.is_exact for parameter in self.encoded.values())

    @property
    def is_native(self) -> bool:
        """Whether the row holds the checkpoint's own low-bit tensors."""
        return any(parameter.encoding.is_native for parameter in self.encoded.values())

    def span(self, name: str) -> tuple[int, int]:
        """Where the parts of an encoded parameter lie in the row: first byte, end."""
        specs = [self.parameters[name + suffix] for suffix in self.encoded[name].encoding.parts()]
        return specs[0].offset_bytes, specs[-1].offset_bytes + specs[-1].num_bytes

    def weights(self, rows: Tensor) -> dict[str, Any]:
        """The module's parameters inside a buffer of rows.

        Args:
            rows: [n, row_bytes] uint8, contiguous.

        Returns:
            By name, [n, ...]; what is stored in fewer bits decodes when it is indexed.
        """
        weights: dict[str, Any] = self.views(rows)
        for name, parameter in self.encoded.items():
            suffixes = parameter.encoding.parts()
            parts = {suffix: weights.pop(name + suffix) for suffix in suffixes}
            weights[name] = EncodedWeights(parameter, parts)
        return weights

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameters inside a buffer of rows, without a copy.

        Args:
            rows: [n, row_bytes] uint8, contiguous.

        Returns:
            By name, [n, ...] in the parameter's dtype, sharing memory with `rows`.
        """
        views = {}
        for name, spec in self.parameters.items():
            part = rows[:, spec.offset_bytes : spec.offset_bytes + spec.num_bytes]
            views[name] = part.view(spec.dtype).unflatten(1, spec.shape)
        return views


def _chosen_encodings(experts: nn.Module, encoder: Encoder | None) -> dict[str, Encoding]:
    """How each matrix of an experts module is stored, where not as the module has it."""
    chosen: dict[str, Encoding] = {}
    stays: set[str] = set()
    if encoder is None:
        return chosen
    for name, (shape, dtype) in parameter_shapes(experts).items():
        if len(shape) < 3:
            continue
        rows, columns = shape[:0:-1] if experts.is_transposed else shape[1:]
        encoding = encoder(name, rows, columns)
        chosen[name] = encoding if encoding.pays(dtype) else Plain(rows, columns, dtype)
        if chosen[name].parts() == {"": ((rows, columns), dtype)}:
            stays.add(name)
    # products read all matrices of an expert alike: with outputs as rows, or as the module does
    if experts.is_transposed and stays != set(chosen):
        return chosen
    return {name: encoding for name, encoding in chosen.items() if name not in stays}


def allocate_host(num_rows: int, row_bytes: int, *, is_pinned: bool) -> Tensor:
    """Host memory of exactly that size, page-locked in place where asked.

    PyTorch's own pinned allocator rounds up to a power of two, which can double a model's memory;
    registering an ordinary mapping does not. The page lock ends with the memory.

    Returns:
        [num_rows, row_bytes] uint8, zeros.

    Raises:
        RuntimeError: If CUDA refuses to pin it.
    """
    memory, rows = map_host(num_rows, row_bytes)
    if is_pinned:
        try:
            lock(memory, rows.data_ptr(), rows.nbytes)
        except PinningRefused as refusal:
            raise RuntimeError(
                f"CUDA could not pin {rows.nbytes / 2**30:.1f} GiB of host memory ({refusal}); "
                "free memory or raise the container's locked-memory limit."
            ) from refusal
    return rows


def map_host(num_rows: int, row_bytes: int) -> tuple[mmap.mmap, Tensor]:
    """A mapping, and the rows that lie in it, [num_rows, row_bytes] uint8, zeros."""
    num_bytes = num_rows * row_bytes
    if hasattr(mmap, "MAP_PRIVATE"):
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows: the page file's memory, which is this process's own
        memory = mmap.mmap(-1, num_bytes)
    return memory, torch.frombuffer(memory, dtype=torch.uint8).view(num_rows, row_bytes)


class HostExpertStore:
    """The experts of all MoE layers, in host memory, out of the model's reach."""

    def __init__(
        self,
        all_experts: list[nn.Module],
        *,
        is_pinned: bool,
        encoder: Encoder | None = None,
        most_pinned_bytes: int | None = None,
    ) -> None:
        """Allocate the rows, to be filled.

        Args:
            all_experts: The experts modules of a model.
            is_pinned: Page-lock the memory, so that a CUDA device can copy from it unattended.
            encoder: How to store matrices; as they are if None.
            most_pinned_bytes: To lock of it; as much as the system allows if None.
        """
        self.layouts: list[RowLayout] = []
        self.rows: list[Tensor] = []
        """Per MoE layer, [E, row_bytes] uint8."""
        memories: list[mmap.mmap] = []
        for experts in all_experts:
            layout = RowLayout.of(experts, encoder)
            num_experts = next(iter(parameter_shapes(experts).values())).shape[0]
            self.layouts.append(layout)
            memory, rows = map_host(num_experts, layout.row_bytes)
            self.rows.append(rows)
            memories.append(memory)
        self.pins = Pins(memories, list(self.rows))
        """Which rows are page-locked."""
        if is_pinned:
            self.pins.pin_all(most_pinned_bytes)

    def parted(self, count: int) -> tuple[HostExpertStore, HostExpertStore]:
        """The first modules of the store, and the others; both share its memory."""
        first, others = (HostExpertStore([], is_pinned=False) for _ in range(2))
        first.layouts, others.layouts = self.layouts[:count], self.layouts[count:]
        first.rows, others.rows = self.rows[:count], self.rows[count:]
        first.pins, others.pins = self.pins.part(0, count), self.pins.part(count, len(self.rows))
        return first, others

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return sum(rows.nbytes for rows in self.rows)

    @property
    def is_exact(self) -> bool:
        """Whether every number of the experts comes back bit for bit."""
        return all(layout.is_exact for layout in self.layouts)

    def close(self) -> None:
        """Let the experts' memory go; the store cannot be used afterwards."""
        self.rows.clear()
        self.pins = Pins()
