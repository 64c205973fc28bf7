"""What a way to store an expert's matrix has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one stored tensor of one expert."""


@dataclass(frozen=True)
class Encoding(ABC):
    """Stores matrices of one shape; rows are output channels, columns the inputs."""

    rows: int
    columns: int
    is_native: ClassVar[bool] = False
    """Whether checkpoints hold the parts themselves, under the parameter's name and suffix."""

    @property
    def grain(self) -> tuple[int, int]:
        """Rows and columns of the smallest block that is stored by itself.

        Raises:
            ValueError: If the shape cannot be stored so.
        """
        return 1, 1

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """What is stored for one matrix, by the suffix that is added to the parameter's name."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrices, [n, rows, columns], from parts of [n, ...] each.

        Returns:
            float32, or what they were encoded from if that is narrower.
        """

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether every number of a matrix in that dtype comes back bit for bit."""
        return self.is_native

    def pays(self, dtype: torch.dtype) -> bool:
        """Whether matrices in that dtype are worth storing so; if not, they stay as they are."""
        return True

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        """What to store for matrices, [..., rows, columns] in any float dtype.

        Raises:
            ValueError: If the encoding only exists in checkpoints.
        """
        raise ValueError(f"{type(self).__name__} is read from checkpoints only.")

    def encode_into(self, matrices: Tensor, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Encode matrices on a CPU to where they will lie.

        Args:
            matrices: [n, rows, columns] in any float dtype.
            parts: By suffix, room for each matrix's part; written.

        Raises:
            ValueError: As `encode`.
        """
        for suffix, encoded in self.encode(matrices).items():
            for room, part in zip(parts[suffix], encoded, strict=True):
                room.copy_(part)


Encoder = Callable[[str, int, int], Encoding]
"""(parameter, rows, columns) -> how its matrices are stored."""
