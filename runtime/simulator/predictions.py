"""What a predictor said about coming layers: real, or simulated at a given recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes import Ids, Route

Errors = Literal["near-miss", "uniform"]
QUANTILES = 8192
CHUNK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Experts expected in each layer, seen from 1..H layers before it."""

    expert_ids: Ids
    """[H, T, L, M], by target layer: entry h - 1 was said h layers before; -1 for nothing."""
    confidence: NDArray[np.float32]
    """[H, T, L, M], the probability that the expert is used, 0..1."""

    @property
    def horizon(self) -> int:
        """H."""
        return int(self.expert_ids.shape[0])

    def recall(self, route: Route) -> list[float]:
        """Share of the decode steps' experts that were named, for each horizon."""
        found = []
        for step, ids in enumerate(self.expert_ids):
            layers = slice(step + 1, None)
            true = route.expert_ids[route.is_decode][:, layers]  # [T, L', K]
            guessed = ids[route.is_decode][:, layers]  # [T, L', M]
            hit = (true[..., :, None] == guessed[..., None, :]).any(-1) & (true >= 0)
            found.append(float(hit.sum() / max(1, (true >= 0).sum())))
        return found


@dataclass(frozen=True, kw_only=True)
class SimulatedPredictor:
    """A predictor of a given quality: as many guesses as the token has experts."""

    recall: float = 0.89
    """Share of the true experts it names one layer ahead, 0..1."""
    errors: Errors = "near-miss"
    """Wrong guesses by the layer's popularity (`near-miss`), or any expert (`uniform`)."""
    falloff: float = 0.94
    """Factor on recall for each further layer ahead (.890 to .837 was measured)."""
    concentration: float = 2.0
    """Confidence is beta distributed around recall with this a + b: small knows which guesses are
    wrong, large does not. It is calibrated for any value."""
    seed: int = 0
    """Decides all random numbers."""

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ValueError: If one is out of its range.
        """
        if self.errors not in get_args(Errors):
            known = ", ".join(get_args(Errors))
            raise ValueError(f"Unknown errors {self.errors!r}; known: {known}.")
        if not 0 <= self.recall <= 1 or not 0 < self.falloff <= 1:
            raise ValueError(
                f"recall must lie in 0..1 and falloff over 0 and at most at 1, not {self.recall} "
                f"and {self.falloff}."
            )
        if self.concentration <= 0:
            raise ValueError(f"concentration must be positive, not {self.concentration}.")

    def predict(self, route: Route, horizon: int) -> Predictions:
        """Guess every layer from 1..horizon layers before.

        An expert that is named from far is named from nearer layers too, and a wrong guess from
        near is also made from far. The confidences in one expert rise and fall together. So looking
        several times tells no more than looking once.

        Args:
            route: What really happened.
            horizon: H.

        Raises:
            ValueError: If the horizon is not positive.
        """
        if horizon < 1:
            raise ValueError(f"A horizon must be at least 1 layer, not {horizon}.")
        shape = (horizon, *route.expert_ids.shape)
        ids = np.full(shape, -1, dtype=np.int16)
        confidence = np.zeros(shape, dtype=np.float32)
        rng = np.random.default_rng(self.seed)
        tables = [self._confidences(h, rng) for h in range(horizon)]
        popularity = _log_popularity(route) if self.errors == "near-miss" else None
        for start in range(0, len(route.expert_ids), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            true = route.expert_ids[part]
            wrong = _wrong_guesses(true, route.num_experts, popularity, rng)
            luck, rank_true, rank_wrong = rng.random((3, *true.shape))
            for h in range(horizon):
                found = (luck < self.recall_at(h + 1)) & (true >= 0)
                # the n-th wrong guess stands where the n-th true expert was missed
                order = np.maximum(np.cumsum(~found, axis=-1) - 1, 0)
                ids[h, part] = np.where(found, true, np.take_along_axis(wrong, order, -1))
                quantile_wrong = np.take_along_axis(rank_wrong, order, -1)
                at_true, at_wrong = tables[h]
                confidence[h, part] = np.where(
                    found,
                    at_true[(rank_true * QUANTILES).astype(int)],
                    at_wrong[(quantile_wrong * QUANTILES).astype(int)],
                )
                ids[h, part][true < 0] = -1
        return Predictions(expert_ids=ids, confidence=confidence)

    def recall_at(self, horizon: int) -> float:
        """Recall so many layers ahead."""
        return float(self.recall * self.falloff ** (horizon - 1))

    def _confidences(
        self, step: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Quantiles of the confidence in right and in wrong guesses, [QUANTILES] each.

        With confidence p ~ Beta(a, b) and a guess right with probability p, p given right is
        Beta(a + 1, b) and p given wrong Beta(a, b + 1).
        """
        mean = min(max(self.recall_at(step + 1), 1e-6), 1 - 1e-6)
        a, b = mean * self.concentration, (1 - mean) * self.concentration
        right = np.sort(rng.beta(a + 1, b, QUANTILES))
        wrong = np.sort(rng.beta(a, b + 1, QUANTILES))
        return (np.ones(QUANTILES) if self.recall == 1 else right), wrong


def _log_popularity(route: Route) -> NDArray[np.float64]:
    """Log of how often each expert of each layer was used, [L, E]."""
    counts = np.full((route.num_layers, route.num_experts), 0.1)
    for layer in range(route.num_layers):
        ids = route.expert_ids[:, layer]
        counts[layer] += np.bincount(ids[ids >= 0], minlength=route.num_experts)
    logs: NDArray[np.float64] = np.log(counts)
    return logs


def _wrong_guesses(
    true: Ids, num_experts: int, popularity: NDArray[np.float64] | None, rng: np.random.Generator
) -> Ids:
    """Experts that are not the true ones, most tempting first, [t, L, K]."""
    tokens, layers, top_k = true.shape
    keys = rng.gumbel(size=(tokens, layers, num_experts))
    if popularity is not None:
        keys += popularity
    token, layer = np.indices((tokens, layers))
    keys[token[..., None], layer[..., None], true] = -np.inf  # -1 masks the last expert: no harm
    return np.argsort(-keys, axis=-1)[..., :top_k].astype(np.int16)
