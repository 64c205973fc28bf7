"""Lets a driver's layers see tensors of the model that do not go through its experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from foreroute.data.adapters import MoELayer, first_tensor, router_logits_of


def watch_input(module: nn.Module, see: Callable[[Tensor], None], undo: ExitStack) -> None:
    """Show what enters a module, before it runs.

    Args:
        module: Takes [B, T, D] or [T, D].
        see: Gets [B * T, D].
        undo: Gets what takes the hook off again.
    """

    def show(_: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
        see(first_tensor(inputs, settings).flatten(0, -2))

    undo.callback(module.register_forward_pre_hook(show, with_kwargs=True).remove)


class ReadsSource(Protocol):
    """A layer whose state predicts another one's experts."""

    residual: Tensor | None
    router_input: Tensor | None


def watch_source_states(layer: MoELayer, own: ReadsSource, undo: ExitStack) -> None:
    """Set what predictions read of a layer.

    That is its residual and, where the experts read another tensor than the router, the router's
    input; both [T, D].

    Args:
        layer: Handles on the model's modules.
        own: Gets them.
        undo: Gets what takes the hooks off again.
    """
    watch_input(layer.residual_source, partial(setattr, own, "residual"), undo)
    if layer.is_input_apart:
        watch_input(layer.router, partial(setattr, own, "router_input"), undo)


def watch_router_logits(layer: MoELayer, see: Callable[[Tensor], None], undo: ExitStack) -> None:
    """Show a router's logits, after it ran.

    Args:
        layer: Whose router.
        see: Gets [T, E].
        undo: Gets what takes the hook off again.
    """

    def show(_: nn.Module, __: Any, output: Any) -> None:
        see(router_logits_of(output, layer.num_experts))

    undo.callback(layer.router.register_forward_hook(show).remove)
