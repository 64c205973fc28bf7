"""Where the text comes from: documents of a dataset, split into train and held-out by a hash."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from foreroute.data.columns import RowReading
from foreroute.data.document import Document, TokenRow
from foreroute.data.tables import BUILDERS, hub_documents
from foreroute.data.text_files import COMPRESSED, local_documents

Split = Literal["train", "held-out"]
STDLIB = "python-stdlib"
HELD_OUT_SHARE = 0.05
CHARACTERS_PER_TOKEN = 4  # of usual text, so that a piece of a document is about one sequence
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
)
"""Tests, what is no part of the library, and pydoc's generated topics (prose in one literal)."""


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
        dataset: As `contents` takes it.
        split: `train` or `held-out`; documents are assigned by a hash of their names.

    Raises:
        FileNotFoundError: If it looks like a path and nothing is there.
        ValueError: If it cannot be read, holds chats or token ids, or has no text in this split.
    """
    for document in contents(dataset, split, RowReading()):
        assert isinstance(document, Document)  # a reading without a tokenizer gives nothing else
        yield document


def contents(dataset: str, split: Split, reading: RowReading) -> Iterator[Document | TokenRow]:
    """The texts of one split of a dataset, or its rows of token ids, always in the same order.

    Args:
        dataset: `python-stdlib`; a file, a zip archive or a folder of text or of tables (JSON, CSV,
            Parquet, Arrow, what `Dataset.save_to_disk` wrote; compressed or not); or a Hub id, with
            its configuration after a colon if it needs one (`wikitext:wikitext-2-raw-v1`).
        split: `train` or `held-out`; documents are assigned by a hash of their names.
        reading: How rows of tables are read.

    Raises:
        FileNotFoundError: If it looks like a path and nothing is there.
        ValueError: If it cannot be read, is no text, or has nothing in this split.
    """
    if split not in get_args(Split):
        raise ValueError(f"Unknown split {split!r}; known: {', '.join(get_args(Split))}.")
    if dataset == STDLIB:
        yield from _without_prompts(stdlib_documents(split), dataset, reading)
        return
    num_seen = num_chosen = 0
    for document in _without_prompts(_found(dataset, reading), dataset, reading):
        if document.token_ids if isinstance(document, TokenRow) else document.text.strip():
            num_seen += 1
            if split_of(document.name) == split:
                num_chosen += 1
                yield document
    if not num_chosen:
        raise ValueError(
            f"Dataset {dataset} has no text in its {split} split ({num_seen} documents in all)."
        )


def _without_prompts(
    found: Iterable[Document | TokenRow], dataset: str, reading: RowReading
) -> Iterator[Document | TokenRow]:
    """The same documents; texts are refused where the user says that prompts end in them."""
    for document in found:
        if reading.prompt_tokens and isinstance(document, Document) and document.text:
            raise ValueError(
                f"Dataset {dataset} holds text ({document.name}); --prompt-tokens is for token ids."
            )
        yield document


def _found(dataset: str, reading: RowReading) -> Iterator[Document | TokenRow]:
    if not dataset:
        raise ValueError(f"The dataset has no name; give {STDLIB}, a file, a folder or a Hub id.")
    path = Path(os.path.expanduser(dataset))  # noqa: PTH111  Path's own fails for unknown users
    is_local = path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1
    if path.exists():
        return local_documents(path, reading)
    if is_local or path.suffix.lower() in {".txt", ".zip", *BUILDERS, *COMPRESSED}:
        raise FileNotFoundError(
            f"There is no dataset at {dataset}. Give {STDLIB}, a file of text, JSON, CSV, Parquet "
            "or Arrow, a folder of them, or a Hub id."
        )
    return hub_documents(dataset, reading)


def windows(
    read: Callable[[], Iterable[Document | TokenRow]], sequence_length: int
) -> Iterator[Document | TokenRow]:
    """Documents in pieces, one piece of every document before a second piece of any.

    So long documents do not crowd out the others, and any first part is a sample of many. Rows that
    say where their prompt ends are not cut.

    Args:
        read: Gives the documents from the start; called once more for each round.
        sequence_length: Tokens that a piece has at most, about: text is cut by characters.
    """
    for round_idx in itertools.count():
        is_exhausted = True
        for document in read():
            piece = _window(document, round_idx, sequence_length)
            if piece is not None:
                is_exhausted = False
                yield piece
        if is_exhausted:
            return


def _window(
    document: Document | TokenRow, round_idx: int, sequence_length: int
) -> Document | TokenRow | None:
    """The piece of a document that comes in one round, or None if it has no more."""
    if isinstance(document, TokenRow):
        if document.num_prompt_tokens is not None:
            return document if round_idx == 0 else None
        part = _part(document.name, len(document.token_ids), round_idx, sequence_length)
        return part and document._replace(token_ids=document.token_ids[part])
    num_characters = CHARACTERS_PER_TOKEN * sequence_length
    part = _part(document.name, len(document.text), round_idx, num_characters)
    return part and Document(document.name, document.text[part])


def _part(name: str, length: int, round_idx: int, size: int) -> slice | None:
    num_pieces = math.ceil(length / size)
    if round_idx >= num_pieces:
        return None
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[-4:])
    start = (first + round_idx) % num_pieces * size
    return slice(start, start + size)
