"""What training reads, computed once: features and anchor logits instead of source states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foreroute.estimators import EstimatorStack
from foreroute.estimators.host_memory import available_host_bytes
from foreroute.train.shards import CACHE_BYTES, RoutingBatch

DEVICE_SHARE = 0.75
"""Share of a GPU's free memory that prepared tokens may take."""
HOST_SHARE = 0.5
"""Share of the host's free memory that they may take."""
PREPARE_TOKENS = 4096
BOUNDARY_WIDTH = 0.25
"""Softness of the boundary between chosen and other experts, in standard deviations of scores."""
SMALLEST_WIDTH = 1e-6


class PreparedBatch(NamedTuple):
    """Tokens as the trained part of a stack sees them, and what the target layers did with them."""

    features: Tensor
    """[P, T, D], float32, or bfloat16 on a GPU."""
    anchor_logits: Tensor
    """[P, T, E], float32; [P, T, 0] if the form has no anchor."""
    target_logits: Tensor
    """True router logits, [P, T, E], float."""
    target_ids: Tensor
    """Experts the target layers chose, [P, T, K], integer."""
    target_gate_weights: Tensor
    """What each of them was multiplied with, [P, T, K], float."""
    membership: Tensor
    """Soft membership of each expert in the true top K, 0..1, [P, T, E], of the features' dtype."""
    boundary: Tensor
    """Where it is a half, and in what width of score it rises, [P, T, 2], float32."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.target_ids.shape[1]

    def select(self, rows: slice | Tensor) -> PreparedBatch:
        """The same for some of the tokens (a slice, or indices on any device)."""
        if isinstance(rows, slice):
            return PreparedBatch(*(tensor[:, rows] for tensor in self))
        indices = rows.to(self.features.device)
        return PreparedBatch(*(tensor.index_select(1, indices) for tensor in self))

    def split(self, num_tokens: int) -> Iterator[PreparedBatch]:
        """Views of at most so many tokens each."""
        for start in range(0, self.num_tokens, num_tokens):
            yield self.select(slice(start, start + num_tokens))

    def to(self, device: torch.device) -> PreparedBatch:
        """The same on another device."""
        return PreparedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def num_bytes(self) -> int:
        """Size of all its tensors together."""
        return sum(tensor.nbytes for tensor in self)


def soft_membership(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """How clearly each expert is among the top K of a token, as the true router ranks them.

    Args:
        scores: What the router ranks by, [P, T, E], float32.
        top_k: K, less than E.

    Returns:
        The sigmoid of the distance from the middle of the K-th and the next score, [P, T, E], and
        that middle with the width the distance is counted in, `BOUNDARY_WIDTH` standard deviations
        of the token's scores, [P, T, 2].
    """
    best = scores.topk(min(top_k + 1, scores.shape[-1]), dim=-1).values
    middle = best[..., -2:].mean(dim=-1, keepdim=True)
    width = BOUNDARY_WIDTH * scores.std(dim=-1, keepdim=True).clamp(min=SMALLEST_WIDTH)
    return ((scores - middle) / width).sigmoid(), torch.cat([middle, width], dim=-1)


@torch.no_grad()
def prepare(
    stack: EstimatorStack, batch: RoutingBatch, dtype: torch.dtype = torch.float32
) -> PreparedBatch:
    """Compute what training needs of a batch; no gradient flows through it.

    Args:
        stack: On the batch's device.
        batch: Source states and target routing.
        dtype: Of the features kept.
    """
    features = stack.input.features(batch.source)
    scores = stack.ranking(batch.target_logits.float())
    membership, boundary = soft_membership(scores, batch.target_ids.shape[-1])
    return PreparedBatch(
        features=features.to(dtype),
        anchor_logits=stack.anchor_logits(features),
        target_logits=batch.target_logits,
        target_ids=batch.target_ids,
        target_gate_weights=batch.target_gate_weights,
        membership=membership.to(dtype),
        boundary=boundary,
    )


class SourceShards(Protocol):
    """What is prepared: `PairedShards`, or anything that reads tokens shard by shard."""

    @property
    def rows(self) -> Mapping[int, slice]:
        """Tokens wanted of each shard that has some."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""

    def read(self, shard_idx: int) -> RoutingBatch:
        """One shard's tokens."""


class PreparedShards:
    """Shards of prepared tokens, kept after their first reading as far as memory allows.

    They are kept on the stack's device first, then on the host (pinned, for a GPU); what fits
    neither is read and prepared anew every time.
    """

    def __init__(
        self,
        stack: EstimatorStack,
        shards: SourceShards,
        *,
        seed: int | None = None,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
    ) -> None:
        """Say what is prepared; nothing is read yet.

        Args:
            stack: Prepares them; its features and anchors must not change.
            shards: Where they come from.
            seed: Brings each shard's tokens into random order; recording order if None.
            device_bytes: Most bytes to keep on a GPU; by its free memory if None.
            host_bytes: Most bytes to keep on the host; by its free memory if None.
        """
        self.rows = shards.rows
        self._stack, self._shards, self._seed = stack, shards, seed
        self._device = stack.input.device
        self._is_on_gpu = self._device.type == "cuda"
        self._free_bytes = {
            self._device: _free_device_bytes(self._device) if device_bytes is None else device_bytes
        }
        host = torch.device("cpu")
        self._free_bytes[host] = _free_host_bytes() if host_bytes is None else host_bytes
        self._kept: dict[int, PreparedBatch] = {}

    @classmethod
    def streamed(cls, stack: EstimatorStack, shards: SourceShards) -> PreparedShards:
        """Shards that are prepared anew at every reading: for one pass."""
        return cls(stack, shards, device_bytes=0, host_bytes=0)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return self._shards.num_tokens

    def __iter__(self) -> Iterator[PreparedBatch]:
        """Every shard's tokens in recording order."""
        return (self.read(shard_idx) for shard_idx in self.rows)

    def read(self, shard_idx: int) -> PreparedBatch:
        """One shard's tokens, on the stack's device or on the host."""
        if shard_idx in self._kept:
            return self._kept[shard_idx]
        batch = self._prepare(self._shards.read(shard_idx))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed + shard_idx)
            batch = batch.select(torch.randperm(batch.num_tokens, generator=generator))
        for place in self._free_bytes:
            if batch.num_bytes <= self._free_bytes[place]:
                self._free_bytes[place] -= batch.num_bytes
                self._kept[shard_idx] = self._moved(batch, place)
                return self._kept[shard_idx]
        return batch

    def _prepare(self, shard: RoutingBatch) -> PreparedBatch:
        """A shard's prepared tokens on the stack's device, a part at a time."""
        dtype = torch.bfloat16 if self._is_on_gpu else torch.float32
        starts = range(0, shard.num_tokens, PREPARE_TOKENS)
        parts = [
            prepare(
                self._stack,
                shard.select(slice(start, start + PREPARE_TOKENS)).to(self._device),
                dtype,
            )
            for start in starts
        ]
        return PreparedBatch(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))

    def _moved(self, batch: PreparedBatch, place: torch.device) -> PreparedBatch:
        if place == self._device:
            return batch
        return PreparedBatch(*(tensor.to(place).pin_memory() for tensor in batch))


def _free_device_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE)


def _free_host_bytes() -> int:
    return max(CACHE_BYTES, int((available_host_bytes() or 0) * HOST_SHARE))
