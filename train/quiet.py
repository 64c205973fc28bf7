"""Keeps Lightning's progress bar and drops its notices, for good or for a while."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

LOGGERS = ("lightning.pytorch", "lightning.fabric")


def quieten_lightning() -> None:
    """Drop the notices from now on."""
    import lightning  # noqa: F401  (sets its loggers' levels when imported)

    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Drop the notices while this is open, say of many short fits."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        with warnings.catch_warnings():
            quieten_lightning()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
