"""Norms folded into the products that read them, products of one input in one launch, additions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foreroute.runtime.device.fusions.deferred import Deferred, Known, Source, rule_for, settled
from foreroute.runtime.device.fusions.normed import Normed
from foreroute.runtime.device.kernels.linear import MOST_MATRICES, can_multiply, products


class Products:
    """Products of one input that run in one launch."""

    def __init__(self, source: Normed | Known) -> None:
        """Begin with none."""
        self.source, self.members = source, list[Product]()
        self.output: Tensor | None = None
        """[T, sum of rows], once computed."""

    def takes(self, bias: Tensor | None) -> bool:
        """Whether another one can join."""
        has_room = self.output is None and len(self.members) < MOST_MATRICES
        return has_room and all((m.bias is None) == (bias is None) for m in self.members)

    def start_of(self, product: Product) -> int:
        """First column of a member's results."""
        return sum(len(m.weight) for m in self.members[: self.members.index(product)])

    def run(self, residual: Tensor | None = None) -> Tensor:
        """Launch them, with an addition to the only member's result if one is given."""
        source, is_normed = self.source, isinstance(self.source, Normed)
        norm = source.norm if isinstance(source, Normed) and source.is_pending else None
        state = source.before.state if norm is not None else source.value()  # type: ignore[union-attr]
        biases = [member.bias for member in self.members if member.bias is not None]
        weights = [member.weight for member in self.members]
        output = products(state, weights, biases or None, norm=norm, residual=residual)
        source.counts["products"] += 1
        source.counts["projections that share a launch"] += len(weights) - 1
        source.counts["norms in products"] += is_normed and norm is not None
        source.counts["additions in products"] += residual is not None
        if residual is None:
            self.output = output
            for member in self.members:
                start = self.start_of(member)
                member.settle_later(output[:, start : start + len(member.weight)])
        return output


class Product(Source):
    """One of several products of one input."""

    def __init__(self, products: Products, weight: Tensor, bias: Tensor | None) -> None:
        """Join the others."""
        self.products, self.weight, self.bias = products, weight, bias
        self.counts = products.source.counts
        self._columns: Tensor | None = None
        products.members.append(self)

    @property
    def is_pending(self) -> bool:
        """Whether its launch is still to come."""
        return self.products.output is None

    def settle_later(self, columns: Tensor) -> None:
        """Take its columns of the common result, copied only where somebody needs them apart."""
        self._columns = columns

    def compute(self) -> Tensor:
        """Its results, [T, rows]; the others of its input are computed with it."""
        if self._columns is None:
            self.products.run()
        assert self._columns is not None
        return self._columns

    def plus(self, residual: Tensor) -> Tensor | None:
        """Its results added to a state, [T, rows], in one launch; None if others came with it."""
        return self.products.run(residual) if len(self.products.members) == 1 else None


class Sum(Source):
    """A state and what is added to it by the launch that computes that."""

    def __init__(self, residual: Tensor, added: Any) -> None:
        """Defer it.

        Args:
            residual: [T, D].
            added: A source with `plus`.
        """
        self._state, self._added, self.counts = Known(residual, added.counts), added, added.counts

    def compute(self) -> Tensor:
        """The sum, [T, D]."""
        together: Tensor | None = None
        if self._added.is_pending:
            together = self._added.plus(self._state.state)
        return self._state.state + self._added.value() if together is None else together


@rule_for(nn.functional.linear)
def _linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> Deferred | None:
    source = x.source if isinstance(x, Deferred) else None
    if not isinstance(source, Normed | Known) or x.shape[-1] != weight.shape[-1]:
        return None
    state = source.before.state if isinstance(source, Normed) else source.state
    if not can_multiply(state, weight, bias):
        return None
    group = source.open_products if isinstance(source, Normed) else None
    if group is None or not group.takes(bias):
        group = Products(source)
        if isinstance(source, Normed):
            source.open_products = group
    shape = (*x.shape[:-1], len(weight))
    return Deferred(Product(group, weight, bias), shape, weight.dtype, weight.device)


@rule_for(Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__)
def _add(x: Any, y: Any, **settings: Any) -> Deferred | None:
    for added, residual in ((y, x), (x, y)):
        source = added.source if isinstance(added, Deferred) else None
        if (
            source is not None
            and hasattr(source, "plus")
            and source.is_pending
            and not settings
            and isinstance(residual, Tensor)
            and residual.shape == added.shape
            and residual.dtype == added.dtype
        ):
            state = settled(residual).reshape(-1, residual.shape[-1]).contiguous()
            return Deferred(Sum(state, source), added.shape, added.dtype, added.device)
    return None
