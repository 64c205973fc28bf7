"""Every kernel compiles for a GPU, on a machine without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

KERNELS = Path(__file__).parents[1] / "runtime" / "device" / "kernels"


def test_every_kernel_that_is_launched_compiles_for_an_h100() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    written = {
        f"{name}:{file.stem}"
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"@triton\.jit(?:\(.*\))?\ndef (_\w+_kernel)", file.read_text())
    }
    assert set(result.stdout.split()) == written
