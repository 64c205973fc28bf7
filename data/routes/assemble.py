"""Puts the parts of a recording together to a route."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes.route import ABSENT, Route
from foreroute.estimators.types import MOST_EXPERTS

MOST_LISTED = 64
"""Cells of an array for each expert that a file lists, at most: a route has few gaps."""
FEW_CELLS = 1 << 20
"""Arrays as small as this may have any gaps."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What some kinds of file do not say themselves."""

    num_experts: int | None = None
    """E; the highest id seen plus 1 where neither file nor user says."""
    prompt_tokens: int = 0
    """So many tokens at the start are of the prompt, in files that do not tell."""


def route_of(
    path: Path,
    expert_ids: NDArray[np.integer],
    options: ReadOptions,
    *,
    is_decode: NDArray[np.bool_] | None = None,
    num_experts: int | None = None,
) -> Route:
    """A route from its array.

    Args:
        path: Where it comes from.
        expert_ids: [T, L, K], any integer dtype; -1 for none.
        options: What the user said.
        is_decode: [T]; by `options.prompt_tokens` if None.
        num_experts: E, where the file says.

    Raises:
        ValueError: If it is no sensible route.
    """
    if expert_ids.ndim != 3 or expert_ids.dtype.kind not in "iu":
        raise ValueError(
            f"{path} holds {expert_ids.dtype} of shape {list(expert_ids.shape)}; expected integers "
            "[tokens, layers, top_k]."
        )
    if expert_ids.size == 0 or not -1 <= expert_ids.min() <= expert_ids.max() <= MOST_EXPERTS:
        raise ValueError(f"{path} holds no expert ids, or some outside -1..{MOST_EXPERTS}.")
    if is_decode is None:
        is_decode = np.arange(len(expert_ids)) >= options.prompt_tokens
    experts = options.num_experts or num_experts or int(expert_ids.max()) + 1
    if not 0 < experts <= MOST_EXPERTS:
        raise ValueError(f"{path}: a layer cannot have {experts} experts.")
    return Route(
        name=str(path),
        expert_ids=expert_ids.astype(np.int16),
        is_decode=is_decode,
        num_experts=experts,
    )


def fill_cells(
    path: Path, cells: Mapping[tuple[int, int], Sequence[int]], tokens: Iterable[int]
) -> NDArray[np.int64]:
    """An array from experts by (token, layer).

    Args:
        path: For messages.
        cells: Experts in the router's order.
        tokens: Tokens in order.

    Returns:
        [T, L, K] int64; -1 where nothing was recorded. Layers are in order of their numbers.

    Raises:
        ValueError: If there is nothing.
    """
    if not cells:
        raise ValueError(f"{path} has no routing in it.")
    tokens = list(tokens)
    rows = {token: row for row, token in enumerate(tokens)}
    layers = {layer: at for at, layer in enumerate(sorted({layer for _, layer in cells}))}
    top_k = max(map(len, cells.values()))
    num_cells = len(rows) * len(layers) * top_k
    if num_cells > max(FEW_CELLS, MOST_LISTED * sum(map(len, cells.values()))):
        raise ValueError(
            f"{path} names {len(rows)} tokens, {len(layers)} layers and up to {top_k} experts, but "
            f"lists only {len(cells)} of their choices; is it damaged?"
        )
    array = np.full((len(rows), len(layers), top_k), ABSENT, dtype=np.int64)
    for (token, layer), experts in cells.items():
        if not 0 <= min(experts, default=0) <= max(experts, default=0) <= MOST_EXPERTS:
            raise ValueError(f"{path} holds expert ids outside 0..{MOST_EXPERTS}.")
        array[rows[token], layers[layer], : len(experts)] = experts
    return array
