"""What an engine looks ahead with: estimators, how many experts they name, attentions run early."""

from __future__ import annotations

from dataclasses import dataclass

from foreroute.estimators.stack import EstimatorStack
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.early_readout import EarlyReadouts
from foreroute.runtime.store.offload import OffloadedModel


@dataclass(frozen=True)
class LookAhead:
    """Everything a predictor needs, on the host or on a GPU."""

    stack: EstimatorStack
    """On the engine's device."""
    budget: int
    """Experts predicted per token and layer, M."""
    readouts: EarlyReadouts | None = None
    """Gives readouts; only estimators that read one need it."""

    @classmethod
    def for_engine(
        cls, offloaded: OffloadedModel, config: EngineConfig, stack: EstimatorStack | None
    ) -> LookAhead | None:
        """What this configuration asks for; None if nothing is predicted.

        Args:
            offloaded: The model.
            config: How it runs.
            stack: Estimators; if None, the training-free next router.

        Raises:
            ValueError: If the budget does not fit the model.
        """
        if not config.looks_ahead:
            return None
        geometry = offloaded.moe.geometry
        budget = config.budget or geometry.top_k
        if budget > geometry.num_experts:
            raise ValueError(
                f"budget {budget} is more than the {geometry.num_experts} experts of a layer."
            )
        if config.rule.predicted and budget < geometry.top_k:
            raise ValueError(
                f"on_miss={config.on_miss} runs {geometry.top_k} predicted experts: the budget "
                f"must be at least that, not {budget}."
            )
        if stack is None:
            stack = EstimatorStack.training_free(geometry, offloaded.moe.anchors)
        stack, readouts = stack.to(offloaded.device), None
        if "readout" in stack.input_fields:
            readouts = EarlyReadouts(offloaded.moe, stack)
        return cls(stack, budget, readouts)

    def target_of(self, source_layer: int) -> int | None:
        """Decoder layer index predicted from this one, if any."""
        target = self.stack.target_of(source_layer)
        return None if self.readouts and target in self.readouts.unread_targets else target
