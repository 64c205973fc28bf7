"""What every command does about an interrupt and about what the system refuses."""

import subprocess
import sys

import pytest

INTERRUPTED = """
import builtins, sys
load = builtins.__import__

def interrupted(name, *rest):
    if name.partition(".")[0] in ("torch", "numpy"):
        raise KeyboardInterrupt
    return load(name, *rest)

builtins.__import__ = interrupted
sys.argv = ["command", *{arguments}]
from foreroute.{room}.cli import main
main()
"""


@pytest.mark.parametrize(
    ("room", "arguments"),
    [
        ("data", ["--out", "x"]),
        ("train", ["--traces", "x", "--out", "y"]),
        ("export", ["--run", "x", "--out", "y"]),
        ("runtime", ["generate", "--prompt", "x"]),
    ],
)
def test_an_interrupt_while_modules_load_is_one_line(room, arguments):
    program = INTERRUPTED.format(room=room, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
