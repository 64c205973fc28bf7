"""Files that commands leave behind: written beside their place, then renamed; checked when read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Built = TypeVar("Built")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number of things in a file: no less than none, and no more than a float holds exactly."""

PARTIAL_SUFFIX = ".partial"
MOST_JSON_BYTES = 1 << 28
"""Larger files are not JSON of ours."""
MOST_SAID = 300
"""Characters of another library's message about a damaged file, which may repeat its content."""
SWALLOWED_INTERRUPT = "could not determine the shape of object type 'torch.storage.Untyped"
MOST_LINE = 1000
"""Characters of one that is told in whole."""
VERSIONED_PACKAGES = ("foreroute", "torch", "transformers", "datasets", "lightning", "safetensors")


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:MOST_LINE]


def joined_lines(error: BaseException) -> str:
    """What an error of another library says in all its lines; its name if it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:MOST_LINE]


def shown(value: object) -> str:
    """A value of a damaged file or request for a message: as Python writes it, the first of it."""
    text = repr(value)
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}..."


def partial_name(name: str) -> str:
    """A name, of this process alone, for something unfinished that will be called `name`."""
    return f"{name}{PARTIAL_SUFFIX}-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Fill a file under a name of its own; it takes the place of `path` only when it is whole.

    Args:
        path: Where the file shall lie; its folder exists.

    Yields:
        The unfinished file, empty, a regular one with the usual mode. If the body raises, it is
        removed, and `path` is untouched.
    """
    partial = path.with_name(partial_name(path.name))
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_file_place(path: Path | None) -> None:
    """Try now whether a file can be written later.

    Args:
        path: The file, whose folder is made; None for none.

    Raises:
        ValueError: If there is a folder of that name, or another special file.
        OSError: If nothing can be written there.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be replaced; give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name(path.name))
    partial.touch(exist_ok=False)
    partial.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it.

    Args:
        path: The file; its folder exists.
        content: Anything `json` can write.
    """
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader never sees half of it; its folder exists."""
    with new_file(path) as partial:
        partial.write_text(text)


@overload
def read_json(path: Path) -> dict[str, Any]: ...


@overload
def read_json(path: Path, schema: type[Built], remedy: str = ...) -> Built: ...


def read_json(path: Path, schema: Any = dict[str, Any], remedy: str = "Make it again.") -> Any:
    """Read JSON of a known form.

    Args:
        path: A regular file.
        schema: What it must hold: a dataclass, whose own checks are made too, a TypedDict, or any
            other annotation; any object if it is left out. Fields that it does not know are passed
            over.
        remedy: What the user can do about a file that cannot be read, one sentence.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else; the message names file and field.
    """
    return parse_json(_bytes_of(path, remedy), schema, str(path), remedy)


def read_checked(path: Path, schema: type[Built], remedy: str) -> tuple[Built, dict[str, Any]]:
    """Read JSON of a known form, of which more is wanted than the form says.

    Args:
        path: As `read_json` takes it, as are the others.
        schema: What it must hold.
        remedy: What the user can do.

    Returns:
        What the form says of it, and everything, as it is in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else; the message names file and field.
    """
    text, name = _bytes_of(path, remedy), str(path)
    known = parse_json(text, schema, name, remedy)
    return known, parse_json(text, dict[str, Any], name, remedy)


def parse_json(text: bytes, schema: type[Built], name: str, remedy: str = "") -> Built:
    """Read JSON of a known form from memory.

    Args:
        text: The JSON.
        schema: As `read_json` takes it.
        name: What to call it in messages.
        remedy: What the user can do, one sentence.

    Raises:
        ValueError: If it is damaged, or holds something else; names the field.
    """
    try:
        return msgspec.json.decode(text, type=schema, dec_hook=_build_range)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name} is damaged ({str(error)[:MOST_SAID]}). {remedy}".strip()
        ) from error


def from_values(values: Any, schema: type[Built]) -> Built:
    """Rebuild an object from its JSON-ready form in memory.

    Raises:
        ValueError: If a value is none that the schema allows; names the field.
    """
    return msgspec.convert(values, schema, dec_hook=_build_range)


def read_versioned(path: Path, version: int, schema: type[Built], remedy: str) -> Built:
    """Read a manifest that states its format version.

    Args:
        path: A JSON object with a `format_version`.
        version: The one version that is read.
        schema: The dataclass it describes.
        remedy: What the user can do about a file that cannot be read, one sentence.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another version; the message names it.
    """
    text = _bytes_of(path, remedy)
    found = parse_json(text, _Versioned, str(path), remedy).format_version
    if found != version:
        raise ValueError(
            f"{path} has format version {found}; this foreroute reads version {version}. {remedy}"
        )
    return parse_json(text, schema, str(path), remedy)


@dataclasses.dataclass(frozen=True)
class _Versioned:
    format_version: Count | None = None


def _build_range(kind: type, value: Any) -> range:
    """Decode what msgspec does not know: a range, as its first number and one past its last."""
    if kind is not range or not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"Expected two numbers, got {type(value).__name__}")
    start, stop = (msgspec.convert(number, Count) for number in value)
    return range(start, stop)


def _bytes_of(path: Path, remedy: str) -> bytes:
    _require_regular(path)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path} is damaged ({path.stat().st_size} bytes of JSON). {remedy}")
    return path.read_bytes()


def _require_regular(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file.")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors so that a reader never sees half of them.

    Args:
        path: The file.
        tensors: By name.
        metadata: Texts for the file's header.
    """
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with new_file(path) as partial:
        mode = partial.stat().st_mode
        save_file(whole, partial, metadata)  # replaces the file by one of its own mode
        partial.chmod(mode)


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """While open, Ctrl-C stays one: torch makes a ValueError of it where it looks into a storage.

    Safetensors has it do so for every tensor that is read.
    """
    try:
        yield
    except ValueError as error:
        if SWALLOWED_INTERRUPT in str(error):
            raise KeyboardInterrupt from error
        raise


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it is one line."""
    _require_regular(path)
    try:
        with interrupts_kept(), safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:MOST_SAID]}). Make it again.") from error


def tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors.

    Raises:
        ValueError: If the file is damaged; the message names it.
        FileNotFoundError: If there is no such file.
    """
    with _opened(path) as file:
        return list(file.keys())


def read_tensors(path: Path, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Read all (or the named) tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: If the file is damaged or lacks a tensor; the message names it.
        FileNotFoundError: If there is no such file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names or tuple(file.keys())}


def require_finite(tensors: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """Refuse tensors that are no floats, or hold values that are not finite.

    Raises:
        ValueError: If there is one; names file and tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not is_finite(tensor.float()):
            raise ValueError(
                f"{path} is damaged (expected finite floats in {name}, which is {tensor.dtype} "
                f"{list(tensor.shape)}). {remedy}"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(
        torch.isfinite(tensor).all()  # finite values may have a sum that is not
    )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_digest(path: Path, digest: str, remedy: str) -> None:
    """Refuse a file whose bytes are not the recorded ones.

    Args:
        path: The file.
        digest: Its hex sha256, as it was recorded.
        remedy: What the user can do, one sentence.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another sha256; names it.
    """
    _require_regular(path)
    if sha256_of(path) != digest:
        raise ValueError(f"{path} is damaged (its sha256 is not the recorded one). {remedy}")


def device_name(device: torch.device) -> str:
    """What results call the device they were measured on: a GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour an artifact depends on."""
    versions = {"python": sys.version.split()[0]}
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
