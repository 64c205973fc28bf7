"""What predicts what: shape of routing, estimator forms, metrics. Torch and safetensors only.

Its names are loaded when they are first asked for: a command can be stopped before torch is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreroute.estimators.names import *  # noqa: F403


def __getattr__(name: str) -> Any:
    names = importlib.import_module("foreroute.estimators.names")
    if name not in names.__all__:
        raise AttributeError(f"foreroute.estimators has no {name}")
    return getattr(names, name)
