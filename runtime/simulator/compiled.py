"""Compiles the replay's inner loops; imported by them alone, as numba takes a while to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile a function over arrays and numbers; the machine code is kept on disk.

    What it calls must be compiled in the same file: numba's cache looks at that file alone. With
    NUMBA_DISABLE_JIT=1 in the environment it runs as it is, for a debugger.
    """
    fast: Function
    try:
        fast = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder can be written: compile in every process
        fast = numba.njit(nogil=True)(function)
    return fast
