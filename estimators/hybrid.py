"""Estimators whose pairs come from several stacks: per layer, the one that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from foreroute.estimators.inputs import SourceState
from foreroute.estimators.stack import EstimatorStack


class HybridStack(EstimatorStack):
    """Predicts each pair by one of several stacks of the same pairs.

    Its `spec` is the first stack's; the others may read another input or have another form.
    """

    def __init__(self, stacks: Sequence[EstimatorStack], stack_of: Sequence[int]) -> None:
        """Put the stacks side by side.

        Args:
            stacks: Of the same geometry, horizon and target layers.
            stack_of: Which of them predicts each pair, [P].

        Raises:
            ValueError: If the stacks' pairs differ, or a pair has no stack.
        """
        nn.Module.__init__(self)
        first = stacks[0]
        for other in stacks:
            ours, theirs = ((s.geometry, s.source_layers, s.target_layers) for s in (first, other))
            if ours != theirs:
                raise ValueError(
                    f"Expected stacks of the same model and layers, got sources "
                    f"{list(first.source_layers)} and {list(other.source_layers)}."
                )
        num_pairs = len(first.target_layers)
        if len(stack_of) != num_pairs or not set(stack_of) <= set(range(len(stacks))):
            raise ValueError(
                f"Expected one of {len(stacks)} stacks for each of {num_pairs} pairs, got "
                f"{list(stack_of)}."
            )
        self.geometry, self.spec = first.geometry, first.spec
        self.source_layers, self.target_layers = first.source_layers, first.target_layers
        self._pair_of = {source: pair for pair, source in enumerate(self.source_layers)}
        self.stacks, self.stack_of = nn.ModuleList(stacks), tuple(stack_of)
        self.is_trained = tuple(stacks[at].is_trained[pair] for pair, at in enumerate(stack_of))
        self.calibration = None

    @property
    def parts(self) -> tuple[EstimatorStack, ...]:
        """The stacks it is made of."""
        return tuple(cast(EstimatorStack, stack) for stack in self.stacks)

    @property
    def part_of_pairs(self) -> tuple[int, ...]:
        """Which of its parts predicts each pair, [P]."""
        return self.stack_of

    @property
    def input_fields(self) -> tuple[str, ...]:
        """Fields of `SourceState` that any of the pairs reads, each once."""
        used = (self.parts[at].input_fields for at in sorted(set(self.stack_of)))
        return tuple(dict.fromkeys(name for names in used for name in names))

    def with_trained(self, is_trained: Sequence[bool]) -> EstimatorStack:
        """The same estimators (tensors are shared) with the form used for other pairs."""
        other = HybridStack([part.with_trained(is_trained) for part in self.parts], self.stack_of)
        other.calibration = self.calibration
        return other

    def ranking(self, logits: Tensor, source_layer: int | None = None) -> Tensor:
        """See `EstimatorStack.ranking`; a selection bias is the model's, so any stack will do."""
        return self.parts[0].ranking(logits, source_layer)

    def _logits(self, source: SourceState, pairs: slice) -> Tensor:
        used = self.stack_of[pairs]
        if len(set(used)) == 1:
            return self.parts[used[0]]._logits(source, pairs)
        logits = {at: self.parts[at]._logits(source, pairs) for at in set(used)}
        return torch.stack([logits[at][pair] for pair, at in enumerate(used)])
