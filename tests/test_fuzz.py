"""Damaged files end in one line, whatever reads them; nothing outside their folder is opened."""

import resource
from collections import Counter

from fuzzing import TARGETS, Fuzz, watch_opened_files

INPUTS = 2600
MOST_KILOBYTES = 500 * 1024


def test_every_reader_refuses_damage_in_one_line_and_opens_nothing_else(tmp_path):
    watch_opened_files()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz = Fuzz(tmp_path, seed=0, counts=Counter())
    problems = [problem for number in range(INPUTS) if (problem := fuzz.one(number))]
    assert problems == []
    for name in TARGETS:  # most of the damage is seen, and some inputs get through
        assert fuzz.counts[f"{name}: refused"] > INPUTS / len(TARGETS) / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES
