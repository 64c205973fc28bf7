"""Turns an estimator's logits into probabilities that an expert is used, learnt from what was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 64
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """A rising step function from margin to probability."""

    edges: NDArray[np.float64]
    """Upper edge of each bin but the last, [BINS - 1]."""
    probability: NDArray[np.float64]
    """Share of the bin's experts that were used, made to rise, [BINS]."""

    @classmethod
    def fit(cls, margins: Floats, is_used: NDArray[np.bool_]) -> Calibration:
        """Learn from guesses whose outcome is known.

        Args:
            margins: Logit less the token's top-k-th logit, any shape.
            is_used: Whether the router then chose the expert, same shape.
        """
        order = np.argsort(margins, axis=None)
        parts = np.array_split(order, BINS)
        flat, used = margins.reshape(-1), is_used.reshape(-1)
        edges = np.array([flat[part[-1]] for part in parts[:-1]], dtype=np.float64)
        sums = np.array([used[part].sum() for part in parts], dtype=np.float64)
        sizes = np.array([len(part) for part in parts], dtype=np.float64)
        return cls(edges, _rising(sums, sizes))

    def __call__(self, margins: Floats) -> Floats:
        """Probabilities, same shape."""
        return self.probability[np.searchsorted(self.edges, margins)].astype(np.float32)


def margins_of(logits: Floats, top_k: int) -> Floats:
    """How far each logit lies above the least that would be chosen, [T, E]."""
    least = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
    return (logits - least).astype(np.float32)


def _rising(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pool neighbours until shares rise (isotonic regression)."""
    blocks: list[tuple[float, float, int]] = []
    for total, size in zip(sums, sizes, strict=True):
        count = 1
        while blocks and blocks[-1][0] * size >= total * blocks[-1][1]:
            before = blocks.pop()
            total, size, count = total + before[0], size + before[1], count + before[2]
        blocks.append((total, size, count))
    return np.concatenate([np.full(n, total / size) for total, size, n in blocks])
