"""One model on several GPUs of a host: every expert in slices, one per process of torchrun."""

from foreroute.runtime.parallel.ranks import ALONE, Ranks
from foreroute.runtime.parallel.slicing import ExpertSlice
from foreroute.runtime.parallel.writing import SlicedWriter, cut, narrowed

__all__ = ["ALONE", "ExpertSlice", "Ranks", "SlicedWriter", "cut", "narrowed"]
