"""Parts of a transformers model replaced by kernels, each only where it gives what the model gives.

Everything is undone by closing the `ExitStack` that the functions are given.
"""

from foreroute.runtime.device.fusions.attention import attention_kinds, fuse_attention
from foreroute.runtime.device.fusions.deferred_norms import defer_norms
from foreroute.runtime.device.fusions.norms import find_norms, fuse_norms
from foreroute.runtime.device.fusions.rotary import fuse_rotary
from foreroute.runtime.device.fusions.routers import find_routers, fuse_routers
from foreroute.runtime.device.fusions.survey import Survey, survey

__all__ = [
    "Survey",
    "attention_kinds",
    "defer_norms",
    "find_norms",
    "find_routers",
    "fuse_attention",
    "fuse_norms",
    "fuse_rotary",
    "fuse_routers",
    "survey",
]
