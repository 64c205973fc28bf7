"""Tensors that are computed when first needed, so that one launch can do several modules' work.

A decode step of few tokens is many small launches. While a step is captured, norms, projections and
routers hand out `Deferred` tensors; whoever knows a kernel that does more at once (`products`,
`place_heads`, `route`, the experts) takes what they stand for. Any other operation makes PyTorch
compute them first, as the model wrote it, so that a model may do with them what it likes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Rule = Callable[..., Any]
_RULES: dict[Any, list[Rule]] = defaultdict(list)
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
_METADATA = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {
    Tensor.is_floating_point,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
}


class Source(ABC):
    """What a deferred tensor stands for; all views of it share one."""

    counts: Counter[str]
    """Launches by what they fused, of the whole step."""
    _known: Tensor | None = None

    @abstractmethod
    def compute(self) -> Tensor:
        """Launch what gives it, [tokens, ..], as far as nothing else took it."""

    @property
    def is_pending(self) -> bool:
        """Whether it has not been computed."""
        return self._known is None

    def value(self) -> Tensor:
        """Its numbers, contiguous; computed once."""
        if self._known is None:
            self._known = self.compute().contiguous()
        return self._known

    def settle(self, value: Tensor) -> None:
        """Take numbers that a fused launch has written."""
        self._known = value


class Known(Source):
    """Numbers that are there already, for products that fold what follows."""

    def __init__(self, state: Tensor, counts: Counter[str]) -> None:
        """Remember them.

        Args:
            state: [T, D], contiguous.
            counts: See `Source`.
        """
        assert state.is_contiguous()  # the kernels take no strides
        self.counts, self._known = counts, state
        self._version = state._version

    def compute(self) -> Tensor:
        """The same numbers."""
        assert self._known is not None
        return self._known

    @property
    def state(self) -> Tensor:
        """The same numbers, unless they have changed since.

        Raises:
            RuntimeError: If the model wrote into them meanwhile.
        """
        state = self.compute()
        if state._version != self._version:
            raise RuntimeError("A state was changed in place before what follows was computed.")
        return state


class Deferred(Tensor):
    """A view of a source."""

    source: Source

    @staticmethod
    def __new__(
        cls: type[Deferred],
        source: Source,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Deferred:
        """Stand for `source` in this shape."""
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.source = source
        return made

    def viewed(self, *shape: int) -> Deferred:
        """The same in another shape; -1 as `Tensor.view` has it."""
        size = torch.empty(tuple(self.shape), device="meta").view(shape).shape
        return Deferred(self.source, size, self.dtype, self.device)

    def value(self) -> Tensor:
        """Its numbers, in its shape."""
        return self.source.value().view(tuple(self.shape))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Defer further by a rule, or compute."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for rule in _RULES.get(func, ()):
            result = rule(*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute where an operation comes past the rules."""
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def settled(value: Any) -> Any:
    """A deferred tensor's numbers; anything else as it is."""
    return value.value() if isinstance(value, Deferred) else value


def rule_for(*functions: Any) -> Callable[[Rule], Rule]:
    """Register how functions of deferred tensors are deferred further.

    Args:
        functions: Of PyTorch. The rule takes their arguments and returns None where it does not
            apply.
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            _RULES[function].append(rule)
        return rule

    return register


@rule_for(Tensor.view, Tensor.reshape)
def _view(x: Any, *shape: Any, **settings: Any) -> Deferred | None:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    is_known = isinstance(x, Deferred) and not settings and not isinstance(sizes, torch.dtype)
    return x.viewed(*sizes) if is_known else None


@rule_for(Tensor.contiguous)
def _contiguous(x: Deferred, **settings: Any) -> Deferred | None:
    return None if settings else x


@rule_for(Tensor.transpose)
def _transpose(x: Deferred, first: int, second: int) -> Deferred | None:
    """Dimensions of one element change places without moving anything."""
    sizes = list(x.shape)
    if x.source.is_pending and 1 in (sizes[first], sizes[second]) and abs(first - second) == 1:
        sizes[first], sizes[second] = sizes[second], sizes[first]
        return x.viewed(*sizes)
    return None
