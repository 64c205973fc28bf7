"""Where the text comes from: documents of a dataset, split into train and held-out by a hash."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 0.05
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


class Document(NamedTuple):
    """One text of a dataset."""

    name: str
    """Names it within its dataset (a path below the root, or a row number)."""
    text: str


def split_of(name: str) -> Split:
    """Which split a document belongs to: by a hash of its name, the same on every machine."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "held-out" if fraction < HELD_OUT_SHARE else "train"


def stdlib_documents(split: Split) -> Iterator[Document]:
    """Source files of this machine's Python standard library, tests excluded, in hash order.

    Hash order mixes the packages, so that any first part of it is a fair sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not TEST_FOLDERS.intersection(path.relative_to(root).parts)
    }
    for name in sorted(paths, key=lambda name: hashlib.sha256(name.encode()).digest()[::-1]):
        if split_of(name) == split:
            text = paths[name].read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(name, text)
