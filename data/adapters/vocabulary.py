"""Whether token ids are a model's own: another model's tokenizer gives ids it has no row for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def vocabulary_size(model: Any) -> int:
    """Token ids that a model has an embedding for, from 0."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_known(token_ids: Iterable[int], num_known: int, what: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        token_ids: As a tokenizer, or a dataset, gives them.
        num_known: As `vocabulary_size` gives it.
        what: Where they come from, the sentence's subject.

    Raises:
        ValueError: If there is one; says which.
    """
    for token_id in token_ids:
        if not 0 <= token_id < num_known:
            raise ValueError(
                f"{what} has token {token_id}, but the model's vocabulary has only {num_known} "
                "tokens: tokenizer and model do not belong together."
            )
