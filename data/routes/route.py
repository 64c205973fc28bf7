"""A recorded route: which experts every token used in every MoE layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int16]
ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How routers saw all experts, for every token of a route."""

    ranking: NDArray[np.float32]
    """[T, L, E]; the top-K of it are chosen."""
    scores: NDArray[np.float32]
    """[T, L, E]; gate weights are in proportion to these."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Tokens in the order they ran, batch 1."""

    name: str
    """Where it comes from, for messages."""
    expert_ids: Ids
    """[T, L, K] int16, distinct within a row; -1 where fewer were recorded."""
    is_decode: NDArray[np.bool_]
    """[T]: whether the token was generated, and is timed; others are of a prompt."""
    num_experts: int
    """E."""
    likely_ids: Ids | None = None
    """[T, L, N]: experts that the next token is likely to use in the same layer; -1 for none."""
    likely_probability: NDArray[np.float32] | None = None
    """[T, L, N], 0..1."""

    def __post_init__(self) -> None:
        """Check shapes and ids.

        Raises:
            ValueError: If they contradict each other.
        """
        if self.expert_ids.ndim != 3 or 0 in self.expert_ids.shape:
            raise ValueError(
                f"{self.name} has expert ids of shape {list(self.expert_ids.shape)}; expected "
                "[tokens, layers, top_k], none of them 0."
            )
        if self.is_decode.shape != self.expert_ids.shape[:1]:
            raise ValueError(f"{self.name} says for {len(self.is_decode)} tokens if they decode.")
        lowest, highest = int(self.expert_ids.min()), int(self.expert_ids.max())
        if lowest < ABSENT or highest >= self.num_experts:
            raise ValueError(
                f"{self.name} names experts {lowest}..{highest}; a layer has {self.num_experts}."
            )
        if not self.is_decode.any():
            raise ValueError(f"{self.name} has no decode step to time.")
        ranked = np.sort(self.expert_ids, axis=-1)
        if bool(((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)).any()):
            raise ValueError(f"{self.name} names one expert twice for one token and layer.")

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.expert_ids.shape[2])

    @property
    def num_decode_steps(self) -> int:
        """Tokens that are timed."""
        return int(self.is_decode.sum())

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.name}: {self.num_layers} layers, {self.num_experts} experts, "
            f"top-{self.top_k}, {len(self.is_decode) - self.num_decode_steps} prompt and "
            f"{self.num_decode_steps} decode tokens"
        )

    def rows(self) -> list[list[tuple[int, ...]]]:
        """Expert ids as plain Python, [T][L], without the absent ones."""
        lists = self.expert_ids.tolist()
        if int(self.expert_ids.min()) >= 0:
            return [[tuple(ids) for ids in token] for token in lists]
        return [[tuple(e for e in ids if e >= 0) for ids in token] for token in lists]

    def spans(self) -> list[tuple[int, int, bool]]:
        """Runs of tokens of one phase: first, one past the last, whether they decode."""
        edges = np.flatnonzero(np.diff(self.is_decode.astype(np.int8))) + 1
        bounds = [0, *edges.tolist(), len(self.is_decode)]
        return [
            (start, stop, bool(self.is_decode[start])) for start, stop in itertools.pairwise(bounds)
        ]
