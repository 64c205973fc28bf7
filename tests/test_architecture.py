"""The rooms import only what lies below them, in no circle, and the wheel ships every package."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
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
FILES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))

# They alone reach across rooms, lazily, inside functions; nothing but another one imports them.
COMMAND_LINES = {
    "data.cli",
    "export.cli",
    "export.compare.cli",
    "export.report.cli",
    "runtime.cli",
    "runtime.evaluation.cli",
    "runtime.serving.cli",
    "runtime.simulator.cli",
    "runtime.tune.cli",
    "train.cli",
}
MOST_FILES_IN_RUNTIME = 12
MEDIAN_FILE_LINES, MEDIAN_FUNCTION_LINES = 125, 10


def name_of(path: Path) -> str:
    """A file's dotted name below `foreroute`; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BY_NAME = {name_of(path): path for path in FILES}


def statements(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names below `foreroute` that some statements import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("foreroute.") for name in names if name.startswith("foreroute.")}


def files_imported(path: Path) -> set[str]:
    """Names of the files that one file imports, wherever in it."""
    names = imported(ast.walk(statements(path)))
    return {name if name in BY_NAME else name.rpartition(".")[0] for name in names}


def is_below(name: str, allowed: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{room}.") for room in allowed)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(statements(path)) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_what_lies_below(room: str) -> None:
    allowed = (room, *ALLOWED[room])
    files = [path for path in FILES if is_below(name_of(path), [room])]
    assert files
    for path in files:
        tree = statements(path)
        is_command_line = name_of(path) in COMMAND_LINES
        # a command line's functions may reach further; what runs when it is imported may not
        names = imported(tree.body if is_command_line else ast.walk(tree))
        above = [name for name in names if not is_below(name, allowed)]
        assert not above, f"{path.relative_to(ROOT)} imports {above}; {room} may use {allowed}"


def test_no_library_file_imports_a_command_line() -> None:
    assert {name for name in BY_NAME if name.endswith(".cli")} == COMMAND_LINES
    for name, path in BY_NAME.items():
        reached = files_imported(path) & COMMAND_LINES
        assert name in COMMAND_LINES or not reached, f"{name} imports {reached}"


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {name: files_imported(path) - {name} for name, path in BY_NAME.items()}
    assert sum(map(len, graph.values())) > len(graph)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_root_of_runtime_stays_small() -> None:
    assert len(list((ROOT / "runtime").glob("*.py"))) <= MOST_FILES_IN_RUNTIME


def test_files_and_functions_stay_short() -> None:
    lines = [len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"]
    assert statistics.median(lines) <= MEDIAN_FILE_LINES
    spans = [node.end_lineno - node.lineno + 1 for path in FILES for node in functions(path)]
    assert statistics.median(spans) <= MEDIAN_FUNCTION_LINES


def test_docstrings_have_a_subject() -> None:
    for name, path in BY_NAME.items():
        texts = [
            node.value.value
            for node in ast.walk(statements(path))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ]
        bare = [text for text in texts if isinstance(text, str) and text.startswith("Of ")]
        assert not bare, f"{name}: {bare}"


def test_what_a_constructor_takes_is_said_there_and_nowhere_else() -> None:
    for name, path in BY_NAME.items():
        for node in ast.walk(statements(path)):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            assert "Args:" not in (ast.get_docstring(node) or ""), f"{name}.{node.name}"
            if name.startswith("estimators.forms."):
                continue  # they take what `EstimatorForm` takes
            for made_by in node.body:
                if isinstance(made_by, ast.FunctionDef) and made_by.name == "__init__":
                    takes = len(made_by.args.args) + len(made_by.args.kwonlyargs) > 1
                    assert not takes or ast.get_docstring(made_by), f"{name}.{node.name}"


def test_the_map_names_every_package_and_only_files_that_are_there() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    packages = {path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"}
    assert not [str(package) for package in packages if f"`{package}/`" not in text]
    files = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    assert len(files) > 50
    roots = (ROOT, ROOT / "runtime" / "device")  # it calls kernels by their folder
    assert not [file for file in files if not any((root / file).is_file() for root in roots)]
    assert len(text.splitlines()) <= 200


def test_every_package_is_listed_in_pyproject() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inits = [p for room in ALLOWED for p in (ROOT / room).rglob("__init__.py")]
    found = {".".join(["foreroute", *p.parent.relative_to(ROOT).parts]) for p in inits}
    assert found == set(pyproject["tool"]["setuptools"]["packages"])


def loaded_by(imports: str) -> set[str]:
    """Modules that are loaded after an import where neither Triton nor numba can be."""
    code = (
        "import sys; sys.modules |= {'triton': None, 'numba': None}; "
        f"import {imports}; print(*(name for name, module in sys.modules.items() if module))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_runtime_needs_neither_the_training_stack_nor_a_compiler() -> None:
    loaded = loaded_by("foreroute.runtime")
    assert not loaded & {"lightning", "datasets", "matplotlib", "sklearn"}
    assert not [name for name in loaded if name.startswith("foreroute.runtime.device.")]


def test_estimators_and_bundles_need_only_torch_and_safetensors() -> None:
    loaded = loaded_by("foreroute.estimators, foreroute.export.bundle")
    assert not loaded & {"lightning", "datasets", "sklearn", "transformers"}
