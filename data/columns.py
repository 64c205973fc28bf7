"""Which column of a table holds its texts, chats or token ids, and what a row of it gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from foreroute.data.adapters.chat import encode_chat, turns_of
from foreroute.data.document import Document, NoTextError, TokenRow
from foreroute.estimators.artifacts import MOST_SAID

Row = Mapping[str, Any]
ColumnKind = Literal["text", "chat", "token ids", "plain", "nothing", "other"]
"""`plain` is a number, a date or the like; `nothing` holds no value in the rows that were seen."""

NUM_ROWS_SEEN = 1000
"""Rows that are looked at before a column is chosen: the first ones may lack what others have."""
NAMED: tuple[tuple[str, ColumnKind], ...] = (
    ("input_ids", "token ids"),
    ("token_ids", "token ids"),
    ("text", "text"),
    ("messages", "chat"),
    ("conversations", "chat"),
    ("conversation", "chat"),
    ("content", "text"),
    ("txt", "text"),
)
"""Columns that are taken by their names, the first that a table has."""
NOT_TEXT = frozenset(
    {"id", "uuid", "guid", "url", "uri", "path", "file", "filename", "source", "split", "lang"}
    | {"language", "license", "hash", "date", "time", "timestamp", "__key__", "__url__"}
)
"""Names of strings that nobody means as text, though a table may have no other string."""


@dataclass(frozen=True, kw_only=True)
class RowReading:
    """How rows of tables become documents."""

    column: str = ""
    """The column to read; found by its name and by what it holds if empty."""
    prompt_tokens: str = ""
    """Where the prompt of each row of token ids ends: a column of numbers, or one number."""
    tokenizer: Any = None
    """Its template turns chats into token ids; without one, chats and token ids are refused."""


class Column(NamedTuple):
    """The column that is read."""

    name: str
    kind: ColumnKind


def row_documents(
    rows: Iterable[Row], name: str, reading: RowReading, features: Mapping[str, Any] | None = None
) -> Iterator[Document | TokenRow]:
    """What each row of a table gives, in order; rows without a value give empty texts.

    Args:
        rows: By column name; they need not all have the same columns.
        name: Of the table; documents are called `name:0`, `name:1` and so on.
        reading: Which column, and how.
        features: Types of the columns, as `datasets` gives them, where they are known.

    Raises:
        NoTextError: If no column can be taken; names the columns. Nothing was given then.
        ValueError: If a row holds something else than the column's kind.
    """
    left = iter(rows)
    first = list(itertools.islice(left, NUM_ROWS_SEEN))
    if len(first) == 1:
        first = _rows_within(first[0]) or first
    if not first:
        return
    column = choose_column(first, reading, features or {})
    for number, row in enumerate(itertools.chain(first, left)):
        try:
            yield _document(row, column, f"{name}:{number}", reading)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {number} of {name} cannot be read: {error}") from error


def choose_column(first: list[Row], reading: RowReading, features: Mapping[str, Any]) -> Column:
    """The column that the user names, else one with a usual name, else the only one of its kind.

    Args:
        first: Some rows.
        reading: Names the column, perhaps.
        features: Types of the columns where they are known.

    Raises:
        NoTextError: If there is none; lists the columns.
    """
    names = dict.fromkeys(name for row in first for name in row)
    kinds = {name: _kind_in(first, name, features) for name in names}
    found = _asked(kinds, reading.column) if reading.column else _found(kinds)
    if found.kind != "text" and reading.tokenizer is None:
        raise NoTextError(f"its column {found.name} holds {_plural(found.kind)}, not text.")
    if found.kind != "token ids" and reading.prompt_tokens:
        raise ValueError(
            f"Where the prompt ends can be said of token ids only; column {found.name} holds "
            f"{_plural(found.kind)}. Leave out --prompt-tokens, or name another --column."
        )
    return found


def _rows_within(row: Row) -> list[Row]:
    """The rows of a JSON file that holds them under one name, with other things beside them."""
    lists = [value for value in row.values() if isinstance(value, list)]
    inner = lists[0] if len(lists) == 1 else []
    is_table = all(isinstance(part, dict) for part in inner) and not turns_of(inner)
    return inner if is_table else []


def _asked(kinds: Mapping[str, ColumnKind], name: str) -> Column:
    if name not in kinds:
        raise NoTextError(f"it has no column {name}; its columns are {_names(kinds)}.")
    kind = kinds[name]
    if kind in ("plain", "other"):
        raise NoTextError(f"its column {name} holds neither text, nor chats, nor token ids.")
    return Column(name, "text" if kind == "nothing" else kind)


def _found(kinds: Mapping[str, ColumnKind]) -> Column:
    for name, kind in NAMED:
        if kinds.get(name) == kind or (kind == "text" and kinds.get(name) == "nothing"):
            return Column(name, kind)
    chats = [name for name, kind in kinds.items() if kind == "chat"]
    if len(chats) == 1:
        return Column(chats[0], "chat")
    texts = [name for name, kind in kinds.items() if kind == "text"]
    is_plain = not {"chat", "token ids", "other"} & set(kinds.values())
    if len(texts) == 1 and is_plain and not _is_label(texts[0]):
        return Column(texts[0], "text")
    raise NoTextError(
        "no column is named text, content, messages or input_ids, and not exactly one holds text; "
        f"its columns are {_names(kinds)}. Name one with --column."
    )


def _names(kinds: Mapping[str, ColumnKind]) -> str:
    names = ", ".join(" ".join(name.split()) for name in kinds)
    return names if len(names) <= MOST_SAID else f"{names[:MOST_SAID]}..."


def _is_label(name: str) -> bool:
    return name.lower() in NOT_TEXT or name.lower().endswith("_id")


def _kind_in(rows: list[Row], name: str, features: Mapping[str, Any]) -> ColumnKind:
    """What a column holds: by its first value, or by its type where these rows have none."""
    for row in rows:
        if row.get(name) not in (None, []):
            return _kind_of(row[name])
    is_string = getattr(features.get(name), "dtype", "") in ("string", "large_string")
    return "text" if is_string else "nothing"


def _kind_of(value: Any) -> ColumnKind:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list | dict):
        return "plain"
    if isinstance(value, list) and all(type(part) is int for part in value):
        return "token ids"
    return "chat" if turns_of(value) else "other"


def _plural(kind: ColumnKind) -> str:
    return "chats" if kind == "chat" else kind


def _document(row: Row, column: Column, name: str, reading: RowReading) -> Document | TokenRow:
    value = row.get(column.name)
    if value is None or value == []:
        return Document(name, "")
    if column.kind == "text":
        if not isinstance(value, str):
            raise TypeError(f"column {column.name} holds {type(value).__name__}, not text.")
        return Document(name, value)
    if column.kind == "chat":
        turns = turns_of(value)
        if turns is None:
            raise TypeError(f"column {column.name} holds no chat.")
        return TokenRow(name, tuple(encode_chat(reading.tokenizer, turns)))
    if not all(type(part) is int for part in value):
        raise TypeError(f"column {column.name} holds other things than token ids.")
    return TokenRow(name, tuple(value), _prompt_end(row, reading.prompt_tokens, len(value)))


def _prompt_end(row: Row, prompt_tokens: str, num_tokens: int) -> int | None:
    if not prompt_tokens:
        return None
    end = int(prompt_tokens) if prompt_tokens.isdecimal() else row.get(prompt_tokens)
    if type(end) is not int or not 0 <= end <= num_tokens:
        raise ValueError(
            f"--prompt-tokens {prompt_tokens} gives {end}, not a number from 0 to {num_tokens}."
        )
    return end
