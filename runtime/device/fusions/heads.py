"""Head norms, rotation and the cache's write left to one launch, where a step has one new token."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from foreroute.runtime.device.fusions.deferred import Deferred, Source
from foreroute.runtime.device.fusions.deferred_norms import ProductNorm
from foreroute.runtime.device.fusions.projections import Product
from foreroute.runtime.device.kernels.heads import ProjectedHeads, place_heads
from foreroute.runtime.device.kernels.norm import Norm
from foreroute.runtime.device.kernels.rotary import rotate


class Rotation:
    """Queries and keys of one new token that are rotated together."""

    def __init__(self, query: Deferred, key: Deferred, cos: Tensor, sin: Tensor) -> None:
        """Defer it.

        Args:
            query: Of a product, perhaps normed, [B, H, 1, d].
            key: [B, H_kv, 1, d].
            cos: See `rotate`.
            sin: See `rotate`.
        """
        self.query, self.key, self.cos, self.sin = query, key, cos, sin
        self.counts: Counter[str] = query.source.counts
        self.results: dict[str, Rotated] = {role: Rotated(self, role) for role in ("query", "key")}

    def deferred(self) -> tuple[Deferred, Deferred]:
        """Both results."""
        first, second = (
            Deferred(self.results[role], x.shape, x.dtype, x.device)
            for role, x in (("query", self.query), ("key", self.key))
        )
        return first, second

    def run(self) -> None:
        """Rotate by a launch of its own."""
        turned = rotate(self.query.value(), self.key.value(), self.cos, self.sin)
        for result, value in zip(self.results.values(), turned, strict=True):
            result.settle(value)


class Rotated(Source):
    """Rotated queries, or keys."""

    def __init__(self, rotation: Rotation, role: str) -> None:
        """Defer it.

        Args:
            rotation: Of both.
            role: Which of its results this is.
        """
        self.rotation, self.role, self.counts = rotation, role, rotation.counts

    def compute(self) -> Tensor:
        """Rotated heads, [B, H, 1, d]."""
        self.rotation.run()
        return self.value()


def rotated(query: Any, key: Any, cos: Tensor, sin: Tensor, shares: list[int]) -> Any:
    """A rotation of one new token, deferred; None where nothing was deferred before it.

    Args:
        query: [B, H, 1, d] if it can be deferred.
        key: [B, H_kv, 1, d].
        cos: See `rotate`.
        sin: See `rotate`.
        shares: How many times the tables may be narrower than a head.
    """
    if not isinstance(query, Deferred) or not isinstance(key, Deferred):
        return None
    if any(x.dim() != 4 or x.shape[2] != 1 or _product_of(x) is None for x in (query, key)):
        return None
    dim, width = query.shape[-1], cos.shape[-1]
    is_known = key.shape[-1] == dim and dim in [share * width for share in shares]
    if not is_known or cos.dim() != 3 or cos.stride(-1) != 1 or sin.stride() != cos.stride():
        return None
    return Rotation(query, key, cos, sin).deferred()


def place(key: Any, value: Any, keys: Tensor, values: Tensor, position: Tensor) -> bool:
    """Write a deferred token into a cache, and settle its queries; whether that was possible.

    Args:
        key: [B, H_kv, 1, d].
        value: [B, H_kv, 1, d_v].
        keys: Written, [B, H_kv, N, d].
        values: Written, [B, H_kv, N, d_v].
        position: [1] int64, on the device.
    """
    if not isinstance(key, Deferred) or not isinstance(value, Deferred):
        return False
    if not isinstance(key.source, Rotated) or not isinstance(value.source, Product):
        return False
    rotation = key.source.rotation
    members = [_product_of(x) for x in (rotation.query, rotation.key, value)]
    group = value.source.products
    is_one_launch = all(member is not None and member.products is group for member in members)
    has_shapes = key.shape == (*keys.shape[:2], 1, keys.shape[3]) and value.shape == (
        *values.shape[:2],
        1,
        values.shape[3],
    )
    if not (is_one_launch and has_shapes and key.source.is_pending and keys.is_contiguous()):
        return False
    states = group.output if group.output is not None else group.run()
    first, second, third = (group.start_of(member) for member in members if member is not None)
    heads = ProjectedHeads(
        states=states,
        starts=(first, second, third),
        query_heads=rotation.query.shape[1],
        key_heads=keys.shape[1],
        query_norm=_norm_of(rotation.query),
        key_norm=_norm_of(rotation.key),
        cos=rotation.cos,
        sin=rotation.sin,
    )
    rotation.results["query"].settle(place_heads(heads, keys, values, position))
    rotation.counts["rotations with their cache writes"] += 1
    rotation.counts["head norms in those"] += sum(
        norm is not None for norm in (heads.query_norm, heads.key_norm)
    )
    return True


def _product_of(x: Deferred) -> Product | None:
    """What heads were projected by, if nothing but a norm of each came after."""
    source = x.source
    if isinstance(source, ProductNorm):
        return source.product if len(source.norm.factor) == x.shape[-1] else None
    return source if isinstance(source, Product) else None


def _norm_of(x: Deferred) -> Norm | None:
    return x.source.norm if isinstance(x.source, ProductNorm) else None
