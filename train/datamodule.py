"""Batches for the fit: shard by shard, in shuffled order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, Self, TypeVar

import torch
from lightning import LightningDataModule
from torch import Tensor

from foreroute.train.prepared import PreparedBatch

SEED_STRIDE = 1_000_003  # keeps the epochs of one seed apart from another seed's


class Tokens(Protocol):
    """Some tokens of which rows can be taken: `RoutingBatch`, `PreparedBatch`."""

    @property
    def num_tokens(self) -> int:
        """T."""

    def select(self, rows: slice | Tensor) -> Self:
        """The same for some of the tokens."""


TokensT = TypeVar("TokensT", bound=Tokens)
TokensT_co = TypeVar("TokensT_co", bound=Tokens, covariant=True)


class Shards(Protocol[TokensT_co]):
    """Tokens that are read shard by shard: `PairedShards`, `PreparedShards`."""

    @property
    def rows(self) -> Mapping[int, slice]:
        """Tokens wanted of each shard that has some."""

    def read(self, shard_idx: int) -> TokensT_co:
        """One shard's tokens."""


class BatchStream(Generic[TokensT]):
    """Batches of one epoch, never across shards: neighbouring tokens, as views.

    Shards that are trained on hold their tokens in random order themselves (`PreparedShards`).
    """

    def __init__(self, shards: Shards[TokensT], batch_size: int, seed: int | None = None) -> None:
        """Say what is read, in which order.

        Args:
            shards: The tokens.
            batch_size: Tokens per batch (a shard's last may hold fewer).
            seed: Orders shards and the batches in them; recording order if None.
        """
        self.shards, self.batch_size, self.seed = shards, batch_size, seed

    def __len__(self) -> int:
        """Number of batches."""
        sizes = (rows.stop - rows.start for rows in self.shards.rows.values())
        return sum(math.ceil(size / self.batch_size) for size in sizes)

    def __iter__(self) -> Iterator[TokensT]:
        """Yield every token once."""
        generator = torch.Generator()
        if self.seed is not None:
            generator.manual_seed(self.seed)
        for shard_idx in self._ordered(list(self.shards.rows), generator):
            shard = self.shards.read(shard_idx)
            starts = list(range(0, shard.num_tokens, self.batch_size))
            for start in self._ordered(starts, generator):
                yield shard.select(slice(start, start + self.batch_size))

    def _ordered(self, items: list[int], generator: torch.Generator) -> list[int]:
        if self.seed is None:
            return items
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


class RoutingDataModule(LightningDataModule):
    """Batches to train on, and batches to watch training by."""

    def __init__(
        self,
        train: Shards[PreparedBatch],
        validation: Shards[PreparedBatch],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """Say what is read.

        Args:
            train: Tokens to train on.
            validation: Tokens of other training sequences; may hold none.
            batch_size: Tokens per batch.
            seed: Orders the training batches, anew in every epoch.
        """
        super().__init__()
        self.train, self.validation = train, validation
        self.batch_size, self.seed = batch_size, seed

    @property
    def num_batches(self) -> int:
        """Training batches per epoch."""
        return len(BatchStream(self.train, self.batch_size))

    def train_dataloader(self) -> BatchStream[PreparedBatch]:
        """This epoch's training batches; asked for at the start of each epoch."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return BatchStream(self.train, self.batch_size, seed=self.seed * SEED_STRIDE + epoch)

    def val_dataloader(self) -> BatchStream[PreparedBatch]:
        """Validation batches, in recording order."""
        return BatchStream(self.validation, self.batch_size)

    def transfer_batch_to_device(
        self, batch: PreparedBatch, device: torch.device, dataloader_idx: int
    ) -> PreparedBatch:
        """Move one batch."""
        return batch.to(device)
