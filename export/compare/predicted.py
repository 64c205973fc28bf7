"""Predictions as files: of each token and layer the likeliest experts, and how likely they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foreroute.estimators.artifacts import read_tensors, write_tensors

NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class PredictedExperts:
    """What one predictor said of T tokens at P layers."""

    expert_ids: Tensor
    """[T, P, M], integer, likeliest first; `NOTHING` where fewer are predicted."""
    confidence: Tensor | None
    """Probability that each is used, [T, P, M], float32; None if the predictor gives none."""
    target_layers: tuple[int, ...]
    """Decoder layer index of each predicted layer, length P."""

    def __post_init__(self) -> None:
        """Check shapes and numbers.

        Raises:
            ValueError: If they contradict each other.
        """
        ids, said = self.expert_ids, self.confidence
        if ids.dim() != 3 or ids.shape[1] != len(self.target_layers) or ids.shape[2] < 1:
            raise ValueError(
                f"Expected expert_ids of shape [tokens, {len(self.target_layers)} layers, "
                f"predictions], got {list(ids.shape)}."
            )
        if said is not None and said.shape != ids.shape:
            raise ValueError(
                f"Expected a confidence for each of the expert_ids {list(ids.shape)}, got "
                f"{list(said.shape)}."
            )
        if said is not None and not bool(((said >= 0) & (said <= 1)).all()):
            raise ValueError("Expected every confidence to be a probability, in 0..1.")
        ordered = ids.sort(dim=-1).values
        if bool(((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("Expected expert_ids without repeats for one token and layer.")

    @classmethod
    def of_scores(
        cls,
        scores: Tensor,
        probabilities: Tensor | None,
        target_layers: tuple[int, ...],
        count: int,
    ) -> PredictedExperts:
        """The best-ranked experts.

        Args:
            scores: What experts are ranked by, [P, T, E], float.
            probabilities: Of each expert to be used, [P, T, E]; None if not known.
            target_layers: Of the pairs.
            count: M, at most E.
        """
        ids = scores.topk(min(count, scores.shape[-1]), dim=-1).indices  # [P, T, M]
        said = None if probabilities is None else probabilities.gather(-1, ids)
        return cls(
            expert_ids=ids.transpose(0, 1).short().cpu(),
            confidence=None if said is None else said.transpose(0, 1).float().cpu(),
            target_layers=target_layers,
        )

    def first(self, num_tokens: int) -> PredictedExperts:
        """Those of the first tokens."""
        said = self.confidence
        return PredictedExperts(
            expert_ids=self.expert_ids[:num_tokens],
            confidence=None if said is None else said[:num_tokens],
            target_layers=self.target_layers,
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file; confidences are rounded to half precision."""
        tensors = {
            "expert_ids": self.expert_ids.short(),
            "target_layers": torch.tensor(self.target_layers),
        }
        if self.confidence is not None:
            tensors["confidence"] = self.confidence.half()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> PredictedExperts:
        """Read what `save` wrote, or anybody's file of the same tensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or its tensors do not fit each other.
        """
        tensors = read_tensors(path)
        missing = {"expert_ids", "target_layers"} - set(tensors)
        if missing:
            raise ValueError(
                f"{path} lacks {' and '.join(sorted(missing))}; predictions are expert_ids "
                "[tokens, layers, predictions], target_layers [layers] and, if known, confidence."
            )
        said = tensors.get("confidence")
        try:
            return cls(
                expert_ids=tensors["expert_ids"].long(),
                confidence=None if said is None else said.float(),
                target_layers=tuple(tensors["target_layers"].tolist()),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
