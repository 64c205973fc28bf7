"""Sizes as people write and read them, and the room on the disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


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


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder lies or will lie."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
