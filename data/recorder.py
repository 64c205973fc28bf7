"""Records what every MoE layer sees and decides during a forward pass, without changing it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
)
from foreroute.data.adapters.early_attention import EarlyAttention, decoder_layer, split_input
from foreroute.data.adapters.seam import held_function
from foreroute.data.expert_sums import HeldExperts, StockExperts, SummedExperts
from foreroute.estimators.inputs import expected_output
from foreroute.estimators.types import RoutingRecord

REQUIRED_FIELDS = ("residual", "router_input", "router_logits", "expert_ids", "gate_weights")


@dataclass(frozen=True, kw_only=True)
class EarlyReadout:
    """What the field `readout` needs: every layer's state goes through the next one's attention."""

    sites: Mapping[int, EarlyAttention]
    """By decoder layer index, of every MoE layer but the first."""
    vectors: Tensor
    """Default vectors that stand for the experts' outputs, [L, E, D], float32."""


class RoutingRecorder:
    """Context manager: while it is open, every forward pass of the model is recorded.

    The experts are computed by the model's own implementation on the model's own tensors, so the
    outputs stay bit-equal. Afterwards no hook remains, also after an exception.

    Example:
        >>> with RoutingRecorder(moe) as recorder, torch.no_grad():
        ...     moe.model(input_ids=token_ids)
        ...     records = recorder.take()
    """

    def __init__(
        self,
        moe: MoEModel,
        states_dtype: torch.dtype | None = None,
        *,
        with_layer_input: bool = False,
        readout: EarlyReadout | None = None,
    ) -> None:
        """Prepare to record.

        Args:
            moe: The model. Where an engine computes its experts, it goes on doing so; sums are then
                of prompts only, where it is exact.
            states_dtype: Dtype of states in the records; the model's if None.
            with_layer_input: Whether records have `layer_input`.
            readout: What `readout` needs; records do not have it if None.
        """
        self._moe = moe
        self._states_dtype = states_dtype
        self._with_layer_input = with_layer_input
        self._readout = readout
        self._cleanup = contextlib.ExitStack()
        self._layers: list[_LayerRecorder] = []

    def __enter__(self) -> RoutingRecorder:
        """Put the hooks on."""
        self._layers = [_LayerRecorder(layer, self._states_dtype) for layer in self._moe.layers]
        with contextlib.ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            handlers = {layer.handle.experts: layer.compute for layer in self._layers}
            stack.enter_context(routed_through(self._moe.model, handlers))
            self._cleanup = stack.pop_all()
        return self

    def _hooks(self) -> Iterator[Any]:
        for layer in self._layers:
            yield from layer.hooks()
            if self._with_layer_input:
                yield layer.hook_input(decoder_layer(self._moe, layer.handle))
        if self._readout is not None:
            for layer, after in itertools.pairwise(self._layers):
                position = self._moe.geometry.position(layer.handle.layer_idx)
                site = self._readout.sites[after.handle.layer_idx]
                yield layer.hook_next_attention(site, self._readout.vectors[position])
        held = [layer.experts for layer in self._layers if isinstance(layer.experts, HeldExperts)]
        if held:

            def see(_: nn.Module, arguments: Any, settings: Any) -> None:
                for experts in held:
                    experts.is_prompt = first_tensor(arguments, settings).shape[1] > 1

            yield self._moe.model.register_forward_pre_hook(see, with_kwargs=True)

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


class _LayerRecorder:
    """Collects one MoE layer's routing."""

    def __init__(self, handle: MoELayer, states_dtype: torch.dtype | None) -> None:
        self.handle = handle
        held = held_function(handle.experts)
        self.experts: SummedExperts = HeldExperts(handle, held) if held else StockExperts(handle)
        self._states_dtype = states_dtype
        self._seen: dict[str, Tensor] = {}
        self._expected: set[str] = set(REQUIRED_FIELDS)
        self._residual: Tensor | None = None  # [T, D] as the model has it; only for the readout

    def hooks(self) -> list[Any]:
        """Register the hooks on the norm and the router."""
        return [
            self.handle.residual_source.register_forward_pre_hook(
                self._see_residual, with_kwargs=True
            ),
            self.handle.router.register_forward_hook(self._see_router, with_kwargs=True),
        ]

    def hook_input(self, decoder: nn.Module) -> Any:
        """Record what enters the decoder layer."""

        def see(_: nn.Module, arguments: Any, settings: Any) -> None:
            self._keep("layer_input", first_tensor(arguments, settings), self._states_dtype)

        self._expected.add("layer_input")
        return decoder.register_forward_pre_hook(see, with_kwargs=True)

    def hook_next_attention(self, site: EarlyAttention, vectors: Tensor) -> Any:
        """Record what the next MoE layer's attention makes of this layer's state.

        Args:
            site: The next MoE layer's.
            vectors: This layer's default vectors, [E, D], float32.
        """

        def see(_: nn.Module, arguments: Any, settings: Any) -> None:
            true_input, rest = split_input(arguments, settings)
            assert self._residual is not None  # its norm ran before
            ids, weights = self._seen["expert_ids"], self._seen["gate_weights"]
            added = expected_output(ids[None], weights[None], vectors[None])[0]  # [T, D]
            residual = (self._residual + added).to(true_input.dtype).view(true_input.shape)
            self._keep("readout", site.run(residual, true_input, rest), self._states_dtype)
            self._residual = None

        self._expected.add("readout")
        return site.attention.register_forward_pre_hook(see, with_kwargs=True)

    def _see_residual(self, _: nn.Module, arguments: Any, settings: Any) -> None:
        residual = first_tensor(arguments, settings)
        self._keep("residual", residual, self._states_dtype)
        if "readout" in self._expected:
            self._residual = residual.detach().flatten(0, -2).clone()

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
        return self.experts.compute(experts, hidden, expert_ids, gate_weights)

    def take(self) -> RoutingRecord:
        """The record of the last forward pass."""
        seen, self._seen = self._seen, {}
        if self._expected - set(seen):
            raise RuntimeError(
                f"No forward pass went through {self.handle.name} since the last record was taken."
            )
        return RoutingRecord(**seen)

    def take_expert_sums(self) -> tuple[Tensor, Tensor]:
        """Sum of unweighted outputs and count per expert since the last call."""
        sums = self.experts.take()
        if sums is None:
            raise RuntimeError(f"No forward pass went through {self.handle.name}.")
        output_sum, count = sums
        if self.handle.to_hidden is not None:  # a bias of the map is added once, not per expert
            output_sum = output_sum @ self.handle.to_hidden.weight.float().T  # type: ignore[operator]
        return output_sum, count
