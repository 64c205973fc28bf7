"""Lets a driver's layers see tensors of the model that do not go through its experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

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


class SourceStates:
    """What predictions read of a layer, besides its own routing, in the forward pass at hand."""

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        self.residual: Tensor | None = None
        """[T, D]."""
        self._router_input: Tensor | None = None

    def watch(self, layer: MoELayer, undo: ExitStack) -> None:
        """See the residual and, where the experts read another tensor, the router's input.

        Args:
            layer: Handles on the model's modules.
            undo: Gets what takes the hooks off again.
        """
        watch_input(layer.residual_source, partial(setattr, self, "residual"), undo)
        if layer.is_input_apart:
            watch_input(layer.router, partial(setattr, self, "_router_input"), undo)

    def router_input(self, experts_input: Tensor) -> Tensor:
        """What the router read, [T, D].

        Args:
            experts_input: What the experts read, [T, D]: the same in most models.
        """
        return experts_input if self._router_input is None else self._router_input


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
