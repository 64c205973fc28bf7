"""Parts of shards: their first tokens, tokens in memory, and tokens under other tokens' labels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Generic

import torch

from foreroute.train.datamodule import Shards, TokensT
from foreroute.train.prepared import PreparedBatch


class FirstTokens(Generic[TokensT]):
    """The first tokens of shards: whole shards, and a part of the last."""

    def __init__(self, shards: Shards[TokensT], num_tokens: int) -> None:
        """Take so many, or all there are.

        Args:
            shards: Where they come from.
            num_tokens: At most.
        """
        self._shards = shards
        self.rows: dict[int, slice] = {}
        """Rows taken of each shard that gives some."""
        for shard_idx, rows in shards.rows.items():
            taken = min(rows.stop - rows.start, num_tokens - self.num_tokens)
            if taken > 0:
                self.rows[shard_idx] = slice(rows.start, rows.start + taken)

    @property
    def num_tokens(self) -> int:
        """Tokens taken."""
        return sum(rows.stop - rows.start for rows in self.rows.values())

    def read(self, shard_idx: int) -> TokensT:
        """One shard's tokens."""
        rows = self.rows[shard_idx]
        return self._shards.read(shard_idx).select(slice(0, rows.stop - rows.start))


class InMemory(Generic[TokensT]):
    """Tokens that are there already, each batch a shard."""

    def __init__(self, batches: Sequence[TokensT]) -> None:
        """Hold them."""
        self._batches = batches

    @property
    def rows(self) -> Mapping[int, slice]:
        """All rows of all shards."""
        return {i: slice(0, batch.num_tokens) for i, batch in enumerate(self._batches)}

    def read(self, shard_idx: int) -> TokensT:
        """One shard."""
        return self._batches[shard_idx]


class ShuffledLabels:
    """The same states, each with the routing of another token of any shard: nothing to learn.

    Within a shard there is something: tokens of the same few documents, which share experts that
    other documents use less.
    """

    def __init__(self, shards: Shards[PreparedBatch]) -> None:
        """Shuffle what all shards hold but their states; it is in memory at once."""
        self._shards, self.rows = shards, shards.rows
        host = torch.device("cpu")  # shards may lie in two places
        batches = [_without_states(shards.read(shard_idx)).to(host) for shard_idx in shards.rows]
        labels = PreparedBatch(*(torch.cat(parts, dim=1) for parts in zip(*batches, strict=True)))
        generator = torch.Generator().manual_seed(0)
        self._labels = labels.select(torch.randperm(labels.num_tokens, generator=generator))
        counts = [batch.num_tokens for batch in batches]
        self._starts = dict(zip(shards.rows, itertools.accumulate(counts, initial=0), strict=False))

    def read(self, shard_idx: int) -> PreparedBatch:
        """One shard's tokens."""
        batch, start = self._shards.read(shard_idx), self._starts[shard_idx]
        labels = self._labels.select(slice(start, start + batch.num_tokens))
        labels = labels.to(batch.features.device)
        return labels._replace(features=batch.features, anchor_logits=batch.anchor_logits)


def _without_states(batch: PreparedBatch) -> PreparedBatch:
    nothing = batch.features[..., :0]
    return batch._replace(features=nothing, anchor_logits=nothing)
