"""Amounts of bytes as people write them (24GiB, 9.44MB, 500000) and as they read them."""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str | int) -> int:
    """Bytes behind `24GiB`, `9.44MB`, `500M` or a plain number.

    Raises:
        ValueError: If it is none of these, or not positive.

    Example:
        >>> parse_bytes("500MB"), parse_bytes("2GiB")
        (500000000, 2147483648)
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?I?)B?", str(text).strip().upper())
    units = UNITS | BINARY_UNITS
    try:
        size = int(float(match[1]) * units[match[2]]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; write 24GiB, 9.44MB or a number of bytes.")
    return size


def format_bytes(size: float) -> str:
    """A size for people, three digits: `1.27 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_binary_bytes(size: float) -> str:
    """A size for people in the units of memory: `24.0 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
