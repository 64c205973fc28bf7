"""Decides which experts to load before the router asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from foreroute.estimators.calibration import uncalibrated
from foreroute.runtime.look_ahead import LookAhead


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
    """[T][budget], that the experts are needed; only where a chooser decides."""

    def chance_of_any(self) -> dict[int, float]:
        """By expert, how likely at least one of the tokens needs it."""
        misses: dict[int, float] = {}
        for row, chances in zip(self.rows, self.chances, strict=True):
            for expert, chance in zip(row, chances, strict=True):
                misses[expert] = misses.get(expert, 1.0) * (1 - chance)
        return {expert: 1 - miss for expert, miss in misses.items()}


class HostPredictor:
    """Ranks the experts of a coming layer from the state at an earlier one."""

    def __init__(self, ahead: LookAhead) -> None:
        """Use these estimators.

        Args:
            ahead: Estimators, on the engine's device, and what they need.
        """
        self.ahead = ahead

    def probabilities(self, source_layer: int, logits: Tensor) -> Tensor:
        """How likely each expert is among the target layer's top K; no host sync.

        Args:
            source_layer: What `predict` was asked for.
            logits: What `predict` returned, [T, E].

        Returns:
            [T, E], float32, 0..1, never falling along the ranking. Without a calibration the
            sigmoid of the decision margin: an order, but no share of what comes true.
        """
        stack = self.ahead.stack
        if stack.calibration is None:
            return uncalibrated(stack.ranking(logits, source_layer), stack.geometry.top_k)
        return stack.probabilities(logits, source_layer)

    def predict(
        self,
        source_layer: int,
        *,
        residual: Tensor | None = None,
        router_input: Tensor | None = None,
        expert_ids: Tensor | None = None,
        gate_weights: Tensor | None = None,
        layer_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rank the target layer's experts; runs its attention early where estimators read that.

        Args:
            source_layer: Decoder layer index the tensors come from.
            residual: [T, D]; see `SourceState` for all of them.
            router_input: [T, D].
            expert_ids: [T, K].
            gate_weights: [T, K].
            layer_input: [T, D].

        Returns:
            Router logits as predicted, [T, E], and the budget's best experts, [T, budget], most
            likely first; both on the device.
        """
        readout = None
        if self.ahead.readouts is not None and residual is not None:
            assert expert_ids is not None  # they come with the residual
            assert gate_weights is not None
            readout = self.ahead.readouts.read(
                source_layer, residual=residual, expert_ids=expert_ids, gate_weights=gate_weights
            )
        logits = self.ahead.stack.predict(
            source_layer,
            residual=residual,
            router_input=router_input,
            expert_ids=expert_ids,
            gate_weights=gate_weights,
            readout=readout,
            layer_input=layer_input,
        )
        ranking = self.ahead.stack.ranking(logits, source_layer)
        return logits, ranking.topk(self.ahead.budget, dim=-1).indices


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
