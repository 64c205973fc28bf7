"""Lets a model's norms wait for the launches that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from foreroute.runtime.device.fusions.deferred import Deferred, Known, Source, settled
from foreroute.runtime.device.fusions.normed import Normed
from foreroute.runtime.device.fusions.projections import Product
from foreroute.runtime.device.kernels.linear import MOST_TOKENS
from foreroute.runtime.device.kernels.norm import Norm, normed_reference


class ProductNorm(Source):
    """A norm of a product's results, or of each head of them; other products may still join it."""

    def __init__(self, product: Product, norm: Norm) -> None:
        """Defer it."""
        self.product, self.norm, self.counts = product, norm, product.counts

    def compute(self) -> Tensor:
        """The normed results, [.., D] with what is normed last."""
        heads = self.product.value().view(-1, len(self.norm.factor))
        return normed_reference(heads, self.norm)


def defer_norms(
    norms: Sequence[tuple[nn.Module, Norm]], undo: ExitStack, counts: Counter[str]
) -> None:
    """Let norms of few tokens' states be taken by what reads them.

    Args:
        norms: As `find_norms` gives them.
        undo: Gets the callbacks that put the forwards back that are there now.
        counts: See `Source`.
    """
    for module, norm in norms:
        before = module.__dict__.get("forward")
        module.forward = _deferring(module.forward, norm, counts)
        undo.callback(_put_back, module, before)


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward")
    else:
        module.forward = forward


def _deferring(
    forward: Callable[[Tensor], Tensor], norm: Norm, counts: Counter[str]
) -> Callable[[Tensor], Tensor]:
    def deferred(hidden_states: Tensor) -> Tensor:
        x, depth = hidden_states, len(norm.factor)
        source = x.source if isinstance(x, Deferred) else None
        is_known = x.shape[-1] == depth and x.dtype == norm.factor.dtype
        if isinstance(source, Product) and source.is_pending and is_known:
            return Deferred(ProductNorm(source, norm), x.shape, x.dtype, x.device)
        if x.numel() > MOST_TOKENS * depth or not is_known:
            return forward(settled(x))
        state = Known(settled(x).reshape(-1, depth).contiguous(), counts)
        return Deferred(Normed(state, norm), x.shape, x.dtype, x.device)

    return deferred
