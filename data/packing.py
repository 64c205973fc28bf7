"""Packs documents into sequences of one length, as the model will read them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from foreroute.data.adapters.vocabulary import require_known
from foreroute.data.document import Document, TokenRow

logger = logging.getLogger(__name__)

SHORT_ROWS = "Rows of less than %d tokens (--sequence-length) are left out, such as %s."


class TokenSequence(NamedTuple):
    """One sequence for the model."""

    token_ids: list[int]
    num_prompt_tokens: int | None = None
    """Where the prompt ends, if the dataset says that a model wrote the rest."""


def token_sequences(
    documents: Iterable[Document | TokenRow],
    tokenizer: Any,
    sequence_length: int,
    num_tokens: int,
    num_known: int | None = None,
) -> Iterator[TokenSequence]:
    """Pack documents, an end-of-text token after each text, into sequences of one length.

    Where the tokenizer begins its texts with a token, each sequence of text begins with it. Token
    ids are packed as they are, with nothing added; a row that says where its prompt ends is one
    sequence, from its start. What does not fill a sequence is dropped.

    Args:
        documents: Texts or token ids, in order.
        tokenizer: A transformers tokenizer.
        sequence_length: Tokens per sequence.
        num_tokens: Stop once this many have been given; fewer come if the documents end.
        num_known: Ids that the model has an embedding for; not checked if None.

    Raises:
        ValueError: If the documents do not fill one sequence (says how many tokens they had), or
            an id is not the model's.
    """
    texts = _Packing(sequence_length, _begin(tokenizer))
    given_ids = _Packing(sequence_length, [])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    num_given = longest = 0
    is_said = False
    for document in documents:
        if isinstance(document, Document):
            encoded = tokenizer(document.text, add_special_tokens=False, verbose=False)
            ready = texts.add([*encoded["input_ids"], *end])
        elif document.num_prompt_tokens is None:
            ready = given_ids.add(document.token_ids)
        else:
            if len(document.token_ids) < sequence_length and not is_said:
                logger.info(SHORT_ROWS, sequence_length, document.name)
                is_said = True
            longest = max(longest, len(document.token_ids))
            ready = _whole(document, sequence_length)
        for sequence in ready:
            if num_given >= num_tokens:
                return
            if num_known is not None:
                require_known(sequence.token_ids, num_known, f"Document {document.name}")
            num_given += sequence_length
            yield sequence
    if not num_given:
        had = max(longest, len(texts.pending), len(given_ids.pending))
        raise ValueError(
            f"The dataset has only {had} tokens in this split; one sequence needs "
            f"{texts.room}. Lower --sequence-length or give more text."
        )


def first_tokens(
    document: Document | TokenRow, tokenizer: Any, num_tokens: int, num_known: int
) -> list[int]:
    """How a document begins as the model reads it.

    Args:
        document: A text, or token ids.
        tokenizer: A transformers tokenizer.
        num_tokens: At most so many are given.
        num_known: Ids that the model has an embedding for.

    Raises:
        ValueError: If any of the document's tokens is not the model's.
    """
    if isinstance(document, TokenRow):
        token_ids = list(document.token_ids)
    else:
        encoded = tokenizer(document.text, add_special_tokens=False, verbose=False)
        token_ids = [*_begin(tokenizer), *encoded["input_ids"]]
    require_known(token_ids, num_known, f"Document {document.name}")
    return token_ids[:num_tokens]


class _Packing:
    """What is left over from one document to the next."""

    def __init__(self, sequence_length: int, prefix: list[int]) -> None:
        self.prefix = prefix
        self.room = sequence_length - len(prefix)
        self.pending: list[int] = []

    def add(self, token_ids: Iterable[int]) -> list[TokenSequence]:
        """The sequences that become full."""
        self.pending += token_ids
        num_whole = len(self.pending) // self.room * self.room
        starts = range(0, num_whole, self.room)
        full = [self.prefix + self.pending[start : start + self.room] for start in starts]
        self.pending = self.pending[num_whole:]
        return [TokenSequence(token_ids) for token_ids in full]


def _whole(row: TokenRow, sequence_length: int) -> list[TokenSequence]:
    """A row from its start, if it is long enough."""
    if len(row.token_ids) < sequence_length:
        return []
    assert row.num_prompt_tokens is not None
    given = min(row.num_prompt_tokens, sequence_length)
    return [TokenSequence(list(row.token_ids[:sequence_length]), given)]


def _begin(tokenizer: Any) -> list[int]:
    """The token that the tokenizer begins its texts with, if it has one."""
    begin = tokenizer("")["input_ids"]
    return list(begin[:1]) if begin and begin[0] == tokenizer.bos_token_id else []
