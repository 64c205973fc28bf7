"""Replaces what follows a softmax router's product by one kernel, where the results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.runtime.device.fusions.deferred import Deferred, Known, Source, settled
from foreroute.runtime.device.fusions.projections import Normed
from foreroute.runtime.device.kernels.linear import can_multiply
from foreroute.runtime.device.kernels.route import DemandPlan, RouterProduct, route
from foreroute.runtime.device.kernels.top_k import softmax_top_k, softmax_top_k_reference

SAMPLE_TOKENS = 8
RESULTS = ("logits", "gate_weights", "expert_ids")
"""Of `Choice`."""


@dataclass(frozen=True, kw_only=True)
class _RouterForm:
    """What a router returns, in which order."""

    order: tuple[str, ...]
    """`logits`, `weights` and `ids` as they are returned."""
    top_k: int
    renormalise: bool
    weights_dtype: torch.dtype


def fuse_routers(routers: Iterable[nn.Module], undo: ExitStack) -> int:
    """Fuse softmax and top-k of every router whose own output the fused one reproduces.

    Args:
        routers: Modules that take [.., D] and return logits, gate weights and ids in some order.
        undo: Gets the callbacks that put the original forwards back.

    Returns:
        How many routers were fused.
    """
    num_fused = 0
    for router in routers:
        form = _find_form(router)
        if form is not None:
            router.forward = _fused(router, form)
            undo.callback(router.__dict__.pop, "forward")
            num_fused += 1
    return num_fused


def _logits(router: Any, hidden: Tensor) -> Tensor:
    weight = router.weight
    return nn.functional.linear(
        hidden.reshape(-1, weight.shape[1]), weight, getattr(router, "bias", None)
    )


@torch.no_grad()
def _find_form(router: Any) -> _RouterForm | None:
    """How the router's results follow from its logits; None if not by softmax and top-k."""
    parameters = dict(router.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 2 or not set(parameters) <= {"weight", "bias"}:
        return None
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SAMPLE_TOKENS, weight.shape[1], generator=generator).to(weight)
    try:
        outputs = router(sample)
    except (TypeError, RuntimeError):  # a router that takes more than the states
        return None
    if not isinstance(outputs, tuple) or not all(isinstance(o, Tensor) for o in outputs):
        return None
    logits = _logits(router, sample)
    ids = next((o for o in outputs if not o.is_floating_point()), None)
    if ids is None or len(outputs) != 3 or ids.shape[0] != SAMPLE_TOKENS:
        return None
    top_k = ids.shape[1]
    for renormalise in (True, False):
        weights, expected_ids = softmax_top_k_reference(logits, top_k, renormalise=renormalise)
        expected = {"logits": logits, "weights": weights, "ids": expected_ids}
        order = tuple(_name_of(output, expected) for output in outputs)
        if set(order) == set(expected):
            dtype = outputs[order.index("weights")].dtype
            return _RouterForm(
                order=order, top_k=top_k, renormalise=renormalise, weights_dtype=dtype
            )
    return None


def _name_of(output: Tensor, expected: dict[str, Tensor]) -> str:
    """Which of the expected results an output is; empty if none."""
    for name, tensor in expected.items():
        if output.shape != tensor.shape:
            continue
        if name == "ids" and torch.equal(output.long(), tensor):
            return name
        if name != "ids" and output.is_floating_point():
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
    (num_tokens, _), (num_experts, _) = state.shape, router.weight.shape
    chosen = (num_tokens, router.top_k)
    return {
        "logits": Deferred(
            routing.results["logits"], (num_tokens, num_experts), state.dtype, device
        ),
        "weights": Deferred(routing.results["gate_weights"], chosen, router.dtype, device),
        "ids": Deferred(routing.results["expert_ids"], chosen, torch.int64, device),
    }


def _fused(router: Any, form: _RouterForm) -> Callable[[Tensor], tuple[Tensor, ...]]:
    product = RouterProduct(
        weight=router.weight,
        bias=getattr(router, "bias", None),
        top_k=form.top_k,
        renormalise=form.renormalise,
        dtype=form.weights_dtype,
        arrivals=torch.zeros(1, dtype=torch.int32, device=router.weight.device),
    )

    def forward(hidden_states: Tensor) -> tuple[Tensor, ...]:
        deferred = _deferred(hidden_states, product)
        if deferred is not None:
            return tuple(deferred[name] for name in form.order)
        hidden_states = settled(hidden_states)
        logits = _logits(router, hidden_states)
        weights, ids = softmax_top_k(
            logits, form.top_k, renormalise=form.renormalise, dtype=form.weights_dtype
        )
        results = {"logits": logits, "weights": weights, "ids": ids}
        return tuple(results[name] for name in form.order)

    return forward
