"""Route readers: one per kind of file; `read_route` finds the right one."""

from foreroute.runtime.simulator.readers.assemble import ReadOptions
from foreroute.runtime.simulator.readers.registry import READERS, RouteReader, read_route

__all__ = ["READERS", "ReadOptions", "RouteReader", "read_route"]
