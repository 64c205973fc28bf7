"""Traces as an estimator needs them: source and target layers side by side, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import SOURCE_FIELDS, EstimatorSpec, SourceState, source_position
from foreroute.estimators.artifacts import is_finite
from foreroute.train.split import rows_of

CACHE_BYTES = 2 << 30
BASE_SOURCE_FIELDS = ("residual", "router_input", "expert_ids", "gate_weights")
"""What all traces hold."""
TARGET_FIELDS = ("router_logits", "expert_ids", "gate_weights")
SEQUENCE_START = -1
NOT_STORED = -2


class RoutingBatch(NamedTuple):
    """Tokens at the source layers, and what the target layers did with them."""

    source: SourceState
    """What estimators read, stacked over the P pairs."""
    target_logits: Tensor
    """True router logits of the target layers, [P, T, E], float."""
    target_ids: Tensor
    """Experts the target layers chose, [P, T, K], int64."""
    target_gate_weights: Tensor
    """What each of them was multiplied with, [P, T, K], float."""
    previous_ids: Tensor
    """Experts the target layers chose for the token before, [P, T, K]; `SEQUENCE_START` where
    there is none, `NOT_STORED` where it was not recorded; both are below 0."""
    first_of_sequence: Tensor | None = None
    """Whether each token is the first of its sequence, [1, T], bool; None where `previous_ids`
    say it."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.target_ids.shape[1]

    @property
    def starts(self) -> Tensor:
        """Whether each token is the first of its sequence, [T], bool."""
        if self.first_of_sequence is not None:
            return self.first_of_sequence[0]
        return self.previous_ids[0, :, 0] == SEQUENCE_START

    def select(self, rows: slice | Tensor) -> RoutingBatch:
        """The same for some of the tokens."""
        return self._changed(lambda tensor: tensor[:, rows])

    def to(self, device: torch.device) -> RoutingBatch:
        """The same on another device."""
        return self._changed(lambda tensor: tensor.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> RoutingBatch:
        source = (None if field is None else change(field) for field in self.source)
        rest: list[Any] = [None if tensor is None else change(tensor) for tensor in self[1:]]
        return RoutingBatch(SourceState(*source), *rest)

    def one_token_later(self) -> RoutingBatch:
        """The same source states, each beside what the target layers do with the next token.

        The tokens are those that have one before them, less the source states of the others.
        `previous_ids` then are the target layers' experts for the token that is read.
        """
        known = (self.previous_ids[0, :, 0] >= 0).nonzero().squeeze(1)
        source = (None if field is None else field[:, known - 1] for field in self.source)
        later = self.select(known)
        is_first = self.starts[known - 1].unsqueeze(0)
        return later._replace(source=SourceState(*source), first_of_sequence=is_first)

    def tensors(self) -> list[Tensor]:
        """All tensors it holds."""
        return [field for field in (*self.source, *self[1:]) if field is not None]


class PairedShards:
    """The tokens of a range of sequences, shard by shard, layers stacked as they are paired.

    Shards are kept in memory after their first reading as long as they fit `cache_bytes`.
    """

    def __init__(
        self,
        traces: Traces,
        spec: EstimatorSpec,
        sequences: range,
        *,
        source_fields: tuple[str, ...] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Find the rows of every shard.

        Args:
            traces: Where to read.
            spec: Which layers are paired.
            sequences: Wanted, counted over all shards.
            source_fields: Fields of the source layers to read; those of the spec's input if None.
            cache_bytes: Most bytes to keep in memory, besides the shard in use.
        """
        geometry = traces.geometry
        sources = (source_position(geometry, t, spec.horizon) for t in spec.target_layers)
        self._traces = traces
        self.source_layers = tuple(geometry.layer_indices[position] for position in sources)
        self.target_layers = spec.target_layers
        self._source_fields = source_fields or SOURCE_FIELDS[spec.input_kind]
        self._tokens_ahead = spec.tokens_ahead
        self._free_bytes = cache_bytes
        self._cache: dict[int, RoutingBatch] = {}
        self.rows: dict[int, slice] = {}
        """Tokens wanted of each shard that has some."""
        first_sequence = 0
        for shard_idx, shard in enumerate(traces.manifest.shards):
            offsets = traces.tokens(shard_idx).sequence_offsets
            rows = rows_of(sequences, first_sequence, offsets)
            if rows.stop > rows.start:
                self.rows[shard_idx] = rows
            first_sequence += shard.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens of all the sequences."""
        return sum(rows.stop - rows.start for rows in self.rows.values())

    def __iter__(self) -> Iterator[RoutingBatch]:
        """Every shard's tokens in recording order."""
        return (self.read(shard_idx) for shard_idx in self.rows)

    def read(self, shard_idx: int) -> RoutingBatch:
        """One shard's tokens, on the CPU, floats as stored."""
        if shard_idx in self._cache:
            return self._cache[shard_idx]
        target = self._stack(self.target_layers, shard_idx, TARGET_FIELDS)
        batch = RoutingBatch(
            source=SourceState(**self._stack(self.source_layers, shard_idx, self._source_fields)),
            target_logits=target["router_logits"],
            target_ids=target["expert_ids"],
            target_gate_weights=target["gate_weights"],
            previous_ids=self._previous(target["expert_ids"], shard_idx),
        )
        if self._tokens_ahead:
            batch = batch.one_token_later()
        num_bytes = sum(tensor.nbytes for tensor in batch.tensors())
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._cache[shard_idx] = batch
        return batch

    def _stack(
        self, layers: tuple[int, ...], shard_idx: int, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        rows = self.rows[shard_idx]
        read = [self._traces.read(layer_idx, shard_idx, names) for layer_idx in layers]
        stacked = {name: torch.stack([tensors[name][rows] for tensors in read]) for name in names}
        for name, tensor in stacked.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise ValueError(
                    f"{self._traces.folder} holds {name} that is not finite, in shard {shard_idx} "
                    f"of one of layers {list(layers)}. Collect the traces again, with --dtype "
                    "float32 or bfloat16."
                )
        return stacked

    def _previous(self, expert_ids: Tensor, shard_idx: int) -> Tensor:
        rows, tokens = self.rows[shard_idx], self._traces.tokens(shard_idx)
        offsets, positions = tokens.sequence_offsets, tokens.positions[rows]
        starts = offsets[(offsets >= rows.start) & (offsets < rows.stop)] - rows.start
        previous = expert_ids.roll(1, dims=1)
        previous[:, (positions.diff() != 1).nonzero().squeeze(1) + 1] = NOT_STORED
        previous[:, starts] = SEQUENCE_START
        return previous
