"""Holds every expert's weights in host memory, each expert's parameters contiguous in one row.

One copy then moves one expert. A slot on the device has the same layout as a row on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.data.adapters.weightless import parameter_shapes

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
    row_bytes: int

    @classmethod
    def of(cls, experts: nn.Module) -> RowLayout:
        """Layout for an experts module whose parameters are, or would be, [E, ...]."""
        parameters: dict[str, ParameterSpec] = {}
        offset = 0
        for name, (shape, dtype) in parameter_shapes(experts).items():
            spec = ParameterSpec(shape[1:], dtype, offset)
            parameters[name] = spec
            offset += math.ceil(spec.num_bytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(parameters, offset)

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


def allocate_host(num_rows: int, row_bytes: int, *, is_pinned: bool) -> Tensor:
    """Host memory of exactly that size, page-locked in place where asked.

    PyTorch's own pinned allocator rounds up to a power of two, which can double a model's memory;
    registering an ordinary allocation does not.

    Returns:
        [num_rows, row_bytes] uint8, uninitialised.

    Raises:
        RuntimeError: If CUDA refuses to pin it.
    """
    rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8)
    if is_pinned:
        status = torch.cuda.cudart().cudaHostRegister(rows.data_ptr(), rows.nbytes, 0)
        if int(status) != 0:
            raise RuntimeError(
                f"CUDA could not pin {rows.nbytes / 2**30:.1f} GiB of host memory ({status}); "
                "free memory or raise the container's locked-memory limit."
            )
    return rows


class HostExpertStore:
    """The experts of all MoE layers, in host memory, out of the model's reach."""

    def __init__(self, all_experts: list[nn.Module], *, is_pinned: bool) -> None:
        """Allocate the rows, and move the weights there from modules that have any.

        Args:
            all_experts: The experts modules of a model, on the CPU; their parameters are removed,
                one layer at a time. Of modules built without weights the rows stay to be filled.
            is_pinned: Page-lock the memory, so that a CUDA device can copy from it unattended.
        """
        self.is_pinned = is_pinned
        self.layouts: list[RowLayout] = []
        self.rows: list[Tensor] = []
        """Per MoE layer, [E, row_bytes] uint8."""
        for experts in all_experts:
            layout = RowLayout.of(experts)
            num_experts = next(iter(parameter_shapes(experts).values())).shape[0]
            rows = allocate_host(num_experts, layout.row_bytes, is_pinned=is_pinned)
            views = layout.views(rows)
            for name in list(experts._parameters):
                views[name].copy_(experts.get_parameter(name).detach())
                del experts._parameters[name]
            self.layouts.append(layout)
            self.rows.append(rows)

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return sum(rows.nbytes for rows in self.rows)

    def close(self) -> None:
        """Give the page locks back; the store cannot be used afterwards."""
        for rows in self.rows if self.is_pinned else ():
            torch.cuda.cudart().cudaHostUnregister(rows.data_ptr())
        self.rows.clear()
