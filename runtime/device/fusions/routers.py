"""Replaces what follows a softmax router's product by one kernel, where the results agree."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.runtime.device.fusions.deferred import Deferred, Known, Source, settled
from foreroute.runtime.device.fusions.normed import Normed
from foreroute.runtime.device.kernels.linear import can_multiply
from foreroute.runtime.device.kernels.route import DemandPlan, RouterProduct, route
from foreroute.runtime.device.kernels.top_k import softmax_top_k, softmax_top_k_reference

SAMPLE_TOKENS = 8
NOT_THREE = "it does not return logits, gate weights and ids"
RESULTS = ("logits", "gate_weights", "expert_ids")
"""The fields of `Choice` that a router returns."""


@dataclass(frozen=True, kw_only=True)
class FoundRouter:
    """A router that the kernels can stand in for."""

    module: nn.Module
    order: tuple[str, ...]
    """`logits`, `gate_weights` and `expert_ids` as it returns them."""
    product: RouterProduct
    """Its weights; read by captured graphs, so it must live as long as they do."""


def find_routers(routers: Iterable[nn.Module]) -> list[FoundRouter]:
    """Every router whose own output softmax and top-k of a product reproduce.

    Args:
        routers: Modules that take [.., D] and return logits, gate weights and ids in some order.
    """
    found = (router_or_reason(router) for router in routers)
    return [router for router in found if isinstance(router, FoundRouter)]


def fuse_routers(routers: Iterable[FoundRouter], undo: ExitStack) -> None:
    """Fuse softmax and top-k, and what is deferred before them.

    Args:
        routers: Their modules get another forward.
        undo: Gets the callbacks that put the original forwards back.
    """
    for router in routers:
        router.module.forward = partial(_forward, router)
        undo.callback(router.module.__dict__.pop, "forward")


def _logits(router: Any, hidden: Tensor) -> Tensor:
    weight = router.weight
    return nn.functional.linear(
        hidden.reshape(-1, weight.shape[1]), weight, getattr(router, "bias", None)
    )


@torch.no_grad()
def router_or_reason(router: Any) -> FoundRouter | str:
    """How a router's results follow from its logits, or why that is not known, in a few words."""
    parameters = dict(router.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 2 or not set(parameters) <= {"weight", "bias"}:
        return "it has more parameters than a matrix and a bias"
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SAMPLE_TOKENS, weight.shape[1], generator=generator).to(weight)
    try:
        outputs = router(sample)
    except (TypeError, RuntimeError):
        return "it takes more than the states"
    if not isinstance(outputs, tuple) or not all(isinstance(o, Tensor) for o in outputs):
        return NOT_THREE
    logits = _logits(router, sample)
    ids = next((o for o in outputs if not o.is_floating_point()), None)
    if ids is None or len(outputs) != 3 or ids.shape[0] != SAMPLE_TOKENS:
        return NOT_THREE
    top_k = ids.shape[1]
    for renormalise in (True, False):
        weights, expected_ids = softmax_top_k_reference(logits, top_k, renormalise=renormalise)
        expected = dict(zip(RESULTS, (logits, weights, expected_ids), strict=True))
        order = tuple(_name_of(output, expected) for output in outputs)
        if set(order) == set(expected):
            product = RouterProduct(
                weight=router.weight,
                bias=getattr(router, "bias", None),
                top_k=top_k,
                renormalise=renormalise,
                dtype=outputs[order.index("gate_weights")].dtype,
                arrivals=torch.zeros(1, dtype=torch.int32, device=weight.device),
            )
            return FoundRouter(module=router, order=order, product=product)
    return "it does not choose by softmax and top-k alone"


def _name_of(output: Tensor, expected: dict[str, Tensor]) -> str:
    """Which of the expected results an output is; empty if none."""
    for name, tensor in expected.items():
        if output.shape != tensor.shape:
            continue
        if name == "expert_ids" and torch.equal(output.long(), tensor):
            return name
        if name != "expert_ids" and output.is_floating_point():
            tolerance = 4 * torch.finfo(tensor.dtype).eps
            if torch.allclose(output.float(), tensor.float(), atol=tolerance, rtol=tolerance):
                return name
    return ""


class Routing:
    """One router's results for a few tokens, from one launch."""

    def __init__(self, source: Normed | Known, router: RouterProduct) -> None:
        """Defer it.

        Args:
            source: The router's input, [T, D].
            router: Its product, and what follows.
        """
        self.source, self.router, self.counts = source, router, source.counts
        self.results = {name: Routed(self, name) for name in RESULTS}
        self.chosen: Tensor | None = None
        """The router's own experts, [T, K], once it ran; a rule on a miss may run others."""

    def run(self, demand: DemandPlan | None = None) -> None:
        """Launch it, and plan for its choice if that is given."""
        source, norm = self.source, None
        if isinstance(source, Normed) and source.is_pending:
            norm, state = source.norm, source.before.state
        else:
            state = source.value()
        choice = route(state, self.router, norm, demand)
        if norm is not None:
            source.settle(choice.router_input)
        for name, result in self.results.items():
            result.settle(getattr(choice, name))
        self.chosen = choice.chosen
        self.counts["routers with their top-k"] += 1
        self.counts["norms in routers"] += norm is not None
        self.counts["plans in routers"] += demand is not None


class Routed(Source):
    """One of a router's results."""

    def __init__(self, routing: Routing, name: str) -> None:
        """Defer it.

        Args:
            routing: Of all of them.
            name: One of `RESULTS`.
        """
        self.routing, self.name, self.counts = routing, name, routing.counts

    def compute(self) -> Tensor:
        """[T, E] logits, or [T, K]."""
        self.routing.run()
        return self.value()


def _deferred(hidden: Any, router: RouterProduct) -> dict[str, Tensor] | None:
    """The router's results, left to the experts; None where its input is not deferred."""
    source = hidden.source if isinstance(hidden, Deferred) else None
    if not isinstance(source, Normed | Known):
        return None
    state = source.before.state if isinstance(source, Normed) else source.state
    if not can_multiply(state, router.weight, router.bias):
        return None
    routing, device = Routing(source, router), router.weight.device
    num_tokens, num_experts = len(state), len(router.weight)
    kinds = ((num_experts, state.dtype), (router.top_k, router.dtype), (router.top_k, torch.int64))
    return {
        name: Deferred(routing.results[name], (num_tokens, size), dtype, device)
        for name, (size, dtype) in zip(RESULTS, kinds, strict=True)
    }


def _forward(found: FoundRouter, hidden_states: Tensor) -> tuple[Tensor, ...]:
    results = _deferred(hidden_states, found.product)
    if results is None:
        logits, product = _logits(found.module, settled(hidden_states)), found.product
        weights, ids = softmax_top_k(
            logits, product.top_k, renormalise=product.renormalise, dtype=product.dtype
        )
        results = dict(zip(RESULTS, (logits, weights, ids), strict=True))
    return tuple(results[name] for name in found.order)
