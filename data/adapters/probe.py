"""Watches one tiny forward pass: which modules feed every experts module, and with what."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foreroute.data.adapters.seam import routed_through

PROBE_TOKENS = 5


class Call(NamedTuple):
    """One call of one module."""

    module: nn.Module
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    output: Any


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the probe saw at one experts module; holds the tensors, so no memory is used again."""

    experts: nn.Module
    num_experts: int
    """E."""
    experts_input: Tensor
    """[T, D], or [T, latent width]."""
    expert_ids: Tensor
    """[T, K]."""
    gate_weights: Tensor
    """[T, K]."""
    router: nn.Module | None
    """The module that gave these ids, or else one logit per expert; None if there is none."""
    router_input: Tensor
    """What the router read, [T, D]; without a router, what the experts read."""
    router_logits: Tensor | None
    """[T, E]."""
    norm: nn.Module | None
    """The module that made the router's input out of a tensor of the same shape, if any."""
    residual_source: nn.Module | None
    """The module whose first argument is the residual: the norm; without one the router, or the
    module around it where that norms its input itself."""
    residual: Tensor
    """What that module read, [T, D]; without one, the router's input itself."""


@dataclass
class _Watcher:
    """Collects calls, and works out at each experts module what fed it."""

    seen: dict[nn.Module, Observed] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    _start: int = 0  # of the calls since the last experts module

    def record(self, module: nn.Module, arguments: Any, settings: Any, output: Any) -> None:
        self.calls.append(Call(module, arguments, settings, output))

    def experts_left_out(
        self, experts: nn.Module, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        router = _router_call(self.calls[self._start :], expert_ids, num_experts)
        router_input = first_tensor(router.arguments, router.settings) if router else hidden
        norm = _producer_of(router_input, self.calls)
        source = norm or router
        residual = first_tensor(source.arguments, source.settings) if source else router_input
        if router and not norm:
            router = _linear_within(router, self.calls[self._start :], num_experts)
            router_input = first_tensor(router.arguments, router.settings)
        self.seen[experts] = Observed(
            experts=experts,
            num_experts=num_experts,
            experts_input=hidden,
            expert_ids=expert_ids,
            gate_weights=gate_weights,
            router=router.module if router else None,
            router_input=router_input.flatten(0, -2),
            router_logits=router_logits_of(router.output, num_experts) if router else None,
            norm=norm.module if norm else None,
            residual_source=source.module if source else None,
            residual=residual.flatten(0, -2),
        )
        self._start = len(self.calls)
        return torch.zeros_like(hidden)


def probe(model: Any, all_experts: list[nn.Module]) -> dict[nn.Module, Observed]:
    """One forward pass over a few tokens with the experts left out (their weights are not read).

    Args:
        model: Transformers causal LM.
        all_experts: Its experts modules.

    Returns:
        What was seen, by experts module.
    """
    tokens = torch.arange(3, 3 + PROBE_TOKENS, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    with _watched(model, all_experts) as watcher, torch.no_grad():
        model.base_model(input_ids=tokens, use_cache=False)  # the head plays no part
    model.train(was_training)
    return watcher.seen


@contextlib.contextmanager
def _watched(model: Any, all_experts: list[nn.Module]) -> Iterator[_Watcher]:
    """While open, calls of the model's modules are watched and the experts left out."""
    watcher = _Watcher()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            handle = module.register_forward_hook(watcher.record, with_kwargs=True)
            stack.callback(handle.remove)
        handlers = dict.fromkeys(all_experts, watcher.experts_left_out)
        stack.enter_context(routed_through(model, handlers))
        yield watcher


def first_tensor(arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> Tensor:
    """The first tensor a module was called with: what it reads.

    Raises:
        ValueError: If it was called without tensors.
    """
    for value in (*arguments, *settings.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("The module was called without tensors.")


def router_logits_of(output: Any, num_experts: int) -> Tensor:
    """The logits in a router's output, whatever their place in its tuple.

    Args:
        output: What the router module returned.
        num_experts: E.

    Returns:
        [T, E]; entries beyond the experts (classes that stand for "no expert") are left out.

    Raises:
        ValueError: If no part of the output has one number per expert.
    """
    parts = output if isinstance(output, tuple) else (output,)
    floats = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point()]
    exact = [part for part in floats[::-1] if part.shape[-1] == num_experts]  # scores come first
    wider = [part for part in floats if part.shape[-1] == num_experts + 1]
    for part in exact + wider:
        return part.flatten(0, -2)[:, :num_experts]
    raise ValueError(f"The router gives no tensor with {num_experts} logits per token.")


def is_same_memory(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same memory, perhaps reshaped."""
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()


def _router_call(calls: list[Call], expert_ids: Tensor, num_experts: int) -> Call | None:
    """The call that returned these very ids, or else (the block routes) E logits per token."""
    for call in calls[::-1]:
        parts = call.output if isinstance(call.output, tuple) else ()
        if any(isinstance(part, Tensor) and is_same_memory(part, expert_ids) for part in parts):
            return call
    for call in calls[::-1]:
        parts = call.output if isinstance(call.output, tuple) else (call.output,)
        if any(isinstance(part, Tensor) and part.shape[-1:] == (num_experts,) for part in parts):
            return call
    return None


def _linear_within(router: Call, calls: list[Call], num_experts: int) -> Call:
    """The call of a linear map to the experts that a router makes of its own normed input, if any.

    Such a router (gemma4) gives probabilities; what it norms and what the map gives lie inside.
    """
    read = first_tensor(router.arguments, router.settings)
    for call in calls:
        if call.module is router.module or call.module not in set(router.module.modules()):
            continue
        weight = getattr(call.module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (num_experts, read.shape[-1]):
            return call
    return router


def _producer_of(tensor: Tensor, calls: list[Call]) -> Call | None:
    """The first call that returned this tensor out of another of the same shape."""
    for call in calls:
        if not isinstance(call.output, Tensor) or not is_same_memory(call.output, tensor):
            continue
        tensors = [v for v in (*call.arguments, *call.settings.values()) if isinstance(v, Tensor)]
        if tensors and tensors[0].shape == call.output.shape and tensors[0].is_floating_point():
            return call if not is_same_memory(tensors[0], call.output) else None
        return None
    return None
