"""The order of imports inside the package: each room imports those before it and no other."""

import ast
import sys
from pathlib import Path

import pytest

from ddpm_notes_pipeline.hub.code import PACKAGE

ROOT = PACKAGE.parent
# From the inside out. Modules of one line may import each other.
ORDER = [
    ["names"],
    ["core"],
    ["stock_config"],
    ["scheduling_ddpm_notes"],
    ["pipeline_ddpm_notes"],
    ["objectives", "variances", "level_fit", "oracles", "data"],
    ["evaluation"],
    ["hub"],
    ["training"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Kept for old imports: they forward to a module that has moved.
FORWARDS = {"batches.py", "publishing.py", "testing.py"}
STANDARD = set(sys.stdlib_module_names)
CORE_IMPORTS = {"torch", "numpy", "diffusers.utils.BaseOutput"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of all imports in a file, those in functions too."""
    folder = path.parent.relative_to(ROOT).parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent != PACKAGE]
FILES = [path for path in FILES if path.relative_to(PACKAGE).as_posix() not in FORWARDS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_those_before_it_alone(path):
    room, wrong = room_of(path), []
    for line, name in imported(path):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == PACKAGE.name and other in RANK and RANK[other] > RANK[room]:
            wrong.append((line, f"{room} imports {name}"))
    assert not wrong


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.name)
def test_core_needs_torch_numpy_and_diffusers_base_output_alone(path):
    for line, name in imported(path):
        first = name.partition(".")[0]
        known = {first, name} & CORE_IMPORTS or name.startswith(f"{PACKAGE.name}.core.")
        assert known or first in STANDARD, f"line {line}: core imports {name}"


def test_the_pipeline_names_hub_code_only_where_it_saves():
    tree = ast.parse((PACKAGE / "pipeline_ddpm_notes.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    naming = [
        node.name
        for node in tree.body
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and inner.value == ".hub.code"
    ]
    assert naming == ["pipeline_source"] and "pipeline_source" in [node.name for node in functions]


def test_the_package_imports_no_script_test_or_example():
    for path in FILES:
        assert not [name for _, name in imported(path) if name.partition(".")[0] in ("training", "tests", "examples")]
