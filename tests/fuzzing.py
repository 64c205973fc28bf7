"""Damaged files for every reader: what they may raise, and what they may open.

By hand, for longer: `python tests/fuzzing.py --inputs 1000000 --seed 1`, in one process; files lie
in memory. What goes wrong is printed as `target, file, input N of seed S`, and made again by
`--first N --inputs 1`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import string
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from damage import damage
from fuzz_targets import TARGETS, Target

LONG = 3000
"""Characters of a message at most."""
SLOW = 2.0
"""Seconds that no reader may take."""
MEMORY = Path("/dev/shm")
OPENED: list[str] = []
CODE = (".py", ".pyc", ".so")


@dataclass
class Place:
    """One target's files, which are damaged and made good again."""

    folder: Path
    target: Target

    def __post_init__(self) -> None:
        """Write the files, and read them undamaged."""
        self.folder.mkdir(parents=True)
        self.target.make(self.folder)
        self.good = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        if not self.target.writes:
            self.target.read(self.folder)
            self.require_good()

    def require_good(self) -> None:
        """Check that a reader left everything as it was."""
        there = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        assert there == self.good, f"{self.folder} was changed by its reader"

    def damage(self, rng: random.Random) -> str:
        """Damage one file; gives its name."""
        name = rng.choice(self.target.files)
        self._changed = {self.folder / name}
        damage(self.folder / name, rng)
        if rng.random() < 0.5 and not name.endswith(".json"):
            self.target.repair(self.folder)
            self._changed |= {path for path in self.good if path.suffix == ".json"}
        return name

    def restore(self) -> None:
        """Make the files what they were."""
        if self.target.writes:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self._changed = set(self.good)
        for path in self._changed:
            path.write_bytes(self.good[path])


@dataclass
class Fuzz:
    """Damages files and reads them, one after the other."""

    folder: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    """How many inputs were read right and how many refused, by target."""
    targets: dict[str, Target] = field(default_factory=lambda: TARGETS)

    def __post_init__(self) -> None:
        """Write every target's files once."""
        datasets.config.HF_DATASETS_CACHE = self.folder / "cache"
        self._places = {
            name: Place(self.folder / f"target_{at}", target)
            for at, (name, target) in enumerate(self.targets.items())
        }
        self._turns = [name for name, target in self.targets.items() for _ in range(target.share)]

    def one(self, number: int) -> str | None:
        """Damage and read one input; gives what went wrong."""
        rng = random.Random(f"{self.seed}/{number}")
        name = self._turns[number % len(self._turns)]
        place = self._places[name]
        file = place.damage(rng)
        problem = self._read(name, place) or _opened_outside(self.folder)
        place.restore()
        if number % 1000 == 0 and not place.target.writes:
            place.require_good()
        return problem and f"{name}, {file}, input {number} of seed {self.seed}: {problem}"

    def _read(self, name: str, place: Place) -> str | None:
        OPENED.clear()
        start = time.monotonic()
        outcome, problem = _outcome(place)
        if time.monotonic() - start > SLOW and not place.target.writes:  # or others had the CPU
            start = time.process_time()
            _outcome(place)
            if time.process_time() - start > SLOW:
                problem = f"it took {time.process_time() - start:.1f} s"
        self.counts[f"{name}: {outcome}"] += 1
        return problem


def _outcome(place: Place) -> tuple[str, str | None]:
    """Whether a place was read or refused, and what is wrong with that."""
    try:
        place.target.read(place.folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        is_line = 0 < len(said.strip()) <= LONG
        return "refused", None if is_line else f"a message of {len(said)} characters: {said[:200]}"
    except Exception as error:
        return "raised", f"{type(error).__name__}: {str(error)[:300]}"
    return "read", None


def _opened_outside(folder: Path) -> str | None:
    outside = [path for path in OPENED if not path.startswith(str(folder))]
    return f"it opened {outside[0]}" if outside else None


def _watch(event: str, details: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(details[0], str) and not details[0].endswith(CODE):
        OPENED.append(details[0])


def watch_opened_files() -> None:
    """List the files that Python opens from now on, but for code."""
    sys.addaudithook(_watch)


def main() -> None:
    """Run as many inputs as are asked for, or as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10**6)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--only", nargs="*", default=sorted(TARGETS), help="targets by name")
    asked = parser.parse_args()
    watch_opened_files()
    start = time.monotonic()
    problems: Counter[str] = Counter()
    done = 0
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        targets = {key: value for key, value in TARGETS.items() if key in asked.only}
        fuzz = Fuzz(Path(name), asked.seed, targets=targets)
        while done < asked.inputs and time.monotonic() < start + asked.minutes * 60:
            if problem := fuzz.one(asked.first + done):
                kind = problem.translate(str.maketrans("", "", string.digits))[:120]
                problems[kind] += 1
                if problems[kind] <= 3:
                    print(problem, flush=True)
            done += 1
            if done % 10_000 == 0:
                rate = done / (time.monotonic() - start)
                print(
                    f"{done:,} inputs, {sum(problems.values())} problems, {rate:.0f}/s", flush=True
                )
    print(f"{done:,} inputs, {sum(problems.values())} problems")
    for name, count in sorted(fuzz.counts.items()):
        print(f"  {name} {count:,}")


if __name__ == "__main__":
    main()
