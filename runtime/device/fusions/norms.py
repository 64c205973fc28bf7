"""Replaces a model's RMS norms by PyTorch's fused one in decode steps: one launch, not seven."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.runtime.device.kernels.norm import Norm, normed_reference

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
TOLERANCE = 1e-4


def find_norms(model: nn.Module) -> list[tuple[nn.Module, Norm]]:
    """Every RMS norm whose own output PyTorch's fused one reproduces, up to rounding."""
    found = ((module, norm_or_reason(module)) for module in model.modules())
    return [(module, norm) for module, norm in found if isinstance(norm, Norm)]


def fuse_norms(model: nn.Module, undo: ExitStack, is_prompt: Callable[[], bool]) -> int:
    """Fuse every norm of `find_norms`.

    Args:
        model: Its norm modules get another forward.
        undo: Gets the callbacks that put the original forwards back.
        is_prompt: Whether the pass at hand is over a prompt: then each norm is the model's own, to
            the bit, so that a prompt's routing is stock's.

    Returns:
        How many norms were fused.
    """
    found = find_norms(model)
    for module, norm in found:
        module.forward = partial(_forward, own=module.forward, norm=norm, is_prompt=is_prompt)
        undo.callback(module.__dict__.pop, "forward")
    return len(found)


def _forward(
    state: Tensor, *, own: Callable[[Tensor], Tensor], norm: Norm, is_prompt: Callable[[], bool]
) -> Tensor:
    return own(state) if is_prompt() else normed_reference(state, norm)


def norm_or_reason(module: Any) -> Norm | str:
    """The norm that agrees with the module's own forward, or why there is none, in a few words."""
    epsilon = next((getattr(module, n) for n in EPSILON_NAMES if hasattr(module, n)), None)
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if epsilon is None or set(parameters) != {"weight"} or weight.dim() != 1:  # type: ignore[union-attr]
        return "it has other parameters than an RMS norm's"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "it may take more than the states"  # such as a gate
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, len(weight), generator=generator).to(weight)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            expected = module(sample).float()
    except (TypeError, RuntimeError):  # a norm of other states
        return "it does not take states of its weight's width"
    for factor in (weight.detach(), weight.detach() + 1):  # type: ignore[union-attr]
        norm = Norm(factor=factor, eps=float(epsilon))
        tolerance = max(TOLERANCE, 4 * torch.finfo(sample.dtype).eps)
        got = normed_reference(sample, norm).float()
        if torch.allclose(got, expected, atol=tolerance, rtol=tolerance):
            return norm
    return "it gives something else than an RMS norm"
