"""How many bytes traces take, before they are recorded, and whether there is room."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from foreroute.estimators.types import MoEGeometry

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
DEFAULT_SHARD_TOKENS = 16384
DEFAULT_SHARD_BYTES = 2**30
FILE_BYTES = 1024
"""What a safetensors file holds besides its tensors, at most."""


def parse_bytes(text: str) -> int:
    """Read a size as people write it.

    Raises:
        ValueError: If it is no positive size.

    Example:
        >>> parse_bytes("500MB"), parse_bytes("2GiB")
        (500000000, 2147483648)
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?I?)B?", text.strip().upper())
    units = UNITS | BINARY_UNITS
    try:
        size = int(float(match[1]) * units[match[2]]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; write 500MB or 2GiB.")
    return size


def format_bytes(size: float) -> str:
    """A size for people, three digits: `1.27 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def bytes_per_token(geometry: MoEGeometry, states_dtype: torch.dtype) -> int:
    """Bytes that one token takes in the traces, all layers together."""
    states = 2 * geometry.hidden_size * states_dtype.itemsize
    routing = 4 * geometry.num_experts + (4 + 2) * geometry.top_k
    return geometry.num_layers * (states + routing) + 8 + 1


def shard_bytes(
    geometry: MoEGeometry, states_dtype: torch.dtype, num_sequences: int, sequence_length: int
) -> int:
    """Bytes that a shard takes at most, headers and expert sums included."""
    sums = geometry.num_experts * (4 * geometry.hidden_size + 8)
    fixed = geometry.num_layers * (sums + FILE_BYTES) + FILE_BYTES + 8 * (num_sequences + 1)
    num_tokens = num_sequences * sequence_length
    return fixed + num_tokens * bytes_per_token(geometry, states_dtype)


def default_shard_tokens(geometry: MoEGeometry, states_dtype: torch.dtype) -> int:
    """Tokens per shard that keep a shard, which is held in memory, under 1 GiB."""
    fitting = DEFAULT_SHARD_BYTES // bytes_per_token(geometry, states_dtype)
    return min(DEFAULT_SHARD_TOKENS, fitting)


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder lies or will lie."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
