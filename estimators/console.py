"""What all foreroute commands share: flags from a signature, one-line errors, exit codes."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
CLOSED_PIPE_EXIT_CODE = 141
"""As the shell has it for a process that the closed pipe ended."""
Command = Callable[..., Any]


def run_command(
    name: str, command: Command | dict[str, Any], arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line, call the command, and end the process with its exit code.

    A parameter `batch_size` becomes the flag `--batch-size`; a bool becomes `--resume` and
    `--no-resume`. Bad input (ValueError, FileNotFoundError and the like) is one line on stderr and
    exit code 2.

    Args:
        name: The console script's name, for messages.
        command: A function whose keyword arguments are the flags, or subcommands by name.
        arguments: What was typed after the name; `sys.argv[1:]` if None.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    _write_any_text()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if typed == ["--version"]:
        print(f"{name} {metadata.version('foreroute')}")
        return
    with one_line_errors(name):
        from jsonargparse import auto_cli

        auto_cli(
            command,
            args=_with_dashes(typed),
            prog=name,
            as_positional=False,
            parser_class=_parser_class(),
        )
        sys.stdout.flush()


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """End the process with one line and an exit code where the body fails as a user can cause it.

    Args:
        name: The console script's name.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read what is printed has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE_EXIT_CODE)
    except OSError as error:
        _fail(name, _of_system(error))
    except (ValueError, ImportError) as error:
        _fail(name, str(error))
    except KeyboardInterrupt as stopped:
        hint = str(stopped) or "the same command goes on where it stopped."
        print(f"{name}: interrupted; {hint}", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: brackets and colons in names are no markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, stderr=stderr)


def _of_system(error: OSError) -> str:
    """What the system refused, and where; as it is if it was raised by hand."""
    if error.strerror is None or error.filename is None:
        return str(error)
    names = [str(path) for path in (error.filename, error.filename2) if path is not None]
    return f"{' -> '.join(names)}: {error.strerror}."


def _write_any_text() -> None:
    """Print UTF-8 where the locale has no letters beyond ASCII, and never fail on a letter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def _with_dashes(typed: list[str]) -> list[str]:
    """What was typed, with a `--` that follows a flag as its value: argparse would drop it."""
    words: list[str] = []
    for word in typed:
        if word == "--" and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += "=--"
        else:
            words.append(word)
    return words


def _fail(name: str, message: str) -> NoReturn:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR_EXIT_CODE)


def _parser_class() -> Any:
    """A jsonargparse parser with dashes in flags, switches for bools, and one-line errors."""
    from jsonargparse import ActionYesNo, ArgumentParser
    from jsonargparse._core import ArgumentGroup  # the only way to reach a group's arguments

    class Restyled:
        def add_argument(self, *names: str, **options: Any) -> Any:
            if options.get("type") is bool:
                del options["type"]
                options["action"] = ActionYesNo(no_prefix="no-")
            if "--print_config" not in names:
                names = tuple(name.replace("_", "-") for name in names)
            return super().add_argument(*names, **options)  # type: ignore[misc]

    class Group(Restyled, ArgumentGroup):
        pass

    class Parser(Restyled, ArgumentParser):
        _group_class = Group

        def _get_values(self, action: Any, arg_strings: list[str]) -> Any:
            is_dashes = arg_strings == ["--"] and action.option_strings and action.nargs is None
            # Python below 3.13 drops a value of two dashes.
            if is_dashes:
                return self._get_value(action, "--")
            return super()._get_values(action, arg_strings)

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            _fail(self.prog.replace(" [options]", ""), message)

    return Parser
