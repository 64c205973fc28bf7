"""Phase three, second half: run an MoE with its experts in host memory, fetched ahead of need.

Its names are loaded when they are first asked for: a command can be stopped before torch is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreroute.runtime.config import EngineConfig
    from foreroute.runtime.engine import Engine
    from foreroute.runtime.stats import RuntimeStats

__all__ = ["Engine", "EngineConfig", "RuntimeStats"]
HOMES = {"Engine": "engine", "EngineConfig": "config", "RuntimeStats": "stats"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"foreroute.runtime has no {name}")
    return getattr(importlib.import_module(f"foreroute.runtime.{HOMES[name]}"), name)
