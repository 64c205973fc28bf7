"""Texts in files: folders and zip archives of them, single files in pieces, compressed or not."""

from __future__ import annotations

import codecs
import functools
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from foreroute.data.columns import RowReading
from foreroute.data.document import Document, NoTextError, TokenRow
from foreroute.data.tables import (
    BUILDERS,
    LOOSE_ENDINGS,
    WIDE_MARKS,
    is_saved_dataset,
    saved_documents,
    table_documents,
)

logger = logging.getLogger(__name__)

PIECE_CHARACTERS = 8192  # a lone text file is cut into pieces, so that it too can be split
LINE_CHARACTERS = 1 << 20  # a longer line is read in parts: it may be no text at all
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
"""Endings of compressed files, and what fsspec calls the compression."""
PDF_MARK = "%PDF-"
NUM_NAMED = 5  # files that a message names

Contents = Iterator[Document | TokenRow]


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset, on the disk or in a zip archive."""

    name: str
    """Its path below the dataset's root."""
    url: str
    """The file, as fsspec and `datasets` open it."""

    @property
    def ending(self) -> str:
        """The last part of its name, in small letters, less that of a compression."""
        path = PurePosixPath(self.name.lower())
        return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Its bytes, decompressed, while the context lasts."""
        import fsspec

        compression = COMPRESSED.get(PurePosixPath(self.name.lower()).suffix)
        opened: AbstractContextManager[BinaryIO]
        opened = fsspec.open(self.url, "rb", compression=compression)
        return opened


def local_documents(path: Path, reading: RowReading) -> Contents:
    """What a folder, an archive or a file holds, in the order of names.

    Args:
        path: Exists.
        reading: How rows of tables are read.

    Raises:
        NoTextError: If it holds no text; names what it is.
        ValueError: If a file cannot be read; names it.
    """
    if path.is_dir():
        yield from _folder_documents(path, reading)
    elif not path.is_file():
        raise NoTextError(f"{path} is neither a file nor a folder.")
    elif path.suffix.lower() == ".zip":
        yield from _zip_documents(path, "", reading)
    else:
        file = DataFile(path.name, str(path))
        if file.ending in BUILDERS:
            yield from table_documents(file.url, file.ending, file.name, reading)
        else:
            for number, piece in enumerate(_pieces(_lines(file))):
                yield Document(f"{path.name}:{number}", piece)


def _folder_documents(folder: Path, reading: RowReading) -> Contents:
    if is_saved_dataset(folder):
        yield from saved_documents(folder, folder.name, reading)
        return
    parts: dict[str, Callable[[], Contents]] = {}
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            parts[name] = functools.partial(saved_documents, path, name, reading)
        elif path.suffix.lower() == ".zip":
            parts[name] = functools.partial(_zip_documents, path, f"{name}/", reading)
        else:
            parts[name] = functools.partial(_file_documents, DataFile(name, str(path)), reading)
    yield from _many_documents(str(folder), parts)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, and folders of `save_to_disk`; links are followed, each folder once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        if here != folder and is_saved_dataset(here):
            folders.clear()
            yield here
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and (here / name).is_file():
                yield here / name


def _zip_documents(path: Path, prefix: str, reading: RowReading) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if info.filename]
            names = sorted(info.filename for info in infos if not info.is_dir())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise NoTextError(f"{path} cannot be read as a zip archive: {error}.") from error
    parts: dict[str, Callable[[], Contents]] = {}
    for name in names:
        if not any(part.startswith(".") for part in PurePosixPath(name).parts):
            file = DataFile(f"{prefix}{name}", f"zip://{name}::{path}")
            parts[file.name] = functools.partial(_file_documents, file, reading)
    yield from _many_documents(str(path), parts)


def _many_documents(label: str, parts: dict[str, Callable[[], Contents]]) -> Contents:
    """What several files hold; those without text are left out, and named."""
    left_out: list[str] = []
    for name, read in parts.items():
        try:
            yield from read()
        except NoTextError as error:
            left_out.append(f"{name} ({error})")
    if left_out and len(left_out) == len(parts):
        raise NoTextError(f"Dataset {label} holds no text: {_some(left_out)}")
    if left_out:
        _say(f"Left out {len(left_out)} of {len(parts)} files of {label}: {_some(left_out)}")


def _file_documents(file: DataFile, reading: RowReading) -> Contents:
    """What one file among many holds: a table's rows, or one text."""
    if file.ending not in BUILDERS:
        yield Document(file.name, "".join(_lines(file)))
        return
    num_given = 0
    try:
        for document in table_documents(file.url, file.ending, file.name, reading):
            num_given += 1
            yield document
    except ValueError as error:
        if file.ending in LOOSE_ENDINGS and not num_given:
            raise NoTextError(str(error)) from error
        raise


def _lines(file: DataFile) -> Iterator[str]:
    """The lines of a text file, ends included, decoded by its mark, else as UTF-8.

    Raises:
        NoTextError: If it is no text, or in another encoding; names the file.
    """
    try:
        with file.open() as opened:
            encoding = _encoding(opened.read(4))
            opened.seek(0)
            text = io.TextIOWrapper(opened, encoding, newline="")
            is_first = True
            while line := text.readline(LINE_CHARACTERS):
                if "\0" in line or (is_first and line.startswith(PDF_MARK)):
                    raise NoTextError(f"{file.url} is no text.")
                is_first = False
                yield line
    except UnicodeDecodeError as error:
        raise NoTextError(
            f"{file.url} is no UTF-8 text (byte 0x{error.object[error.start]:02x}). If it is text "
            "in another encoding, convert it: iconv -f LATIN1 -t UTF-8"
        ) from error
    except (NoTextError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # every compression has exceptions of its own
        raise ValueError(f"{file.url} cannot be read: {error}") from error


def _encoding(head: bytes) -> str:
    wide = next((name for mark, name in WIDE_MARKS.items() if head.startswith(mark)), None)
    return wide or ("utf-8-sig" if head.startswith(codecs.BOM_UTF8) else "utf-8")


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return "; ".join(names[:NUM_NAMED]) + more


@functools.cache
def _say(message: str) -> None:
    """Log a line once, as datasets are read in several rounds."""
    logger.info(message)
