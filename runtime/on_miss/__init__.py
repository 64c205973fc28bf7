"""Rules on a miss: what a decode step does about a chosen expert that is not resident."""

from foreroute.runtime.on_miss.rule import MissRule, find_rule

__all__ = ["MissRule", "find_rule"]
