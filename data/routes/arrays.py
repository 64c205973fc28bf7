"""Reads routed_experts arrays as vLLM and SGLang return them: [tokens, layers, top_k]."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes.assemble import ReadOptions, route_of
from foreroute.data.routes.route import Route
from foreroute.estimators.artifacts import read_tensors, tensor_names

SUFFIXES = (".npy", ".npz", ".safetensors")
NAME = "routed_experts"
MOST_RATIO = 100
"""Bytes of an array for each byte of the archive that it is compressed in."""
FEW_BYTES = 1 << 24
"""Arrays as small as this may be compressed any better."""
Ids = NDArray[Any]


def is_array_file(path: Path) -> bool:
    """Whether the extension is that of an array."""
    return path.is_file() and path.suffix in SUFFIXES


def read_arrays(path: Path, options: ReadOptions) -> Route:
    """Read the array; of several in one file the one called routed_experts.

    Raises:
        ValueError: If the file is damaged, or it is not clear which array is meant.
    """
    try:
        return route_of(path, _READ[path.suffix](path), options)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an array: {str(error)[:200]}") from error


UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    TypeError,
    KeyError,
    OverflowError,
    RecursionError,
    MemoryError,  # of a header's nesting: sizes are checked before anything is read
    NotImplementedError,
    RuntimeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read_npy(path: Path) -> Ids:
    with path.open("rb") as file:
        return _read_array(file, path.stat().st_size, path)


def _read_npz(path: Path) -> Ids:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        member = archive.getinfo(f"{_wanted(path, names)}.npy")
        if member.file_size > max(FEW_BYTES, MOST_RATIO * path.stat().st_size):
            raise ValueError(
                f"{path} is {path.stat().st_size} bytes, and claims to hold {member.file_size}."
            )
        with archive.open(member) as file:
            return _read_array(file, member.file_size, path)


def _read_safetensors(path: Path) -> Ids:
    name = _wanted(path, tensor_names(path))
    return read_tensors(path, (name,))[name].numpy()


_READ = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}


def _wanted(path: Path, names: list[str]) -> str:
    if NAME not in names and len(names) != 1:
        raise ValueError(f"{path} holds arrays {sorted(names)[:9]}; name the routing {NAME}.")
    return NAME if NAME in names else names[0]


def _read_array(file: IO[bytes], num_bytes: int, path: Path) -> Ids:
    """An array of integers, read only if the file is as long as its header says."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"{path} is of version {version}, which is not read.")
    shape, is_fortran, dtype = read_header(file)
    if dtype.kind not in "iu" or any(isinstance(size, bool) or size < 0 for size in shape):
        raise ValueError(f"{path} holds {dtype} of shape {shape}; expected integers.")
    begun, size = file.tell(), math.prod(shape) * dtype.itemsize
    if begun + size != num_bytes:
        raise ValueError(f"{path} is {num_bytes} bytes; its header says {begun + size}.")
    array = np.frombuffer(file.read(size), dtype=dtype).reshape(
        shape, order="F" if is_fortran else "C"
    )
    return array.astype(dtype.newbyteorder("="))
