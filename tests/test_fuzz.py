"""Damaged files end in one line, whatever reads them; nothing outside their folder is opened."""

import resource

import datasets
from fuzzing import TARGETS, Fuzz, watch_opened_files

INPUTS = 3500
MOST_KILOBYTES = 500 * 1024


def test_every_reader_refuses_damage_in_one_line_and_opens_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    watch_opened_files()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz = Fuzz(tmp_path, seed=0)
    problems = [problem for number in range(INPUTS) if (problem := fuzz.one(number))]
    assert problems == []
    rounds = INPUTS // sum(target.share for target in TARGETS.values())
    for name, target in TARGETS.items():  # most of the damage is seen
        assert fuzz.counts[f"{name}: refused"] > rounds * target.share / 20, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES
