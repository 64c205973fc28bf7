"""How far an engine's predictions are from the exact model's, with intervals over sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
COVERAGE = 0.95
Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass
class Comparison:
    """Adds up one engine's continuations beside the exact ones; all of one length."""

    nll: list[Tensor] = field(default_factory=list)
    """By sequence: what each next token's likelihood lost, in nats, [N - 1] float64."""
    kl: list[Tensor] = field(default_factory=list)
    """By sequence: the divergence from the exact model's distribution, in nats, [N - 1] float64."""
    is_top1: list[Tensor] = field(default_factory=list)
    """By sequence: whether the likeliest token is the exact model's, [N - 1] float64."""

    def add(self, exact: Tensor, found: Tensor, tokens: Tensor) -> None:
        """Compare one sequence.

        Args:
            exact: Logits of the exact model, [n, V] float32.
            found: Logits of the engine, [n, V] float32, on the same device.
            tokens: The tokens that came, [n] int64.
        """
        true, own = exact.log_softmax(-1), found.log_softmax(-1)
        kl = (true.exp() * (true - own)).sum(-1).clamp_min(0)  # below 0 by rounding alone
        lost = (true - own).gather(1, tokens.unsqueeze(1)).squeeze(1)
        is_same = true.argmax(-1) == own.argmax(-1)
        self.nll.append(lost.double().cpu())
        self.kl.append(kl.double().cpu())
        self.is_top1.append(is_same.double().cpu())

    def perplexity_ratio(self) -> tuple[float, Interval]:
        """The engine's perplexity over the exact model's, and its interval."""
        mean, (low, high) = with_interval(_by_sequence(self.nll))
        return math.exp(mean), (math.exp(low), math.exp(high))

    def mean_kl(self) -> tuple[float, Interval]:
        """Mean divergence from the exact model, in nats, and its interval."""
        return with_interval(_by_sequence(self.kl))

    def top1_agreement(self) -> tuple[float, Interval]:
        """Share of positions whose likeliest token is the exact model's, and its interval."""
        return with_interval(_by_sequence(self.is_top1))

    def by_position(self, parts: int) -> list[dict[str, float]]:
        """Means over parts of the continuation of about equal length, first to last.

        Args:
            parts: How many; fewer where there are fewer tokens.
        """
        nll, kl, top1 = (torch.stack(rows).mean(0) for rows in (self.nll, self.kl, self.is_top1))
        places = torch.arange(len(kl)).tensor_split(min(parts, len(kl)))
        return [
            {
                "first": int(at[0]) + 2,  # the token predicted, counted from 1
                "last": int(at[-1]) + 2,
                "kl": float(kl[at].mean()),
                "perplexity_ratio": math.exp(float(nll[at].mean())),
                "top1_agreement": float(top1[at].mean()),
            }
            for at in places
        ]


def with_interval(values: Floats) -> tuple[float, Interval]:
    """A mean over sequences, and its bootstrap interval.

    Each value is a difference from the exact model on the same sequence, so the pairs stay paired.

    Args:
        values: One per sequence.

    Returns:
        The mean, and the middle `COVERAGE` of means over sequences drawn anew.

    Example:
        >>> with_interval(np.array([1.0, 1.0]))
        (1.0, (1.0, 1.0))
    """
    dice = np.random.default_rng(0)
    means = values[dice.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    edges = (1 - COVERAGE) / 2, (1 + COVERAGE) / 2
    low, high = (float(edge) for edge in np.quantile(means, edges))
    return float(values.mean()), (low, high)


def _by_sequence(rows: list[Tensor]) -> Floats:
    means: Floats = torch.stack(rows).mean(1).numpy()
    return means
