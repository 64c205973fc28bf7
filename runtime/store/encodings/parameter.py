"""A parameter of an experts module that is stored another way than the module has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.runtime.store.encodings.encoding import Encoding


@dataclass(frozen=True)
class EncodedParameter:
    """A parameter of an experts module that is stored in another way than the module has it."""

    encoding: Encoding
    shape: tuple[int, ...]
    """For one expert, as the module has it."""
    dtype: torch.dtype
    """What it is decoded to."""
    is_transposed: bool
    """Whether the module has inputs as rows."""

    @property
    def is_exact(self) -> bool:
        """Whether every number of the parameter comes back bit for bit."""
        return self.encoding.keeps(self.dtype)

    def encode(self, weights: Tensor) -> dict[str, Tensor]:
        """What to store for experts' weights, [..., *shape]."""
        return self.encoding.encode(weights.mT if self.is_transposed else weights)

    def encode_into(self, weights: Tensor, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Encode experts' weights, [n, *shape] on a CPU, to where they will lie."""
        self.encoding.encode_into(weights.mT if self.is_transposed else weights, parts)

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
