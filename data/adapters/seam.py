"""The one place where an MoE's experts are reached, for every architecture transformers knows.

Transformers sends all experts modules through one registered function. While `routed_through` is
active, it is ours: it sees the router's true choice and decides how experts are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEAM_NAME = "foreroute"
HANDLER_ATTRIBUTE = "_foreroute_handler"
MARKER_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")

GROUPED_BYTES = 16
"""CUDA multiplies groups of rows only where every row is a multiple of this."""

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(experts, router_input [T, D], expert_ids [T, K], gate_weights [T, K]) -> output [T, D]."""


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers sends this module's forward through the registered experts function."""
    return all(hasattr(module, name) for name in MARKER_ATTRIBUTES)


def is_adapted(experts: nn.Module) -> bool:
    """Whether an adapter adds to the weights of this experts module while it runs."""
    return "parametrizations" in experts._modules


def stock_experts_function(name: str, experts: nn.Module) -> ExpertsFunction:
    """One of transformers' own experts functions (`eager`, `batched_mm`, `grouped_mm`)."""
    eager = type(experts).forward.__wrapped__  # type: ignore[attr-defined]
    function: ExpertsFunction = ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)
    return function


def held_function(experts: nn.Module) -> ExpertsFunction | None:
    """The function that computes these experts in the module's place now, if there is one."""
    return experts.__dict__.get(HANDLER_ATTRIBUTE)


def is_taken_over(experts: nn.Module) -> bool:
    """Whether a call of this experts module reaches one of our functions now."""
    config: Any = experts.config
    return held_function(experts) is not None and config._experts_implementation == SEAM_NAME


def _dispatch(experts: nn.Module, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    handler: ExpertsFunction = experts.__dict__[HANDLER_ATTRIBUTE]
    return handler(experts, hidden, expert_ids, weights)


ALL_EXPERTS_FUNCTIONS.register(SEAM_NAME, _dispatch)


def _own_function(experts: nn.Module) -> ExpertsFunction:
    """The function that transformers computes an experts module with now."""
    config: Any = experts.config
    return stock_experts_function(config._experts_implementation or "eager", experts)


@contextlib.contextmanager
def routed_through(model: Any, handlers: Mapping[nn.Module, ExpertsFunction]) -> Iterator[None]:
    """Compute the given experts modules by our functions; everything is put back afterwards.

    Args:
        model: A transformers model.
        handlers: By experts module, the function that computes it; any other goes on as before.
    """
    before = model.get_experts_implementation()
    functions = dict(handlers)
    for experts in filter(is_experts_module, model.modules()):
        if experts not in functions:
            functions[experts] = held_function(experts) or _own_function(experts)
    held = {experts: held_function(experts) for experts in functions}
    for experts, function in functions.items():
        experts.__dict__[HANDLER_ATTRIBUTE] = function
    try:
        model.set_experts_implementation(SEAM_NAME)
        yield
    finally:
        model.set_experts_implementation(before)
        for experts, earlier in held.items():
            experts.__dict__.pop(HANDLER_ATTRIBUTE, None)
            if earlier is not None:
                experts.__dict__[HANDLER_ATTRIBUTE] = earlier


class ExpertsView:
    """Stands in for an experts module whose weights lie elsewhere; all else is the module's own.

    Transformers' experts functions read weights and settings as attributes, so one view serves
    every architecture, with as many experts as the given weights have rows.
    """

    __slots__ = ("_experts", "_weights", "num_experts")

    def __init__(self, experts: nn.Module, weights: Mapping[str, Any]) -> None:
        """Look like the module.

        Args:
            experts: The module.
            weights: By name, [n, ...]: tensors, or what gives tensors when indexed by experts.
        """
        self._experts = experts
        self._weights = weights
        self.num_experts = next(iter(weights.values())).shape[0]

    def decoded(self, expert_ids: Tensor) -> tuple[ExpertsView, Tensor]:
        """The same with every weight a tensor, for functions that do more than index them.

        Args:
            expert_ids: Those that will be used, any shape. Where weights must be decoded, these
                experts are and no others.

        Returns:
            The view, and the ids that stand there for the given ones.
        """
        if all(isinstance(weight, Tensor) for weight in self._weights.values()):
            return self, expert_ids
        rows, ids = expert_ids.unique(return_inverse=True)
        weights = {name: weight[rows] for name, weight in self._weights.items()}
        return ExpertsView(self._experts, weights), ids

    def __getattr__(self, name: str) -> Any:
        weights = object.__getattribute__(self, "_weights")
        return weights[name] if name in weights else getattr(self._experts, name)

    @property
    def can_be_grouped(self) -> bool:
        """Whether transformers' grouped_mm takes these weights, tensors all, where they are."""
        return all(
            not weight.is_cuda or size * weight.itemsize % GROUPED_BYTES == 0
            for weight in self._weights.values()
            if weight.dim() > 2  # not biases
            for size in weight.shape[1:]
        )


def grouped_function(experts: nn.Module) -> Callable[[ExpertsView, Tensor, Tensor, Tensor], Tensor]:
    """Transformers' grouped_mm for views of these experts; its eager loop where CUDA cannot."""
    grouped, eager = (stock_experts_function(name, experts) for name in ("grouped_mm", "eager"))

    def compute(view: Any, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Tensor:
        function = grouped if view.can_be_grouped else eager
        return function(view, hidden, expert_ids, gate_weights)

    return compute


def unweighted_outputs(
    function: Callable[..., Tensor], experts: Any, hidden: Tensor, expert_ids: Tensor
) -> Tensor:
    """What each chosen expert puts out for its token, before gate weights.

    One (token, expert) pair becomes one token with top-1 routing and gate weight 1, so the stock
    functions do the same products in the same order as for the whole; `combine` completes them.

    Args:
        function: A stock experts function.
        experts: Experts module, or a view of one.
        hidden: Router input of each pair, [pairs, D].
        expert_ids: The pair's expert, [pairs].

    Returns:
        [pairs, D].
    """
    ones = torch.ones(len(expert_ids), 1, dtype=hidden.dtype, device=hidden.device)
    return function(experts, hidden, expert_ids.unsqueeze(1), ones)


def combine(outputs: Tensor, gate_weights: Tensor) -> Tensor:
    """Weigh and add the experts' outputs exactly as transformers' batched_mm and grouped_mm do.

    Args:
        outputs: Unweighted outputs, pairs in token order, [T * K, D].
        gate_weights: [T, K].

    Returns:
        [T, D] in the dtype of `outputs`.
    """
    num_tokens, top_k = gate_weights.shape
    weighted = outputs * gate_weights.reshape(-1).unsqueeze(-1)  # [T * K, D]
    return weighted.view(num_tokens, top_k, -1).sum(dim=1).to(outputs.dtype)
