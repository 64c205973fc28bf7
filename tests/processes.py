"""Functions run in processes of their own: several ranks on gloo, or one that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["foreroute.data.collect", "foreroute.train.fit", "toys", "sliced_worker"]
)
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
KILLED = -signal.SIGKILL


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[int]:
    """Run a function in as many processes as torchrun would start.

    Returns:
        Exit codes, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(num_ranks)
    ]
    running = [_start(function, arguments, environment) for environment in names]
    ended = []
    for process in running:
        process.join(120)
        if process.exitcode != 0:  # as torchrun does, where one dies
            for other in running:
                other.kill()
        ended.append(process.exitcode)
    return ended


def run_killed(function: Callable[..., Any], *arguments: Any, at_operation: int) -> int:
    """Run a function in a process that is killed before its n-th change of a file or folder.

    Returns:
        Its exit code: `KILLED`, or 0 if it makes fewer changes.
    """
    process = _start(function, arguments, {}, at_operation)
    process.join(120)
    assert process.exitcode is not None
    return int(process.exitcode)


def _start(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    at_operation: int | None = None,
) -> Any:
    process = CONTEXT.Process(target=_run, args=(function, arguments, environment, at_operation))
    process.start()
    return process


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    at_operation: int | None,
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if at_operation is not None:
        _kill_at(at_operation)
    function(*arguments)


def _kill_at(operation: int) -> None:
    left = operation

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        opened = event == "open" and isinstance(details[2], int) and details[2] & os.O_ACCMODE
        if event in WRITES or opened:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
