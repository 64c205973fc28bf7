"""Reads amounts of memory as people type them: 24GiB, 9.44MB, 500000."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def parse_bytes(text: str | int) -> int:
    """Bytes behind `24GiB`, `9.44MB` or a plain number.

    Raises:
        ValueError: If it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(found[2].lower()) if found else None
    try:
        amount = float(found[1]) * unit if found and unit else 0.0
    except ValueError:
        amount = 0.0
    if amount < 1:
        raise ValueError(f"{text!r} is no amount of memory; write 24GiB, 9.44MB or bytes.")
    return int(amount)


def show_bytes(amount: float) -> str:
    """For people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
