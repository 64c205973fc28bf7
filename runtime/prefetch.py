"""Decides which experts to load before the router asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from foreroute.estimators.calibration import uncalibrated
from foreroute.estimators.stack import EstimatorStack

KNOWN_FIELDS = ("residual", "router_input", "expert_ids", "gate_weights")
"""Fields of `SourceState` that the runtime has at hand when it predicts."""


@dataclass(frozen=True)
class Prediction:
    """What was expected of a layer before it ran."""

    expert_ids: Tensor
    """[T, budget], most likely first, on the device."""
    rows: list[list[int]]
    """The same on the host."""
    router_logits: Tensor
    """[T, E], as predicted."""
    chances: list[list[float]] = field(default_factory=list)
    """[T][budget], that the experts are needed; only where a budget decides."""

    def chance_of_any(self) -> dict[int, float]:
        """By expert, how likely at least one of the tokens needs it."""
        misses: dict[int, float] = {}
        for row, chances in zip(self.rows, self.chances, strict=True):
            for expert, chance in zip(row, chances, strict=True):
                misses[expert] = misses.get(expert, 1.0) * (1 - chance)
        return {expert: 1 - miss for expert, miss in misses.items()}


class Prefetcher:
    """Ranks the experts of a coming layer from the state at an earlier one."""

    def __init__(self, stack: EstimatorStack, budget: int) -> None:
        """Use these estimators.

        Args:
            stack: Estimators, on the engine's device.
            budget: Experts per token and layer.

        Raises:
            ValueError: If they read what the runtime does not hand them.
        """
        unknown = [name for name in stack.input_fields if name not in KNOWN_FIELDS]
        if unknown:
            raise ValueError(
                f"These estimators read {', '.join(unknown)}, which the runtime does not compute; "
                f"it hands them {', '.join(KNOWN_FIELDS)}. Export runs of another --input."
            )
        self.stack = stack
        self.budget = budget

    def target_of(self, source_layer: int) -> int | None:
        """Decoder layer index predicted from this one, if any."""
        return self.stack.target_of(source_layer)

    @property
    def is_calibrated(self) -> bool:
        """Whether probabilities were fitted; only those of a bundle are."""
        return self.stack.calibration is not None

    def probabilities(self, source_layer: int, logits: Tensor) -> Tensor:
        """How likely each expert is among the target layer's top K; no host sync.

        Args:
            source_layer: What `predict` was asked for.
            logits: What `predict` returned, [T, E].

        Returns:
            [T, E], float32, 0..1, never falling along the ranking. Without a calibration the
            sigmoid of the decision margin: an order, but no share of what comes true.
        """
        stack = self.stack
        if stack.calibration is None:
            return uncalibrated(stack.ranking(logits, source_layer), stack.geometry.top_k)
        return stack.probabilities(logits, source_layer)

    def predict(
        self,
        source_layer: int,
        *,
        residual: Tensor,
        router_input: Tensor,
        expert_ids: Tensor,
        gate_weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rank the target layer's experts.

        Returns:
            Router logits as predicted, [T, E], and the budget's best experts, [T, budget], most
            likely first; both on the device.
        """
        logits = self.stack.predict(
            source_layer,
            residual=residual,
            router_input=router_input,
            expert_ids=expert_ids,
            gate_weights=gate_weights,
        )
        ranking = self.stack.ranking(logits, source_layer)
        return logits, ranking.topk(self.budget, dim=-1).indices


def most_wanted(ranked: list[list[int]], limit: int) -> list[int]:
    """Distinct experts of a batch, every token's best guess first.

    Args:
        ranked: [T][budget], most likely first.
        limit: Keep at most so many.
    """
    return distinct(expert for rank in zip(*ranked, strict=True) for expert in rank)[:limit]


def distinct(expert_ids: Iterable[int]) -> list[int]:
    """Each expert once, in order of first appearance."""
    return list(dict.fromkeys(expert_ids))
