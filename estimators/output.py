"""The folders that commands leave behind: one writer each, whole or not at all, nobody else's."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import fnmatch
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foreroute.estimators.artifacts import (
    PARTIAL_SUFFIX,
    new_file,
    package_versions,
    parse_json,
    partial_name,
)

if sys.platform != "win32":
    import fcntl

OutputKind = Literal[
    "traces", "run", "bundle", "report", "comparison", "trace set", "prepared model"
]
OWN_NAMES: dict[OutputKind, tuple[str, ...]] = {
    "traces": ("manifest.json", "*.safetensors", "tokens", "layer_*", "pending"),
    "run": ("run.json", "metrics.json", "*.safetensors", "checkpoints", "logs", "parts"),
    "bundle": ("manifest.json", "*.safetensors"),
    "report": ("index.html", "report.json", "*.png"),
    "comparison": ("*.json", "truth", "rows", "predictions", "traces*", "*.html", "*.png", "*.md"),
    "trace set": ("README.md", "*.json", "*.safetensors", "*.parquet"),
    "prepared model": (
        *("experts", "*.json", "*.safetensors", "*.txt", "*.md", "*.model", "*.jinja"),
        *("*.tiktoken", "*.py", "*.pdf", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"),
    ),
}
"""What a folder of each kind holds; one that holds anything else is never replaced."""
COMMAND_FILE = "command.txt"
MARK = "written by foreroute: "
LOCK_SUFFIX = ".lock"
OLD_SUFFIX = ".old"
RENAME_EXCHANGE = 2
AT_FDCWD = -100

_held: dict[Path, int] = {}
"""Folders that this process holds, and the thread that claimed each."""


@dataclass(frozen=True)
class LockOwner:
    """Who writes into an output folder, as its lock file says."""

    foreroute_lock_of: str
    """The folder's name."""
    pid: int
    """Its process."""
    host: str
    """That it runs on."""


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Be the only one to write into an output folder; what a killed writer left is cleared away.

    The lock is a file beside the folder. The kernel frees it when its process ends, however it
    ends; claiming again within one thread does nothing.

    Args:
        path: The folder, which need not exist; folders above it are made.

    Raises:
        ValueError: If another process, or thread, writes there, or a file of the lock's name is
            not a lock.
        OSError: If nothing can be written there.
    """
    real = _real(path)
    if _held.get(real) == threading.get_ident():
        yield
        return
    real.parent.mkdir(parents=True, exist_ok=True)
    lock = real.with_name(real.name + LOCK_SUFFIX)
    descriptor = _take(lock, real)
    _held[real] = threading.get_ident()
    try:
        _clear_leftovers(real)
        yield
    finally:
        del _held[real]
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(lock: Path, folder: Path) -> int:
    """Open and hold a lock file, and write who holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            is_free = _try_lock(descriptor)
            owner = _read_owner(lock, descriptor)
            if not is_free:
                raise ValueError(_is_taken(folder, owner))
            if not _is_same_file(lock, descriptor):
                os.close(descriptor)  # its owner has removed it meanwhile
                continue
            if owner is not None and owner.host != socket.gethostname():
                raise ValueError(
                    f"{_is_taken(folder, owner)} It cannot be asked from here: if it has ended, "
                    f"remove {lock}."
                )
            mine = LockOwner(folder.name, os.getpid(), socket.gethostname())
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _to_json(mine), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True  # the file's text is all there is to go by
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_owner(lock: Path, descriptor: int) -> LockOwner | None:
    """Who holds or held the lock; None if it was never filled."""
    text = os.pread(descriptor, 4096, 0)
    if not text.strip():
        return None
    try:
        return parse_json(text, LockOwner, str(lock))
    except ValueError:
        raise ValueError(
            f"{lock} is no lock file of foreroute, but has a lock's name; rename it or choose "
            "another --out."
        ) from None


def owner_of(path: Path) -> LockOwner | None:
    """Who has claimed an output folder; None if nobody has."""
    real = _real(path)
    lock = real.with_name(real.name + LOCK_SUFFIX)
    try:
        return parse_json(lock.read_bytes(), LockOwner, str(lock))
    except (OSError, ValueError):
        return None


