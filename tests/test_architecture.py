"""The rooms import only what lies below them, and the wheel ships every package."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room -> what it may import from foreroute, besides itself
ALLOWED: dict[str, tuple[str, ...]] = {
    "estimators": (),
    "data": ("estimators",),
    "train": ("estimators", "data"),
    "export": ("estimators", "data", "train"),
    "runtime": ("estimators", "data.adapters", "data.routes", "export.bundle", "export.hub"),
}

# The umbrella command reaches across rooms, lazily, inside functions.
COMMAND_LINES = {"cli.py"}


def imported(path: Path) -> set[str]:
    """Dotted names below `foreroute` that one file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("foreroute.") for name in names if name.startswith("foreroute.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_what_lies_below(room: str) -> None:
    allowed = (room, *ALLOWED[room])
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        if path.name in COMMAND_LINES:
            continue
        above = [n for n in imported(path) if not any(f"{n}.".startswith(f"{a}.") for a in allowed)]
        assert not above, f"{path.relative_to(ROOT)} imports {above}; {room} may use {allowed}"


def test_every_package_is_listed_in_pyproject() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inits = [p for room in ALLOWED for p in (ROOT / room).rglob("__init__.py")]
    found = {".".join(["foreroute", *p.parent.relative_to(ROOT).parts]) for p in inits}
    assert found == set(pyproject["tool"]["setuptools"]["packages"])


def test_runtime_loads_neither_the_training_stack_nor_the_simulators_compiler() -> None:
    code = (
        "import sys, foreroute.runtime; "
        "print(*{'lightning', 'datasets', 'matplotlib', 'numba', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_estimators_and_bundles_need_only_torch_and_safetensors() -> None:
    code = (
        "import sys, foreroute.estimators, foreroute.export.bundle; "
        "print(*{'lightning', 'datasets', 'sklearn', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
