"""Phase three, second half: run an MoE with its experts in host memory, fetched ahead of need."""

from foreroute.runtime.config import EngineConfig
from foreroute.runtime.engine import Engine
from foreroute.runtime.stats import RuntimeStats

__all__ = ["Engine", "EngineConfig", "RuntimeStats"]
