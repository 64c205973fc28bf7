"""A safetensors file that is filled row by row, so that a shard never lies in memory whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foreroute.data.layout import Layout
from foreroute.estimators.artifacts import partial_name, sha256_of

DTYPE_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class ShardFile:
    """Has its final size from the start and its final name only once it is full."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Create the file.

        Args:
            path: Its final name; the folder is made.
            layout: The tensors it will hold.
        """
        self._path = path
        self._partial = path.with_name(partial_name(path.name))
        self._layout = layout
        self._left = {name: stored.num_bytes for name, stored in layout.items()}
        ends = dict(zip(layout, itertools.accumulate(self._left.values()), strict=True))
        header = {
            name: {
                "dtype": DTYPE_CODES[stored.dtype],
                "shape": stored.shape,
                "data_offsets": (ends[name] - stored.num_bytes, ends[name]),
            }
            for name, stored in layout.items()
        }
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        self._ends = {name: end + 8 + len(described) for name, end in ends.items()}
        path.parent.mkdir(exist_ok=True)
        self._file = self._partial.open("xb")
        self._file.write(len(described).to_bytes(8, "little") + described)

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next rows of some of the tensors.

        Args:
            tensors: By name, on any device; converted to the dtype of the layout.
        """
        for name, tensor in tensors.items():
            rows = tensor.to("cpu", self._layout[name].dtype).contiguous()
            self._file.seek(self._ends[name] - self._left[name])
            self._left[name] -= rows.nbytes
            self._file.write(rows.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def close(self) -> str:
        """Give the file its final name.

        Returns:
            Hex sha256 of its bytes.

        Raises:
            RuntimeError: If rows are missing or too many.
        """
        self._file.close()
        if any(self._left.values()):
            raise RuntimeError(f"{self._path} lacks bytes, or has too many: {self._left}.")
        digest = sha256_of(self._partial)
        self._partial.replace(self._path)
        return digest
