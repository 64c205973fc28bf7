"""Where the text comes from: documents of a dataset, split into train and held-out by a hash."""

from __future__ import annotations

import hashlib
import itertools
import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Split = Literal["train", "held-out"]
STDLIB = "python-stdlib"
HELD_OUT_SHARE = 0.05
PIECE_CHARACTERS = 8192  # a lone text file is cut into pieces, so that it too can be split
TEXT_COLUMNS = ("text", "content")
TABLE_FORMATS = {".jsonl": "json", ".parquet": "parquet"}
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
)
"""Tests, what is no part of the library, and pydoc's generated topics (prose in one literal)."""


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
        if not LEFT_OUT_FOLDERS.intersection(path.relative_to(root).parts)
    }
    for name in sorted(paths, key=lambda name: hashlib.sha256(name.encode()).digest()[::-1]):
        if split_of(name) == split:
            text = paths[name].read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(name, text)


def documents(dataset: str, split: Split) -> Iterator[Document]:
    """The texts of one split of a dataset, always in the same order.

    Args:
        dataset: `python-stdlib`; a file or folder of text, .jsonl or .parquet; or a Hub id, with
            its configuration after a colon if it needs one (`wikitext:wikitext-2-raw-v1`).
        split: `train` or `held-out`; documents are assigned by a hash of their names.

    Raises:
        FileNotFoundError: If it looks like a path and nothing is there.
        ValueError: If it cannot be read, has no text column, or no text in this split.
    """
    if split not in get_args(Split):
        raise ValueError(f"Unknown split {split!r}; known: {', '.join(get_args(Split))}.")
    if dataset == STDLIB:
        yield from stdlib_documents(split)
        return
    path = Path(dataset).expanduser()
    is_local = path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1
    if path.exists():
        found = _local_documents(path)
    elif is_local or path.suffix in {".txt", *TABLE_FORMATS}:
        raise FileNotFoundError(
            f"There is no dataset at {dataset}. Give {STDLIB}, a text, .jsonl or .parquet file, a "
            "folder of them, or a Hub id."
        )
    else:
        found = _hub_documents(dataset)
    num_seen = num_chosen = 0
    for document in found:
        if document.text.strip():
            num_seen += 1
            if split_of(document.name) == split:
                num_chosen += 1
                yield document
    if not num_chosen:
        raise ValueError(
            f"Dataset {dataset} has no text in its {split} split ({num_seen} documents in all)."
        )


def windows(read: Callable[[], Iterable[Document]], num_characters: int) -> Iterator[Document]:
    """Documents in pieces, one piece of every document before a second piece of any.

    So long documents do not crowd out the others, and any first part is a sample of many.

    Args:
        read: Gives the documents from the start; called once more for each round.
        num_characters: Greatest length of a piece.
    """
    for round_idx in itertools.count():
        is_exhausted = True
        for name, text in read():
            num_pieces = math.ceil(len(text) / num_characters)
            if round_idx < num_pieces:
                is_exhausted = False
                first = int.from_bytes(hashlib.sha256(name.encode()).digest()[-4:])
                start = (first + round_idx) % num_pieces * num_characters
                yield Document(name, text[start : start + num_characters])
        if is_exhausted:
            return


def token_sequences(
    documents: Iterable[Document], tokenizer: Any, sequence_length: int, num_tokens: int
) -> Iterator[list[int]]:
    """Pack documents, an end-of-text token after each, into sequences of one length.

    Where the tokenizer begins its texts with a token, each sequence begins with it. What does not
    fill a sequence is dropped.

    Args:
        documents: Texts, in order.
        tokenizer: A transformers tokenizer.
        sequence_length: Tokens per sequence.
        num_tokens: Stop once this many have been given; fewer come if the documents end.

    Raises:
        ValueError: If the documents do not fill one sequence; says how many tokens they had.
    """
    begin = tokenizer("")["input_ids"]
    prefix = begin[:1] if begin and begin[0] == tokenizer.bos_token_id else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = sequence_length - len(prefix)
    pending: list[int] = []
    num_given = 0
    for document in documents:
        encoded = tokenizer(document.text, add_special_tokens=False, verbose=False)
        pending += [*encoded["input_ids"], *end]
        num_whole = len(pending) // room
        for start in range(0, num_whole * room, room):
            if num_given >= num_tokens:
                return
            yield prefix + pending[start : start + room]
            num_given += sequence_length
        pending = pending[num_whole * room :]
    if not num_given:
        raise ValueError(
            f"The dataset has only {len(pending)} tokens in this split; one sequence needs "
            f"{room}. Lower --sequence-length or give more text."
        )


def _local_documents(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            relative = file.relative_to(path)
            if not any(part.startswith(".") for part in relative.parts):
                yield from _file_documents(file, relative.as_posix())
    elif path.suffix in TABLE_FORMATS:
        yield from _table_documents(path, path.name)
    else:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, piece in enumerate(_pieces(lines)):
            yield Document(f"{path.name}:{number}", piece)


def _file_documents(file: Path, name: str) -> Iterator[Document]:
    if file.suffix in TABLE_FORMATS:
        yield from _table_documents(file, name)
        return
    content = file.read_bytes()
    if b"\0" not in content:  # pictures and the like among the texts
        yield Document(name, content.decode("utf-8", errors="replace"))


def _pieces(lines: list[str]) -> Iterator[str]:
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


def _table_documents(file: Path, name: str) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(
            TABLE_FORMATS[file.suffix], data_files=str(file), split="train", streaming=True
        )
        yield from _row_documents(rows, name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"Dataset {file} cannot be read: {_first_line(error)}") from error


def _hub_documents(dataset: str) -> Iterator[Document]:
    import datasets

    path, _, configuration = dataset.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None, streaming=True)
        rows = splits["train"] if "train" in splits else next(iter(splits.values()))
        yield from _row_documents(rows, path)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"Dataset {dataset} is no local file or folder and cannot be read from the Hub: "
            f"{_first_line(error)}"
        ) from error


def _row_documents(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Document]:
    column = ""
    for number, row in enumerate(rows):
        column = column or _text_column(row)
        yield Document(f"{name}:{number}", row[column] or "")


def _text_column(row: dict[str, Any]) -> str:
    strings = [column for column, value in row.items() if isinstance(value, str)]
    named = [column for column in TEXT_COLUMNS if column in strings]
    if not named and len(strings) != 1:
        raise ValueError(
            f"no column is named {' or '.join(TEXT_COLUMNS)}, and not exactly one holds text; "
            f"its columns are {', '.join(row)}."
        )
    return (named or strings)[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