def _to_json(owner: LockOwner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_taken(folder: Path, owner: LockOwner | None) -> str:
    who = f"process {owner.pid} on {owner.host}" if owner else "another process"
    return f"{folder} is being written by {who}; wait for it, or choose another --out."


def require_free(
    path: Path, kind: OutputKind, *, overwrite: bool, inputs: Sequence[Path | str | None] = ()
) -> None:
    """Refuse an output folder that cannot be made, or would take the place of something else.

    Args:
        path: The folder.
        kind: What it will be.
        overwrite: Replace a finished or unfinished folder of the same kind.
        inputs: What is read to make it: files, folders, or names that are neither.

    Raises:
        ValueError: If `path` is a file or a mount point, holds something and `overwrite` is off, or
            holds something that no command of foreroute wrote, is of another kind, or is read.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder.")
    if not path.exists():
        return
    real = _real(path)
    if os.path.ismount(real):
        raise ValueError(f"{path} is a mount point, which cannot be renamed; give a folder in it.")
    names = sorted(entry.name for entry in path.iterdir())
    if names and not overwrite:
        raise ValueError(f"{path} exists already. Choose another --out, or pass --overwrite.")
    if names:
        _require_own(path, kind, names)
    for given in inputs:
        there = None if given is None else _real(Path(given).expanduser())
        if there is not None and there.exists() and (there == real or real in there.parents):
            raise ValueError(
                f"--overwrite would remove {given}, which is read to make {path}; choose another "
                "--out."
            )


def _require_own(path: Path, kind: OutputKind, names: Sequence[str]) -> None:
    found = kind_of(path)
    if found is None:
        raise ValueError(
            f"{path} holds {names[0]} and was not written by foreroute (no {COMMAND_FILE} of it "
            "says so), so --overwrite leaves it alone. Remove it yourself, or choose another --out."
        )
    if found != kind:
        raise ValueError(
            f"{path} holds {_named(found)}, which --overwrite does not replace by {_named(kind)}; "
            "choose another --out."
        )
    foreign = [name for name in names if not _is_own_name(name, kind)]
    if foreign:
        raise ValueError(
            f"{path} also holds {foreign[0]}, which foreroute did not write, so --overwrite leaves "
            "it alone. Move that away, or choose another --out."
        )


def _named(kind: OutputKind) -> str:
    return kind if kind == "traces" else f"a {kind}"


def _is_own_name(name: str, kind: OutputKind) -> bool:
    patterns = (*OWN_NAMES[kind], COMMAND_FILE)
    return any(fnmatch.fnmatch(name.split(PARTIAL_SUFFIX)[0], pattern) for pattern in patterns)


def kind_of(folder: Path) -> OutputKind | None:
    """What a folder is by the mark that `write_command` left in it; None without one."""
    try:
        with (folder / COMMAND_FILE).open(errors="replace") as file:
            lines = [line.removesuffix("\n") for line in file.readlines(1 << 20)]
    except OSError:
        return None
    return next((kind for kind in OWN_NAMES if MARK + kind in lines), None)


@contextlib.contextmanager
def new_folder(
    path: Path, kind: OutputKind, *, overwrite: bool, inputs: Sequence[Path | str | None] = ()
) -> Iterator[Path]:
    """Fill a folder under a name of its own; it takes its place only when it is complete.

    Args:
        path: Where the finished folder shall lie.
        kind: What it is.
        overwrite: Replace a folder of the same kind that is there already; it stays until then.
        inputs: As `require_free` takes them.

    Yields:
        The unfinished folder, empty but for `command.txt`. If the body raises, it is removed and
        `path` is untouched.

    Raises:
        ValueError: As `claim` and `require_free`.
    """
    with claim(path):
        require_free(path, kind, overwrite=overwrite, inputs=inputs)
        real = _real(path)
        with _unfinished(real) as partial:
            write_command(partial, kind)
            yield partial
            if real.exists() and any(real.iterdir()):
                require_free(path, kind, overwrite=overwrite, inputs=inputs)
            give_place(partial, real)


def give_place(new: Path, path: Path) -> None:
    """Give a finished folder its name; what had it then has the other's, if it is not empty.

    Args:
        new: The folder, beside `path`.
        path: The name, which the caller has claimed and found free to take.
    """
    real = _real(path)
    if real.exists() and any(real.iterdir()):
        _exchange(new, real)
    else:
        new.rename(real)


@contextlib.contextmanager
def _unfinished(real: Path) -> Iterator[Path]:
    """A new folder beside another; whatever has its name in the end is removed."""
    partial = real.with_name(partial_name(real.name))
    partial.mkdir()
    try:
        yield partial
    finally:
        if partial.exists():
            _remove(partial)


def _exchange(new: Path, old: Path) -> None:
    """Swap the names of two folders, at once where the system can."""
    library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    swap = getattr(library, "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if swap and swap(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    aside = old.with_name(old.name + OLD_SUFFIX + new.name.removeprefix(old.name))
    old.rename(aside)  # killed here, the next `claim` gives it its name back
    new.rename(old)
    aside.rename(new)


def _clear_leftovers(real: Path) -> None:
    """Remove what killed writers of a folder left beside it, if it carries the mark."""
    name = glob.escape(real.name)
    for old in real.parent.glob(f"{name}{OLD_SUFFIX}{PARTIAL_SUFFIX}-*"):
        if kind_of(old) and not real.exists():
            old.rename(real)
    names = real.name, real.name + OLD_SUFFIX
    for left in real.parent.glob(f"{name}*{PARTIAL_SUFFIX}-*-*"):
        is_one = left.name.split(PARTIAL_SUFFIX)[0] in names and not left.is_symlink()
        if is_one and left.is_dir() and (_is_hardly_begun(left) or kind_of(left)):
            _remove(left)


def _is_hardly_begun(folder: Path) -> bool:
    """Whether a folder holds nothing but, perhaps, a mark that did not get its name."""
    unfinished = f"{COMMAND_FILE}{PARTIAL_SUFFIX}-"
    return all(entry.name.startswith(unfinished) for entry in folder.iterdir())


def _remove(folder: Path) -> None:
    """Remove a folder of ours, its mark last, so that what is left after a kill still has it."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == COMMAND_FILE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    folder.rmdir()


def _real(path: Path) -> Path:
    """Where a path leads; its name is the folder's own."""
    real = Path(path).resolve()
    if not real.name:
        raise ValueError(f"{path} cannot be an output folder; give a folder below it.")
    return real


def write_command(folder: Path, kind: OutputKind) -> None:
    """Write `command.txt`: what was typed, when, on which versions, from which commit; the mark."""
    asked = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    versions = " ".join(f"{name}={version}" for name, version in package_versions().items())
    lines = [
        " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        f"time: {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}",
        f"commit: {commit or 'unknown'}",
        f"versions: {versions}",
        MARK + kind,
    ]
    with new_file(folder / COMMAND_FILE) as partial:
        partial.write_text("\n".join(lines) + "\n")
