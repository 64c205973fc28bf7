"""Rows of tables: files, folders of `Dataset.save_to_disk` and the Hub, all read by `datasets`."""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from foreroute.data.columns import Row, RowReading, row_documents
from foreroute.data.document import Document, NoTextError, TokenRow
from foreroute.data.sound_json import require_sound
from foreroute.estimators.artifacts import first_line

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".geoparquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
    ".h5": ("hdf5", {}),
    ".hdf5": ("hdf5", {}),
}
"""What reads a table: a builder of `datasets` and its options, by a file's ending."""
LOOSE_ENDINGS = frozenset({".json", ".csv", ".tsv"})
"""Endings that in a folder may also be settings, or code's own files, and no data at all."""
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the mark at their beginning; the longer marks come first, as they begin alike."""
SAVED_DATASET = ("dataset_info.json", "state.json")
SAVED_SPLITS = "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk`, or that of a DatasetDict, wrote this folder."""
    return (folder / SAVED_SPLITS).is_file() or all((folder / n).is_file() for n in SAVED_DATASET)


def table_documents(
    url: str, ending: str, name: str, reading: RowReading
) -> Iterator[Document | TokenRow]:
    """What the rows of one file give.

    Args:
        url: The file, as `datasets` opens it: a path, perhaps in an archive.
        ending: A key of `BUILDERS`.
        name: Of the file within its dataset.
        reading: Which column, and how.

    Raises:
        NoTextError: If it has no column that can be taken.
        ValueError: If it cannot be read; names the file.
    """
    builder, options = BUILDERS[ending]
    with _in_utf8(url) as readable:
        if builder == "json":
            with _named(f"Dataset {url} cannot be read"):
                require_sound(functools.partial(_open, readable))

        def load() -> Any:
            import datasets

            return datasets.load_dataset(
                builder, data_files=glob.escape(readable), split="train", streaming=True, **options
            )

        yield from _documents(load, name, reading, url)


def saved_documents(folder: Path, name: str, reading: RowReading) -> Iterator[Document | TokenRow]:
    """What the rows of a folder of `save_to_disk` give; of several splits, train or the first.

    Raises:
        NoTextError: If it has no column that can be taken.
        ValueError: If it cannot be read; names the folder.
    """

    def load() -> Any:
        import datasets

        saved = datasets.load_from_disk(str(folder))
        return _train_of(saved) if isinstance(saved, datasets.DatasetDict) else saved

    yield from _documents(load, name, reading, str(folder))


def hub_documents(dataset: str, reading: RowReading) -> Iterator[Document | TokenRow]:
    """What the rows of a dataset of the Hub give: of its train split, or of its first.

    Raises:
        NoTextError: If it has no column that can be taken.
        ValueError: If it cannot be read.
    """
    path, _, configuration = dataset.partition(":")

    def load() -> Any:
        import datasets

        return _train_of(datasets.load_dataset(path, configuration or None, streaming=True))

    problem = "is no local file or folder and cannot be read from the Hub"
    yield from _documents(load, path, reading, dataset, problem)


def _train_of(splits: Mapping[str, Any]) -> Any:
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _documents(
    load: Callable[[], Any],
    name: str,
    reading: RowReading,
    dataset: str,
    problem: str = "cannot be read",
) -> Iterator[Document | TokenRow]:
    import datasets

    problem = f"Dataset {dataset} {problem}"

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it would log is raised as well
    datasets.disable_progress_bars()
    with _named(problem):
        try:
            rows = load()
        except StopIteration:  # how the JSON builder says that a file is empty
            return
    features = getattr(rows, "features", None)
    try:
        yield from row_documents(_read(rows, problem), name, reading, features)
    except NoTextError as error:
        raise NoTextError(f"Dataset {dataset}: {error}") from error


def _read(rows: Iterable[Row], problem: str) -> Iterator[Row]:
    """The rows, with whatever goes wrong between two of them as one line that names the table."""
    left = iter(rows)
    while True:
        with _named(problem):
            try:
                row = next(left)
            except StopIteration:
                return
        yield row


@contextlib.contextmanager
def _named(problem: str) -> Iterator[None]:
    """Whatever a reader raises (each has exceptions of its own), as a ValueError in one line."""
    try:
        yield
    except (StopIteration, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{problem}: {first_line(error)}") from error


def _open(url: str) -> AbstractContextManager[BinaryIO]:
    import fsspec

    opened: AbstractContextManager[BinaryIO] = fsspec.open(url, "rb", compression="infer")
    return opened


@contextlib.contextmanager
def _in_utf8(url: str) -> Iterator[str]:
    """The file itself, or a copy in UTF-8 of one that is marked as UTF-16 or UTF-32."""
    encoding = wide_encoding(Path(url)) if Path(url).is_file() else None
    if encoding is None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="foreroute-") as folder:
        copy = Path(folder) / Path(url).name
        with (
            _named(f"Dataset {url} cannot be read"),
            Path(url).open(encoding=encoding, newline="") as source,
            copy.open("w", encoding="utf-8", newline="") as target,
        ):
            shutil.copyfileobj(source, target)
        yield str(copy)


def wide_encoding(file: Path) -> str | None:
    """`utf-16` or `utf-32` if a file begins with that mark, else None."""
    with file.open("rb") as opened:
        head = opened.read(4)
    return next((name for mark, name in WIDE_MARKS.items() if head.startswith(mark)), None)
