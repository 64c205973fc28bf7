"""Recorded routes, ours and others': one reader per kind of file; `read_route` finds it."""

from foreroute.data.routes.assemble import ReadOptions
from foreroute.data.routes.registry import READERS, RouteReader, read_route
from foreroute.data.routes.route import ABSENT, Ids, Route, Scores
from foreroute.data.routes.traces import GUESSES_PER_EXPERT

__all__ = [
    "ABSENT",
    "GUESSES_PER_EXPERT",
    "READERS",
    "Ids",
    "ReadOptions",
    "Route",
    "RouteReader",
    "Scores",
    "read_route",
]
