"""Recorded routes, ours and others': one reader per kind of file; `read_route` finds it."""

from foreroute.data.routes.assemble import ReadOptions
from foreroute.data.routes.registry import READERS, RouteReader, read_route
from foreroute.data.routes.route import ABSENT, Ids, Route

__all__ = ["ABSENT", "READERS", "Ids", "ReadOptions", "Route", "RouteReader", "read_route"]
