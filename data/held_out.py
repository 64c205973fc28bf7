"""Texts to measure on: how held-out documents begin."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.data.columns import RowReading
from foreroute.data.corpus import contents
from foreroute.data.packing import first_tokens


def held_out_sequences(
    reading: RowReading, dataset: str, count: int, length: int, num_known: int
) -> list[Tensor]:
    """The first tokens of held-out documents, [1, length] each.

    Args:
        reading: How rows of tables are read; with the model's tokenizer.
        dataset: As `contents` takes it.
        count: How many.
        length: Tokens of each.
        num_known: Ids that the model has an embedding for.

    Raises:
        ValueError: If there are fewer documents of that length.
    """
    sequences: list[Tensor] = []
    for document in contents(dataset, "held-out", reading):
        ids = first_tokens(document, reading.tokenizer, length, num_known)
        if len(ids) == length:
            sequences.append(torch.tensor([ids]))
        if len(sequences) == count:
            return sequences
    raise ValueError(
        f"{dataset} has only {len(sequences)} held-out documents of {length} tokens; {count} are "
        "asked for. Lower --num-prompts, --prompt-tokens or --new-tokens."
    )
