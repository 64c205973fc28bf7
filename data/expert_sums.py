"""Computes experts as the model would, and adds up what each of them puts out."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foreroute.data.adapters import (
    MoELayer,
    combine,
    stock_experts_function,
    unweighted_outputs,
)
from foreroute.data.adapters.seam import ExpertsFunction

SHARED_IMPLEMENTATIONS = ("batched_mm", "grouped_mm")
"""Experts functions that apply one gate to all (token, expert) pairs at once, then project down."""
FALLBACK_IMPLEMENTATION = "grouped_mm"


class SummedExperts(Protocol):
    """One layer's experts function that keeps sums."""

    def compute(
        self, experts: nn.Module, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Compute the experts, [T, D], exactly as without sums."""

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Sum of each expert's unweighted outputs, [E, D] float32, and how many, [E] int64.

        Of the calls since the last `take`; None if there was none.
        """


class StockExperts:
    """Experts whose weights the module holds, computed by transformers."""

    def __init__(self, layer: MoELayer) -> None:
        """Take a layer's experts, whose weights are there."""
        self._layer = layer
        config: Any = layer.experts.config
        self._implementation = config._experts_implementation or "eager"
        self._function = stock_experts_function(self._implementation, layer.experts)
        self._observed = _ObservedExperts(layer.experts)
        self._activation_sum: Tensor | None = None  # [E, I]
        self._count: Tensor | None = None  # [E]

    def compute(
        self, experts: nn.Module, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Compute all of them, adding up what enters the down projection."""
        if self._implementation in SHARED_IMPLEMENTATIONS:
            output = self._function(self._observed, hidden, expert_ids, gate_weights)  # type: ignore[arg-type]
            self._add_up(expert_ids, self._implementation)
            return output
        # Other implementations do not show their activations: compute the experts a second time.
        again = stock_experts_function(FALLBACK_IMPLEMENTATION, experts)
        again(self._observed, hidden, expert_ids, gate_weights)  # type: ignore[arg-type]
        self._add_up(expert_ids, FALLBACK_IMPLEMENTATION)
        return self._function(experts, hidden, expert_ids, gate_weights)

    def _add_up(self, expert_ids: Tensor, implementation: str) -> None:
        flat = expert_ids.reshape(-1).long()  # [pairs]
        if implementation == "grouped_mm":
            flat = flat.sort().values  # its pairs lie sorted by expert
        activations = self._observed.activations.float()  # [pairs, I]
        chosen = torch.zeros(self._layer.num_experts, len(flat), device=flat.device)  # [E, pairs]
        chosen.scatter_(0, flat.unsqueeze(0), 1.0)
        activation_sum = chosen @ activations
        count = flat.bincount(minlength=self._layer.num_experts)
        if self._activation_sum is None or self._count is None:
            self._activation_sum, self._count = activation_sum, count
        else:
            self._activation_sum += activation_sum
            self._count += count

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Project the sums down; the projection is linear."""
        if self._activation_sum is None or self._count is None:
            return None
        experts: Any = self._layer.experts
        sums = []
        for expert_id, activation in enumerate(self._activation_sum):  # one at a time: small copies
            weight = experts.down_proj[expert_id].float()
            sums.append(activation @ weight if experts.is_transposed else weight @ activation)
        output_sum, count = torch.stack(sums), self._count  # [E, D], [E]
        if experts.has_bias:
            output_sum += experts.down_proj_bias.float() * count.unsqueeze(-1)
        self._activation_sum = self._count = None
        return output_sum, count


class HeldExperts:
    """Experts that another function computes already, with weights it holds elsewhere.

    That function is exact in prompts only (speculation is off there), so only those add up.
    """

    def __init__(self, layer: MoELayer, function: ExpertsFunction) -> None:
        """Take a layer's experts, and the function that computes them."""
        self._layer = layer
        self._function = function
        self._sums: tuple[Tensor, Tensor] | None = None
        self.is_prompt = True
        """Whether this pass is over a prompt; set before it begins."""

    def compute(
        self, experts: nn.Module, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Pass the call on; in prompts pair by pair, so that each output is there to be added up.

        The pairs are weighed and added as transformers' batched_mm and grouped_mm do.
        """
        if not self.is_prompt:
            return self._function(experts, hidden, expert_ids, gate_weights)
        flat = expert_ids.reshape(-1).long()  # [pairs]
        pairs = hidden.repeat_interleave(expert_ids.shape[-1], dim=0)  # [pairs, D]
        outputs = unweighted_outputs(self._function, experts, pairs, expert_ids.reshape(-1))
        sums = torch.zeros(self._layer.num_experts, outputs.shape[-1], device=flat.device)
        sums.index_add_(0, flat, outputs.float())
        count = flat.bincount(minlength=self._layer.num_experts)
        if self._sums is not None:
            sums, count = sums + self._sums[0], count + self._sums[1]
        self._sums = sums, count
        return combine(outputs, gate_weights)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The sums over prompts."""
        sums, self._sums = self._sums, None
        return sums


class _ObservedExperts:
    """Stands in for an experts module; shows what enters the down projection, else changes nothing.

    Summing before the (linear) down projection costs a fraction of summing after it.
    """

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts
        self.activations = torch.empty(0)
        """What the last call gave, [pairs, I]."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        self.activations = self._experts._apply_gate(gate_up)  # type: ignore[operator]
        return self.activations

    def act_fn(self, up: Tensor) -> Tensor:
        self.activations = self._experts.act_fn(up)  # type: ignore[operator]
        return self.activations
