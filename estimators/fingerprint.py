"""Names a checkpoint by its routers' weights, so that the same ones in another dtype are known."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

NUM_PROJECTIONS = 16
NEAR = 3e-3
"""Relative distance of weights that rounding explains: bfloat16 is off by 8e-4, twice over."""


def fingerprint_of(weights: Iterable[Tensor]) -> str:
    """Name a list of weights.

    Args:
        weights: Of any shapes, float.

    Returns:
        Hex sha256 of the weights as bfloat16, a dash, and the hex of these weights' sums under
        `NUM_PROJECTIONS` patterns of random signs, float32: two lists of weights are as near as
        their sums are.
    """
    digest, sums = hashlib.sha256(), torch.zeros(NUM_PROJECTIONS, dtype=torch.float64)
    for at, weight in enumerate(weights):
        rounded = weight.to(torch.bfloat16).cpu().contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
        rows = weight.shape[0] if weight.dim() else 1
        sums += _projected(rounded.float().reshape(rows, -1), at)
    return f"{digest.hexdigest()}-{struct.pack(f'<{NUM_PROJECTIONS}f', *sums.tolist()).hex()}"


def _projected(matrix: Tensor, seed: int) -> Tensor:
    """Sums of a matrix under patterns that are products of signs of rows and of columns."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(2, (NUM_PROJECTIONS, size), generator=generator).float() * 2 - 1
        for size in matrix.shape
    )
    return ((rows @ matrix) * columns).sum(dim=1, dtype=torch.float64)


def is_same_checkpoint(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, perhaps rounded to other dtypes.

    Args:
        one: As `fingerprint_of` gives it.
        other: The same.
    """
    if one.partition("-")[0] == other.partition("-")[0]:
        return True
    ours, theirs = (_sums(text) for text in (one, other))
    if ours is None or theirs is None:
        return False
    return bool((ours - theirs).norm() <= NEAR * ours.norm())


def _sums(fingerprint: str) -> Tensor | None:
    """The sums in a fingerprint, [NUM_PROJECTIONS]; None where there are none."""
    try:
        packed = bytes.fromhex(fingerprint.partition("-")[2])
        return torch.tensor(struct.unpack(f"<{NUM_PROJECTIONS}f", packed), dtype=torch.float64)
    except (ValueError, struct.error):
        return None
