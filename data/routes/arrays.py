"""Reads routed_experts arrays as vLLM and SGLang return them: [tokens, layers, top_k]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes.assemble import ReadOptions, route_of
from foreroute.data.routes.route import Route

SUFFIXES = (".npy", ".npz", ".safetensors")
NAME = "routed_experts"


def is_array_file(path: Path) -> bool:
    """Whether the extension is that of an array."""
    return path.is_file() and path.suffix in SUFFIXES


def read_arrays(path: Path, options: ReadOptions) -> Route:
    """Read the array; of several in one file the one called routed_experts.

    Raises:
        ValueError: If the file is damaged, or it is not clear which array is meant.
    """
    try:
        arrays = _arrays(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    name = NAME if NAME in arrays else next(iter(arrays), "")
    if len(arrays) != 1 and name != NAME:
        raise ValueError(f"{path} holds arrays {sorted(arrays)}; name the routing {NAME}.")
    return route_of(path, arrays[name], options)


def _arrays(path: Path) -> dict[str, NDArray[np.integer]]:
    if path.suffix == ".safetensors":
        from foreroute.estimators.artifacts import read_tensors

        return {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    loaded = np.load(path, allow_pickle=False)
    return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
