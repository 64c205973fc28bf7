"""Looks through JSON for what ends the process in pyarrow's reader, which is written in C++."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

import numpy as np

MOST_DEPTH = 256
READ_BYTES = 1 << 24
BLANK = codecs.BOM_UTF8 + b" \t\r\n"
ALL_OTHERS = bytes(set(range(256)) - set(b'"[]{}'))
STEPS = np.zeros(256, np.int8)
STEPS[[*b"[{"]], STEPS[[*b"]}"]] = 1, -1
NULL_AT_THE_END = re.compile(rb"(?:null|NaN|Infinity)[ \t\r]*(?:\n|$)")
NULL_ENTRY = re.compile(rb"[\[,]\s*(?:null|NaN|-?Infinity)")


def require_sound(open_file: Callable[[], AbstractContextManager[BinaryIO]]) -> None:
    """Refuse JSON that is nested too deeply, or has null (or NaN, which becomes it) for a row.

    Args:
        open_file: Gives the file from its beginning, decompressed if it is compressed.

    Raises:
        ValueError: If it is refused.
    """
    with open_file() as file:
        may_hold_null = _look_through(file)
    if may_hold_null:
        with open_file() as file:
            if any(entry is None or isinstance(entry, float) for entry in json.loads(file.read())):
                raise ValueError("an entry of it is null, which is no row.")


def _look_through(file: BinaryIO) -> bool:
    """Whether it is an array that may have null for an entry, or in one."""
    depth = Depth()
    is_array = is_lines = may_hold_null = False
    for number, part in enumerate(_parts(file)):
        depth.follow(part)
        if number == 0:
            start = part.lstrip(BLANK)
            is_array = start.startswith(b"[")
            is_lines = not is_array and _is_json(start.partition(b"\n")[0])
        if is_lines and any(map(_is_first, NULL_AT_THE_END.finditer(part))):
            raise ValueError("a line of it is null, which is no row.")
        may_hold_null |= is_array and NULL_ENTRY.search(part) is not None
    return may_hold_null


class Depth:
    """How deep the place is that has been read so far."""

    def __init__(self) -> None:
        """Begin outside of everything."""
        self._depth, self._is_in_text = 0, 0

    def follow(self, part: bytes) -> None:
        """Go on through the next part, which ends in no backslash.

        Raises:
            ValueError: If anything lies deeper than `MOST_DEPTH`.
        """
        unescaped = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = np.frombuffer(unescaped.translate(None, ALL_OTHERS), np.uint8)
        if not len(marks):
            return
        quotes = np.cumsum(marks == ord('"'), dtype=np.uint8)  # odd within a text
        is_in_text = (quotes & 1) ^ self._is_in_text
        depths = self._depth + np.cumsum(STEPS[marks] * (1 - is_in_text), dtype=np.int32)
        if depths.max() > MOST_DEPTH:
            raise ValueError("it is nested too deeply.")
        self._depth, self._is_in_text = int(depths[-1]), int(is_in_text[-1])


def _parts(file: BinaryIO) -> Iterator[bytes]:
    """A file in parts, each cut after a line where one ends in it, and never behind a backslash."""
    left = b""
    while read := file.read(READ_BYTES):
        whole, end, rest = (left + read).rpartition(b"\n")
        if not end and len(rest) < 2 * READ_BYTES:
            left = rest
            continue
        if not end:
            whole, rest = rest.rstrip(b"\\"), rest[len(rest.rstrip(b"\\")) :]
        left = rest
        yield whole + end
    yield left


def _is_first(found: re.Match[bytes]) -> bool:
    """Whether nothing stands before it in its line."""
    line = found.string.rfind(b"\n", 0, found.start()) + 1
    return not found.string[line : found.start()].strip(BLANK + b"-")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
