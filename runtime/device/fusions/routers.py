"""Replaces what follows a softmax router's product by one kernel, where the results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.runtime.device.kernels.top_k import softmax_top_k, softmax_top_k_reference

SAMPLE_TOKENS = 8


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


def _fused(router: Any, form: _RouterForm) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def forward(hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits = _logits(router, hidden_states)
        weights, ids = softmax_top_k(
            logits, form.top_k, renormalise=form.renormalise, dtype=form.weights_dtype
        )
        results = {"logits": logits, "weights": weights, "ids": ids}
        return tuple(results[name] for name in form.order)

    return forward
