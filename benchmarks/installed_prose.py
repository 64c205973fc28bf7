"""English prose that lies on any machine with Python packages: their descriptions and manuals."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

SUFFIXES = (".md", ".rst", ".txt")
NAMES = ("METADATA",)
LETTERS_SHARE = 0.8
PIECE_CHARACTERS = 8000
LEAST_CHARACTERS = 1500


def write_installed_prose(folder: Path, num_characters: int) -> int:
    """Write texts of the installed packages into a folder, one file each, in hash order.

    Args:
        folder: Made if it is not there.
        num_characters: Stop after so many.

    Returns:
        How many characters were found.
    """
    root = Path(sysconfig.get_path("purelib"))
    paths = [p for p in root.rglob("*") if p.suffix in SUFFIXES or p.name in NAMES]
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    total = 0
    for path in sorted(
        paths, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest()
    ):
        if total >= num_characters:
            break
        text = _prose_of(path)[:PIECE_CHARACTERS]
        if is_prose(text) and text[:500] not in seen:
            seen.add(text[:500])
            (folder / f"{len(seen):04}.txt").write_text(text)
            total += len(text)
    return total


def _prose_of(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text.partition("\n\n")[2] if path.name in NAMES else text  # after the headers


def is_prose(text: str) -> bool:
    """Whether a text is long enough and mostly of letters and spaces."""
    letters = sum(c.isalpha() or c in " ,.\n" for c in text)
    return (
        len(text) >= LEAST_CHARACTERS and letters / len(text) >= LETTERS_SHARE and " the " in text
    )
