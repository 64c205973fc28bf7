"""Parts of shards: their first tokens, tokens in memory, and tokens under other tokens' labels."""

from __future__ import annotations

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
    """The same states, each with the routing of another token of its shard: nothing to learn."""

    def __init__(self, shards: Shards[PreparedBatch]) -> None:
        """Shuffle shards as they are read."""
        self._shards, self.rows = shards, shards.rows

    def read(self, shard_idx: int) -> PreparedBatch:
        """One shard's tokens."""
        batch = self._shards.read(shard_idx)
        generator = torch.Generator().manual_seed(shard_idx)
        other = batch.select(torch.randperm(batch.num_tokens, generator=generator))
        return other._replace(features=batch.features, anchor_logits=batch.anchor_logits)
