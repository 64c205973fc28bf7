"""One model on several GPUs of a host: every expert in slices, one per process of torchrun."""

from foreroute.runtime.parallel.cuts import Cuts
from foreroute.runtime.parallel.lockstep import Lockstep
from foreroute.runtime.parallel.ranks import UNSLICED, SliceRanks
from foreroute.runtime.parallel.slicing import ExpertSlice
from foreroute.runtime.parallel.writing import SlicedWriter, cut, narrowed

__all__ = [
    "UNSLICED",
    "Cuts",
    "ExpertSlice",
    "Lockstep",
    "SliceRanks",
    "SlicedWriter",
    "cut",
    "narrowed",
]
