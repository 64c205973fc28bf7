"""Keeps freed memory in the process: recording frees and asks for the same megabytes every pass.

By default the C library hands such blocks back to the system, and every page of the next pass is
faulted in anew, which cost more than recording itself.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""glibc's names for the settings (malloc.h)."""
SETTINGS = {TRIM_THRESHOLD: 2**30, TOP_PAD: 2**28, MMAP_THRESHOLD: 2**25}
"""In bytes; the last is the largest that glibc takes."""


def keep_freed_memory() -> bool:
    """Change the setting for this process; for commands, not for libraries.

    Returns:
        Whether this C library has it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) for name, value in SETTINGS.items())
