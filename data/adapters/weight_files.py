"""Finds and opens the files that hold a checkpoint's tensors: the ones transformers would read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from foreroute.estimators.artifacts import MOST_SAID, first_line

LFS_POINTER = b"version https://git-lfs"
NO_SAFETENSORS = (
    "{} has no safetensors files. Other formats (pytorch_model.bin) run code when they are opened, "
    "so they are not read; convert the checkpoint to safetensors first."
)


class WeightFiles(Mapping[str, Any]):
    """The tensors of a checkpoint by name, in safetensors' slices: read when they are indexed.

    A name that two files have stands for the later file's tensor, as in transformers.
    """

    def __init__(self, paths: list[Path], *, dtype: torch.dtype | None = None) -> None:
        """Open the files.

        Args:
            paths: Of the safetensors files, in the order in which transformers reads them.
            dtype: Of the checkpoint, where its index says it.

        Raises:
            ValueError: If one is missing, incomplete or something else; names the file.
        """
        self.paths = paths
        self._handles = [_open(path) for path in paths]
        self._where = {key: handle for handle in self._handles for key in handle.keys()}  # noqa: SIM118
        self._dtype = dtype

    def __getitem__(self, name: str) -> Any:
        return self._where[name].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def dtype(self) -> torch.dtype:
        """What transformers takes the checkpoint to be in where its config is silent."""
        if self._dtype is not None:
            return self._dtype
        for name in self._handles[0].keys():  # noqa: SIM118
            tensor = self._handles[0].get_slice(name)
            dtype: torch.dtype = tensor[:0].dtype if tensor.get_shape() else tensor[...].dtype
            if dtype.is_floating_point:
                return dtype
        return torch.float32


def find_weight_files(source: str, config: Any, **hub: Any) -> WeightFiles:
    """Open the safetensors files that transformers would load a model from.

    Args:
        source: A local folder, or a Hub id (files are downloaded if they are not cached).
        config: The model's; it may name the file.
        **hub: Revision, cache_dir, token, local_files_only, subfolder, as transformers takes them.

    Raises:
        ValueError: If there are none, or one cannot be read; pickled checkpoints are never opened.
    """
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    folder = Path(source, hub.get("subfolder") or "")
    try:
        found, index = _get_resolved_checkpoint_files(
            source,
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=True,  # or the Hub would be asked to convert what is not safetensors
            transformers_explicit_filename=getattr(config, "transformers_weights", None),
            download_kwargs={name: hub[name] for name in hub if name != "trust_remote_code"},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_not_found(source, folder, error)) from error
    paths = [Path(path) for path in found or ()]
    if not paths:
        raise ValueError(f"The index of {source} lists no files of weights.")
    if folder.is_dir():
        for path in paths:
            _require_inside(path, folder)
    return WeightFiles(paths, dtype=_dtype_of(index))


def _not_found(source: str, folder: Path, error: Exception) -> str:
    if isinstance(error, OSError) and any(w in str(error) for w in ("no file named", "appear to")):
        return NO_SAFETENSORS.format(source)
    indexes = sorted(folder.glob("*.safetensors.index.json")) if folder.is_dir() else []
    for index in indexes:
        try:
            content = json.loads(index.read_text())
            sorted(set(content["weight_map"].values())), dict(content["metadata"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{index} is no index of a checkpoint's tensors{_lfs_hint(index)}."
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"The weights of {source} cannot be found: {what}"


def _require_inside(path: Path, folder: Path) -> None:
    """An index may name files of its own folder only, links in it included."""
    if Path(os.path.normpath(path.absolute())).is_relative_to(os.path.normpath(folder.absolute())):
        return
    raise ValueError(f"The index in {folder} names {path}, which lies outside: not opened.")


def _dtype_of(index: Mapping[str, Any] | None) -> torch.dtype | None:
    named = (index or {}).get("dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    return dtype if isinstance(dtype, torch.dtype) else None


def _open(path: Path) -> Any:
    name = path.name[:MOST_SAID]
    if not os.path.isfile(path):  # noqa: PTH113  Path's own raises for names that are too long
        raise ValueError(f"The checkpoint {path.parent} lacks {name}, which its index lists.")
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is incomplete or no safetensors file ({str(error)[:MOST_SAID]})"
            f"{_lfs_hint(path)}. Download it again."
        ) from error


def _lfs_hint(path: Path) -> str:
    """Says so where a file is what Git leaves in the place of a large one."""
    with path.open("rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return ": it is a Git LFS pointer, `git lfs pull` gets the file itself" if is_pointer else ""
