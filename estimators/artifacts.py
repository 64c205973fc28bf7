"""How every command writes what it leaves behind: under a temporary name first, then renamed."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Built = TypeVar("Built")

PARTIAL_SUFFIX = ".partial"
VERSIONED_PACKAGES = ("foreroute", "torch", "transformers", "datasets", "lightning", "safetensors")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it.

    Args:
        path: The file; its folder exists.
        content: Anything `json` can write.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader never sees half of it; its folder exists."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.write_text(text)
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is damaged; the message names it.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged (not JSON: {error}). Make it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (expected a JSON object). Make it again.")
    return content


def read_versioned(
    path: Path, version: int, build: Callable[[dict[str, Any]], Built], remedy: str
) -> Built:
    """Read a manifest that states its format version, and build what it describes.

    Args:
        path: A JSON object with a `format_version`.
        version: The one version that is read.
        build: Makes the object from the JSON's values.
        remedy: What the user can do about a file that cannot be read, one sentence.

    Raises:
        ValueError: If the file is damaged or of another version; the message names it.
    """
    values = read_json(path)
    if values.get("format_version") != version:
        raise ValueError(
            f"{path} has format version {values.get('format_version')}; this foreroute reads "
            f"version {version}. {remedy}"
        )
    try:
        return build(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {remedy}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors so that a reader never sees half of them."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial
    )
    partial.replace(path)


def read_tensors(path: Path, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Read all (or the named) tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: If the file is damaged or lacks a tensor; the message names it.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names or tuple(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Make it again.") from error


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears under its own name only when complete.

    Args:
        path: Where the finished folder shall lie.
        overwrite: Replace a folder that is there already.

    Yields:
        The temporary folder, empty. If the body raises, it is removed and `path` is untouched.

    Raises:
        ValueError: If `path` exists and is not empty, and `overwrite` is off.
    """
    require_free(path, overwrite=overwrite)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)


def require_free(path: Path, *, overwrite: bool) -> None:
    """Refuse to write over something that is there already.

    Raises:
        ValueError: If `path` is a file, or a folder that is not empty and `overwrite` is off.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file; give a folder.")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} exists already. Choose another --out, or pass --overwrite.")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour an artifact depends on."""
    versions = {"python": sys.version.split()[0]}
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def write_command(folder: Path) -> None:
    """Write `command.txt`: what was typed, when, on which versions, from which commit."""
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
    ]
    (folder / "command.txt").write_text("\n".join(lines) + "\n")
