"""Batches for the fit: shard by shard, shuffled shards and shuffled tokens in them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from lightning import LightningDataModule

from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec
from foreroute.train.shards import PairedShards, RoutingBatch
from foreroute.train.split import SequenceSplit

SEED_STRIDE = 1_000_003  # keeps the epochs of one seed apart from another seed's


class BatchStream:
    """Batches of one epoch, never across shards.

    Args:
        shards: The tokens.
        batch_size: Tokens per batch (a shard's last may hold fewer).
        seed: Orders shards and tokens; recording order if None.
    """

    def __init__(self, shards: PairedShards, batch_size: int, seed: int | None = None) -> None:
        self.shards, self.batch_size, self.seed = shards, batch_size, seed

    def __len__(self) -> int:
        """Number of batches."""
        sizes = (rows.stop - rows.start for rows in self.shards.rows.values())
        return sum(math.ceil(size / self.batch_size) for size in sizes)

    def __iter__(self) -> Iterator[RoutingBatch]:
        """Yield every token once."""
        shard_indices = list(self.shards.rows)
        if self.seed is None:
            for shard_idx in shard_indices:
                shard = self.shards.read(shard_idx)
                for start in range(0, shard.num_tokens, self.batch_size):
                    yield shard.select(slice(start, start + self.batch_size))
            return
        generator = torch.Generator().manual_seed(self.seed)
        for i in torch.randperm(len(shard_indices), generator=generator).tolist():
            shard = self.shards.read(shard_indices[i])
            order = torch.randperm(shard.num_tokens, generator=generator)
            for rows in torch.split(order, self.batch_size):
                yield shard.select(rows)


class RoutingDataModule(LightningDataModule):
    """Train and held-out batches of recorded routing.

    Args:
        traces: Where to read.
        spec: Which layers are paired, and what is read of the source layers.
        split: Sequences of each part.
        batch_size: Tokens per batch.
        seed: Orders the training tokens, anew in every epoch.
    """

    def __init__(
        self,
        traces: Traces,
        spec: EstimatorSpec,
        split: SequenceSplit,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train = PairedShards(traces, spec, split.train)
        self.held_out = PairedShards(traces, spec, split.held_out)
        self.batch_size, self.seed = batch_size, seed

    @property
    def num_batches(self) -> int:
        """Training batches per epoch."""
        return len(BatchStream(self.train, self.batch_size))

    def train_dataloader(self) -> BatchStream:
        """This epoch's training batches; asked for at the start of each epoch."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return BatchStream(self.train, self.batch_size, seed=self.seed * SEED_STRIDE + epoch)

    def val_dataloader(self) -> BatchStream:
        """Held-out batches, in recording order."""
        return BatchStream(self.held_out, self.batch_size)

    def transfer_batch_to_device(
        self, batch: RoutingBatch, device: torch.device, dataloader_idx: int
    ) -> RoutingBatch:
        """Move one batch."""
        return batch.to(device)
