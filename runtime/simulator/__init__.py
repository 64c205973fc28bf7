"""Replays recorded routing on a timeline of compute and link: what each policy would cost."""

from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.predictions import Predictions, SimulatedPredictor
from foreroute.runtime.simulator.result import ReplayCounts, SimulationRow
from foreroute.runtime.simulator.simulate import Scenario, bounds, simulate

__all__ = [
    "LinkTimes",
    "Predictions",
    "ReplayCounts",
    "Scenario",
    "SimulatedPredictor",
    "SimulationRow",
    "bounds",
    "simulate",
]
