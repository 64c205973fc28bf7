"""The steps of a tuning: each a command that a user could type, done once."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from foreroute.estimators.artifacts import read_json, write_json

STATE_NAME = "tune.json"
REMEDY = "Remove it to begin anew."
MODULES = {
    "collect-traces": "foreroute.data.cli",
    "train-estimator": "foreroute.train.cli",
    "export-estimator": "foreroute.export.cli",
    "foreroute": "foreroute.runtime.cli",
}


@dataclass(frozen=True)
class Step:
    """One command of a tuning."""

    name: str
    """What it does, one word."""
    argv: tuple[str, ...]
    """The command as a user types it."""
    again: tuple[str, ...] = ()
    """Flags that let it go on, or begin anew, where it was killed before."""
    reads: tuple[str, ...] = ()
    """Names of the steps whose files it reads: it is done again once they are."""

    @property
    def text(self) -> str:
        """The command in one line."""
        return shlex.join(self.argv)


class Done(TypedDict):
    """What the journal says of a step that is done."""

    command: str
    """In one line."""
    seconds: float
    """What it took."""


class _Journalled(TypedDict):
    steps: dict[str, Done]


class StepFailed(ValueError):
    """A step's command ended with an error that it has printed."""


class Journal:
    """What has been done in a tuning's folder; the same call goes on after the last step done."""

    def __init__(self, folder: Path) -> None:
        """Read what was done before.

        Args:
            folder: Of the tuning; exists.

        Raises:
            ValueError: If its journal is damaged.
        """
        self._path = folder / STATE_NAME
        self._steps: dict[str, Done] = {}
        if self._path.is_file():
            self._steps = read_json(self._path, _Journalled, REMEDY)["steps"]

    @property
    def seconds(self) -> dict[str, float]:
        """What each step took, by name."""
        return {name: entry["seconds"] for name, entry in self._steps.items()}

    def has_done(self, step: Step) -> bool:
        """Whether this very command has been done here."""
        entry = self._steps.get(step.name)
        return entry is not None and entry["command"] == step.text

    def begin(self, step: Step, steps: Sequence[Step]) -> None:
        """Write down, before a step runs, that neither it nor what reads its files is done."""
        stale = {step.name}
        for later in steps:
            if stale.intersection(later.reads):
                stale.add(later.name)
        self._write({name: entry for name, entry in self._steps.items() if name not in stale})

    def note(self, step: Step, seconds: float) -> None:
        """Write down that a step is done."""
        self._write(self._steps | {step.name: {"command": step.text, "seconds": seconds}})

    def _write(self, steps: dict[str, Done]) -> None:
        self._steps = steps
        write_json(self._path, {"steps": steps})


def run_all(steps: Sequence[Step], journal: Journal, say: Callable[[str], None]) -> None:
    """Run what has not been done yet, in the open, and what reads the files of a step that ran.

    Args:
        steps: In order.
        journal: Of their folder.
        say: Prints a line.

    Raises:
        StepFailed: If a command ends with an error.
    """
    for step in steps:
        if journal.has_done(step):
            say(f"Done before: {step.text}")
            continue
        journal.begin(step, steps)
        say(f"\n$ {step.text}")
        start = time.monotonic()
        module, arguments = MODULES[step.argv[0]], (*step.argv[1:], *step.again)
        done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
        if done.returncode != 0:
            raise StepFailed(
                f"{step.name} ended with exit code {done.returncode}; the same command goes on "
                "from there once its reason is gone."
            )
        journal.note(step, time.monotonic() - start)
