"""One call at a time through an engine, and everything forgotten that a broken one left behind."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.seam import is_experts_module
from foreroute.runtime.driver import Driver
from foreroute.runtime.store.offload import OffloadedModel

CPU = torch.device("cpu")
ADAPTER_REFUSAL = (
    "The adapter has weights for the experts, which are in host memory or stored in fewer bits"
)
MERGED = "merged_adapters"
ADAPTER_STATE = (MERGED, "_disable_adapters", "_active_adapter", "scaling")
"""What peft's modules keep of which adapters are in use."""


class Turns:
    """Calls wait for each other; each finds the slots as they should be.

    A forward pass that an exception or Ctrl-C ends may leave tables that say what is not so: the
    next one then starts with empty slots. It also does when adapters were added or merged, or
    weights were loaded, in between.
    """

    def __init__(self, offloaded: OffloadedModel, driver: Driver) -> None:
        """Watch over a model.

        Args:
            offloaded: The model, and the store of its experts.
            driver: Decides which of them are where.
        """
        self.lock = threading.RLock()
        """Held while one call runs."""
        self._offloaded, self._driver = offloaded, driver
        self._model = offloaded.moe.model
        self._is_broken = self._is_settled = False
        self._seen = _looks(self._offloaded.moe)

    def attach(self, undo: ExitStack) -> None:
        """Let every forward pass of the model take its turn, whoever calls it.

        Args:
            undo: Gets what gives the model its own `forward` back.
        """
        model, own = self._model, self._model.forward
        before = model.__dict__.get("forward")

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self._begin(_tokens(args, kwargs), kwargs.get("past_key_values"))
                output = own(*args, **kwargs)
                self._driver.end_forward()
                self._is_broken = False
                return output

        def detach() -> None:
            if model.__dict__.get("forward") is forward:
                del model.forward
                if before is not None:
                    model.forward = before

        model.forward = forward
        undo.callback(detach)

    def _begin(self, tokens: Tensor | None, cache: Any) -> None:
        if tokens is None or tokens.dim() < 2:
            return  # the model has something to say about that
        if self._is_broken or (tokens.shape[1] > 1 and not self._is_settled):
            self.settle()
        self._is_broken = True
        self._driver.begin_forward(tokens, functools.partial(_has_past, cache))

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the engine: while open, others wait and the model stays as it is."""
        with self.lock:
            self.settle()
            self._is_settled = True
            try:
                yield
            finally:
                self._is_settled = False

    @contextmanager
    def changing_slots(self) -> Iterator[None]:
        """While open, an exception makes the next call begin with empty slots."""
        self.settle()
        self._is_broken = True
        yield
        self._is_broken = False

    def settle(self) -> None:
        """Forget what is in the slots where it may be wrong by now."""
        looks = _looks(self._offloaded.moe)
        if self._is_broken or looks != self._seen:
            self._is_broken = True
            self._offloaded.take_in()
            self._driver.forget()
            self._require_no_adapter_elsewhere()
            self._seen = _looks(self._offloaded.moe)
            self._is_broken = False

    def _require_no_adapter_elsewhere(self) -> None:
        """Refuse adapters for experts whose weights are not where, or as, they add to them."""
        for module in self._model.modules():
            base = module._modules.get("base_layer")
            is_idle = module.__dict__.get(MERGED) or module.__dict__.get("_disable_adapters")
            if base is None or is_idle or not is_experts_module(base):
                continue
            if any(weight.device != CPU for weight in base.parameters(recurse=False)):
                raise ValueError(f"{ADAPTER_REFUSAL}: merge it into the checkpoint first.")
            if self._offloaded.device != CPU:
                raise ValueError(
                    f"{ADAPTER_REFUSAL}: PeftModel.from_pretrained(engine.model, adapter)"
                    ".merge_and_unload() merges it."
                )


def serialised(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let calls of a method of an engine wait for each other.

    Args:
        call: The method; its object has `turns`.
    """

    @functools.wraps(call)
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.turns.lock:
            return call(self, *args, **kwargs)

    return wait


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Ids [B, T], or embeddings [B, T, D]."""
    tokens: Tensor | None = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if tokens is None else tokens


def _has_past(cache: Any) -> bool:
    """Whether tokens were read into a cache of transformers, as far as it counts them."""
    layers = cache.layers if isinstance(cache, Cache) else ()
    is_counted = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return is_counted and bool(cache.get_seq_length() > 0)


def _looks(moe: MoEModel) -> list[Any]:
    """What a change of the model's modules, adapters or experts changes.

    The modules themselves are held, so that no later one can have the identity of an earlier one.
    """
    looks: list[Any] = []
    for module in moe.model.modules():
        state = module.__dict__
        looks.append(module)
        if MERGED in state:
            looks += [repr(state.get(name)) for name in ADAPTER_STATE]
        looks += [w.data_ptr() for w in state["_parameters"].values() if w is not None]
    for layer in moe.layers:
        looks += [w._version for w in layer.experts._parameters.values() if w is not None]
    return looks
