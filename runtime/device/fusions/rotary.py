"""Replaces a modeling file's rotary embedding by one kernel where both rotate alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from foreroute.runtime.device.fusions.deferred import settled
from foreroute.runtime.device.fusions.heads import rotated
from foreroute.runtime.device.kernels.rotary import rotate, rotate_reference

FUNCTION_NAME = "apply_rotary_pos_emb"
SAMPLE_DIM = 16
TOLERANCE = 1e-6

Rotation = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: Any, undo: ExitStack) -> int:
    """Fuse the rotation in every modeling file that the model's modules come from.

    Args:
        model: Transformers model.
        undo: Gets the callbacks that put the original functions back.

    Returns:
        How many functions were replaced.
    """
    num_fused = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file = sys.modules[name]
        original = getattr(file, FUNCTION_NAME, None)
        if original is None:
            continue
        if shares := shares_of(original):
            setattr(file, FUNCTION_NAME, _fused(original, shares))
            undo.callback(setattr, file, FUNCTION_NAME, original)
            num_fused += 1
    return num_fused


def shares_of(rotation: Rotation) -> list[int]:
    """How many times narrower than a head the tables may be; none if it turns otherwise."""
    return [share for share in (1, 2) if _rotates_alike(rotation, SAMPLE_DIM // share)]


def _rotates_alike(original: Rotation, table_width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, SAMPLE_DIM, generator=generator)
    k = torch.randn(1, 1, 3, SAMPLE_DIM, generator=generator)
    angles = torch.randn(1, 3, SAMPLE_DIM // 2, generator=generator)
    angles = angles if table_width < SAMPLE_DIM else torch.cat([angles, angles], dim=-1)
    tables = angles.cos(), angles.sin()
    try:
        got = original(q, k, *tables)
    except (TypeError, RuntimeError):  # it takes something else
        return False
    expected = rotate_reference(q, k, *tables)
    if not isinstance(got, tuple) or len(got) != len(expected):
        return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, atol=TOLERANCE)
        for a, b in zip(got, expected, strict=True)
    )


def _fused(original: Rotation, shares: list[int]) -> Rotation:
    """The kernel for calls of the verified kind, the original for any other."""

    def rotation(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and not kwargs:
            deferred = rotated(*args, shares)
            if deferred is not None:
                return deferred
            q, k, cos, sin = (settled(arg) for arg in args)
            if _is_verified(q, k, cos, sin, shares):
                return rotate(q, k, cos, sin)
        return original(*args, **kwargs)

    return rotation


def _is_verified(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, shares: list[int]) -> bool:
    """Whether a call is of the kind that was compared with the kernel's."""
    return (
        q.shape[-1] == k.shape[-1]
        and q.shape[-1] in [share * cos.shape[-1] for share in shares]
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
    )
