"""Results of a benchmark that must end in time: written after every row, with what was left out."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from foreroute.estimators.artifacts import package_versions, write_json


class PartialResults:
    """Rows measured so far, the cells skipped or failed, and the seconds each phase took."""

    def __init__(self, path: Path | None, minutes: float, **header: Any) -> None:
        """Start the clock.

        Args:
            path: JSON file that is written again after every row; nothing is written if None.
            minutes: No cell is begun after so many.
            **header: What else the file says of the whole run.
        """
        self._path, self._minutes, self._start = path, minutes, time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = package_versions() | {"cuda": torch.version.cuda}
        for name in ("accelerate", "triton"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        self.content: dict[str, Any] = {"device": device, "versions": versions, **header}
        self.content |= {"phases_s": {}, "skipped": [], "failed": [], "rows": []}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def is_spent(self) -> bool:
        """Whether the time is over."""
        return self.seconds >= 60 * self._minutes

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.content["rows"].append(row)
        self.write()

    def set(self, **values: Any) -> None:
        """Keep something else about the run."""
        self.content |= values
        self.write()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run; parts of one name are added up."""
        start = time.monotonic()
        try:
            yield
        finally:
            phases = self.content["phases_s"]
            seconds = time.monotonic() - start
            phases[name] = round(phases.get(name, 0.0) + seconds, 1)
            self.write()

    @contextlib.contextmanager
    def cell(self, name: str) -> Iterator[None]:
        """Run one cell; one that fails is written down as failed, and the others go on."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self.skip(name, "it does not fit this GPU's memory")
        except Exception as error:
            traceback.print_exc(limit=-4)
            self.content["failed"].append(f"{name}: {type(error).__name__}: {error}"[:300])
            self.write()

    def skip(self, name: str, reason: str) -> None:
        """Write down that a cell was left out."""
        print(f"skipped {name}: {reason}", flush=True)
        self.content["skipped"].append(f"{name}: {reason}")
        self.write()

    def skip_if_spent(self, name: str) -> bool:
        """Whether the time is over; the cell is then written down as skipped."""
        if self.is_spent:
            self.skip(name, f"the {self._minutes:g} minutes are over")
        return self.is_spent

    def write(self) -> None:
        """Write everything so far."""
        if self._path is not None:
            write_json(self._path, self.content)

    def finish(self) -> int:
        """Write and say what is missing; the exit status."""
        self.write()
        failed, skipped = self.content["failed"], self.content["skipped"]
        phases = ", ".join(f"{name} {s:g}" for name, s in self.content["phases_s"].items())
        print(f"seconds: {phases}")
        print(f"[{self.seconds:.0f} s] done, {len(skipped)} skipped, {len(failed)} failed")
        for line in failed:
            print(f"FAILED {line}")
        return int(bool(failed))
