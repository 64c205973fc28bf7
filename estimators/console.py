"""What every command shares: flags from a function's signature, one-line errors, exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
Command = Callable[..., Any]


def run_command(
    name: str, command: Command | dict[str, Any], arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line, call the command, and end the process with its exit code.

    Bad input (ValueError, FileNotFoundError and the like) is one line on stderr and exit code 2.

    Args:
        name: The console script's name, for messages.
        command: A function whose keyword arguments are the flags, or subcommands by name.
        arguments: What was typed after the name; `sys.argv[1:]` if None.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from jsonargparse import auto_cli

    try:
        auto_cli(
            command,
            args=list(arguments) if arguments is not None else None,
            prog=name,
            as_positional=False,
        )
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        message = " ".join(str(error).split())
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
