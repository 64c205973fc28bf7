"""Records what every MoE layer sees and decides during a forward pass, without changing it."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters import (
    MoELayer,
    MoEModel,
    first_tensor,
    routed_through,
    router_logits_of,
    stock_experts_function,
)
from foreroute.estimators.types import RoutingRecord

SHARED_IMPLEMENTATIONS = ("batched_mm", "grouped_mm")
"""Experts functions that apply one gate to all (token, expert) pairs at once, then project down."""
FALLBACK_IMPLEMENTATION = "grouped_mm"


class RoutingRecorder:
    """Context manager: while it is open, every forward pass of the model is recorded.

    The experts are computed by the model's own implementation on the model's own tensors, so the
    outputs stay bit-equal. Afterwards no hook remains, also after an exception.

    Example:
        >>> with RoutingRecorder(moe) as recorder, torch.no_grad():
        ...     moe.model(input_ids=token_ids)
        ...     records = recorder.take()
    """

    def __init__(self, moe: MoEModel, states_dtype: torch.dtype | None = None) -> None:
        """Prepare to record.

        Args:
            moe: The model.
            states_dtype: Dtype of residual and router_input in the records; the model's if None.
        """
        self._moe = moe
        self._states_dtype = states_dtype
        self._cleanup = contextlib.ExitStack()
        self._layers: list[_LayerRecorder] = []

    def __enter__(self) -> RoutingRecorder:
        """Put the hooks on."""
        self._layers = [_LayerRecorder(layer, self._states_dtype) for layer in self._moe.layers]
        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                for handle in layer.hooks():
                    stack.callback(handle.remove)
            handlers = {layer.handle.experts: layer.compute for layer in self._layers}
            stack.enter_context(routed_through(self._moe.model, handlers))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off."""
        self._cleanup.close()

    def take(self) -> dict[int, RoutingRecord]:
        """The records of the last forward pass, on the model's device.

        Returns:
            By decoder layer index; rows in the order of the flattened [batch, tokens] input.

        Raises:
            RuntimeError: If no forward pass went through a layer since the last call.
        """
        return {layer.handle.layer_idx: layer.take() for layer in self._layers}

    def take_expert_sums(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Sums over all forward passes since the last call, from which default vectors are made.

        Returns:
            By decoder layer index: the sum of each expert's unweighted outputs over the tokens that
            chose it, [E, D], float32; how many tokens did, [E], int64.
        """
        return {layer.handle.layer_idx: layer.take_expert_sums() for layer in self._layers}


class _ObservedExperts:
    """Stands in for an experts module; shows what enters the down projection, else changes nothing.

    Summing before the (linear) down projection costs a fraction of summing after it.
    """

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts
        self.activations = torch.empty(0)
        """Of the last call, [pairs, I]."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        self.activations = self._experts._apply_gate(gate_up)  # type: ignore[operator]
        return self.activations

    def act_fn(self, up: Tensor) -> Tensor:
        self.activations = self._experts.act_fn(up)  # type: ignore[operator]
        return self.activations


class _LayerRecorder:
    """Collects one MoE layer's routing."""

    def __init__(self, handle: MoELayer, states_dtype: torch.dtype | None) -> None:
        self.handle = handle
        self._states_dtype = states_dtype
        config: Any = handle.experts.config
        self._implementation = config._experts_implementation or "eager"
        self._function = stock_experts_function(self._implementation, handle.experts)
        self._observed = _ObservedExperts(handle.experts)
        self._seen: dict[str, Tensor] = {}
        self._activation_sum: Tensor | None = None  # [E, I]
        self._count: Tensor | None = None  # [E]

    def hooks(self) -> list[Any]:
        """Register the hooks on the norm and the router."""
        return [
            self.handle.residual_source.register_forward_pre_hook(
                self._see_residual, with_kwargs=True
            ),
            self.handle.router.register_forward_hook(self._see_router, with_kwargs=True),
        ]

    def _see_residual(self, _: nn.Module, arguments: Any, settings: Any) -> None:
        self._keep("residual", first_tensor(arguments, settings), self._states_dtype)

    def _see_router(self, _: nn.Module, arguments: Any, settings: Any, output: Any) -> None:
        self._keep("router_input", first_tensor(arguments, settings), self._states_dtype)
        self._keep("router_logits", router_logits_of(output, self.handle.num_experts))

    def _keep(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        # A copy: the model may change its own tensor in place later in the pass.
        rows = tensor.detach().flatten(0, -2)
        self._seen[name] = rows.to(dtype or tensor.dtype, copy=True)

    def compute(
        self, experts: nn.Module, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Compute the experts as the model would, keeping what came in."""
        self._keep("expert_ids", expert_ids)
        self._keep("gate_weights", gate_weights)
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
        num_experts = int(self.handle.experts.num_experts)  # type: ignore[arg-type]
        activations = self._observed.activations.float()  # [pairs, I]
        chosen = torch.zeros(num_experts, len(flat), device=flat.device)  # [E, pairs]
        chosen.scatter_(0, flat.unsqueeze(0), 1.0)
        activation_sum, count = chosen @ activations, flat.bincount(minlength=num_experts)
        if self._activation_sum is None or self._count is None:
            self._activation_sum, self._count = activation_sum, count
        else:
            self._activation_sum += activation_sum
            self._count += count

    def take(self) -> RoutingRecord:
        """The record of the last forward pass."""
        seen, self._seen = self._seen, {}
        if len(seen) < 5:
            raise RuntimeError(
                f"No forward pass went through {self.handle.name} since the last record was taken."
            )
        return RoutingRecord(**seen)

    def take_expert_sums(self) -> tuple[Tensor, Tensor]:
        """Sum of unweighted outputs and count per expert since the last call."""
        experts: Any = self.handle.experts
        if self._activation_sum is None or self._count is None:
            raise RuntimeError(f"No forward pass went through {self.handle.name}.")
        sums = []
        for expert_id, activation in enumerate(self._activation_sum):  # one at a time: small copies
            weight = experts.down_proj[expert_id].float()
            sums.append(activation @ weight if experts.is_transposed else weight @ activation)
        output_sum, count = torch.stack(sums), self._count  # [E, D], [E]
        if experts.has_bias:
            output_sum += experts.down_proj_bias.float() * count.unsqueeze(-1)
        if self.handle.to_hidden is not None:  # a bias of the map is added once, not per expert
            output_sum = output_sum @ self.handle.to_hidden.weight.float().T  # type: ignore[operator]
        self._activation_sum = self._count = None
        return output_sum, count
