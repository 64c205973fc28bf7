"""Whole-module offload by accelerate: a layer's experts all come to the GPU for each forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def experts_offloaded(model: nn.Module, experts: list[nn.Module], device: Any) -> Iterator[None]:
    """Run a model with its experts modules on the CPU, as `device_map` does it.

    Args:
        model: All but its experts lies on the device already.
        experts: Its experts modules, their parameters on the CPU.
        device: Where to compute.
    """
    from accelerate import cpu_offload  # type: ignore[import-untyped]
    from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]

    for module in experts:
        cpu_offload(module, execution_device=device)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)


def move_all_but(model: nn.Module, experts: list[nn.Module], device: Any) -> None:
    """Move a model's parameters and buffers to a device, those of its experts modules excepted."""
    left = set(experts)
    for module in model.modules():
        if module not in left:
            for name, parameter in module.named_parameters(recurse=False):
                getattr(module, name).data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
