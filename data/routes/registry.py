"""The kinds of recorded routing that can be read, told apart by extension and content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foreroute.data.routes.arrays import is_array_file, read_arrays
from foreroute.data.routes.assemble import ReadOptions
from foreroute.data.routes.megatron import is_megatron, read_megatron
from foreroute.data.routes.route import Route
from foreroute.data.routes.tables import (
    is_activation_list,
    is_table,
    read_activation_list,
    read_table,
)
from foreroute.data.routes.traces import is_traces, read_traces


@dataclass(frozen=True, kw_only=True)
class RouteReader:
    """Reads one kind of file."""

    kind: str
    """Its name, in messages."""
    about: str
    """What such a file is."""
    matches: Callable[[Path], bool]
    """Whether a path is of this kind, from its name and first bytes."""
    read: Callable[[Path, ReadOptions], Route]
    """Read it; raises ValueError with the file's name."""


READERS: list[RouteReader] = [
    RouteReader(
        kind="traces",
        about="a folder that collect-traces wrote",
        matches=is_traces,
        read=read_traces,
    ),
    RouteReader(
        kind="arrays",
        about="routed_experts of vLLM or SGLang, [tokens, layers, top_k]: .npy, .npz, .safetensors",
        matches=is_array_file,
        read=read_arrays,
    ),
    RouteReader(
        kind="megatron",
        about="Megatron's router trace: .jsonl with step, layer and top_indices",
        matches=is_megatron,
        read=read_megatron,
    ),
    RouteReader(
        kind="table",
        about="CSV with a header naming step (or token), layer and expert, as route_trace writes",
        matches=is_table,
        read=read_table,
    ),
    RouteReader(
        kind="llama.cpp",
        about="CSV of llama.cpp's moe-trace: one `layer,expert` row per activation",
        matches=is_activation_list,
        read=read_activation_list,
    ),
]
"""In the order they are tried."""


def read_route(path: Path | str, options: ReadOptions | None = None) -> Route:
    """Read recorded routing of any known kind.

    Args:
        path: File or folder.
        options: What the file itself does not say.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is of no known kind (lists them), or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no recorded routing at {path}.")
    for reader in READERS:
        if reader.matches(path):
            return reader.read(path, options or ReadOptions())
    kinds = "; ".join(f"{reader.kind} ({reader.about})" for reader in READERS)
    raise ValueError(f"{path} is no recorded routing of a known kind. Known: {kinds}.")
