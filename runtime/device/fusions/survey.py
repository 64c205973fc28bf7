"""Says which parts of a model the decode graph joins, and why it leaves the others as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from foreroute.runtime.device.fusions.attention import CONFIG_FIELD
from foreroute.runtime.device.fusions.norms import norm_or_reason
from foreroute.runtime.device.fusions.rotary import FUNCTION_NAME, shares_of
from foreroute.runtime.device.fusions.routers import router_or_reason

NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What kernels stand in for; each part is named once, however many layers have it."""

    joined: tuple[str, ...]
    """Such as `norm Qwen3MoeRMSNorm`."""
    left: tuple[str, ...]
    """The same with the reason."""

    @property
    def joined_text(self) -> str:
        """For people, on one line."""
        return ", ".join(self.joined) or NOTHING

    @property
    def left_text(self) -> str:
        """For people, on one line."""
        return "; ".join(self.left) or NOTHING


def survey(model: nn.Module, routers: Iterable[nn.Module]) -> Survey:
    """Ask every fusion about a model, of which only the experts need no weights.

    What a part is joined with (products, additions, the cache's write) depends on what the model
    does with it; the log counts that when a step is captured.

    Args:
        model: Transformers model.
        routers: Of its MoE layers.
    """
    norms = [(module, norm_or_reason(module)) for module in model.modules()]
    asked = [
        (f"norm {type(module).__name__}", _reason(found))
        for module, found in norms
        if not isinstance(found, str) or "Norm" in type(module).__name__
    ]
    asked += [(f"router {type(r).__name__}", _reason(router_or_reason(r))) for r in routers]
    asked += [*_rotations(model).items(), *_attention(model).items()]
    once = dict.fromkeys(asked)
    return Survey(
        joined=tuple(part for part, reason in once if not reason),
        left=tuple(f"{part}: {reason}" for part, reason in once if reason),
    )


def _reason(found: Any) -> str:
    return found if isinstance(found, str) else ""


def _rotations(model: nn.Module) -> dict[str, str]:
    files = {type(module).__module__ for module in model.modules()}
    functions = {name: getattr(sys.modules[name], FUNCTION_NAME, None) for name in sorted(files)}
    return {
        f"rotation of {name.rpartition('.')[2]}": ""
        if shares_of(function)
        else "it turns queries and keys by another formula"
        for name, function in functions.items()
        if function is not None
    } or {"rotation": f"no {FUNCTION_NAME} in the model's files"}


def _attention(model: nn.Module) -> dict[str, str]:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    named = any(getattr(config, CONFIG_FIELD, None) is not None for config in configs)
    return {"attention of single tokens": "" if named else "its config names no implementation"}
