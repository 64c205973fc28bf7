"""What a dataset gives: texts, or rows of token ids, each with a name of its own."""

from __future__ import annotations

from typing import NamedTuple


class Document(NamedTuple):
    """One text of a dataset."""

    name: str
    """Names it within its dataset (a path below the root, or a row number)."""
    text: str


class TokenRow(NamedTuple):
    """One row of a dataset as token ids: tokenised before, or a chat put through a template."""

    name: str
    """Names it within its dataset."""
    token_ids: tuple[int, ...]
    num_prompt_tokens: int | None = None
    """Where the prompt ends, if a model wrote the rest; such a row is recorded as one sequence."""


class NoTextError(ValueError):
    """What was asked for holds no text; the message names it and says what it holds."""
