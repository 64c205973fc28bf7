"""Computes experts that few prompts need straight from host memory: no slots, no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from foreroute.data.adapters import ExpertsView, grouped_function, stock_experts_function


class FromHost:
    """The function in the place of experts that only images reach, in prompts."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        """Compute with these weights.

        Args:
            weights: By name, [E, ...] in host memory: tensors, or what gives tensors when indexed
                by experts.
        """
        self._weights = weights

    def __call__(
        self, experts: nn.Module, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Copy the experts that are needed to where the tokens are, and compute them.

        Args:
            experts: The module.
            router_input: [T, D].
            expert_ids: [T, K].
            gate_weights: [T, K].

        Returns:
            [T, D].
        """
        device = router_input.device
        needed, rows = expert_ids.unique(return_inverse=True)
        on_host = needed.cpu()
        weights = {name: whole[on_host].to(device) for name, whole in self._weights.items()}
        # on a CPU as batched_mm does it, bit for bit; on a GPU without a copy for each token
        is_cpu = device.type == "cpu"
        function = (
            stock_experts_function("batched_mm", experts) if is_cpu else grouped_function(experts)
        )
        view: Any = ExpertsView(experts, weights)
        return function(view, router_input, rows, gate_weights)
