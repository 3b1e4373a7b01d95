"""Each module imports only what setup.cfg declares for it, in install_requires or in an extra.

An undeclared import works until the package that happened to bring it stops doing so.
"""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import ROOT
from tests.support.oldest import canonical, constraints, declared, oldest_versions

DECLARED = {part: set(versions) for part, versions in declared().items()}
EVERYWHERE = DECLARED[""]
PACKAGE = ROOT / "ddpm_notes_pipeline"
ENGINE = [*(PACKAGE / "training").glob("*.py"), PACKAGE / "evaluation" / "pictures.py"]
TRAINING = sorted([*(ROOT / "training").glob("*.py"), *ENGINE])
MODULES = sorted(set(PACKAGE.rglob("*.py")) - set(ENGINE))
OWN = {"ddpm_notes_pipeline", "tests"}
OPTIONAL_BY_NAME = {"import_eval": "eval"}  # ... and `_optional`, which is told the extra
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of each import statement and each import_module("name")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            yield from ((name.value, node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant))


def optional_imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """(module, extra, line) of each _optional("module", "extra") and import_eval("module")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        function = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
        if function in ("_optional", *OPTIONAL_BY_NAME):
            module, *extra = [argument.value for argument in node.args]
            yield module, extra[0] if extra else OPTIONAL_BY_NAME[function], node.lineno


def undeclared(module: str, allowed: set[str]) -> bool:
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top in OWN or module.startswith("."):
        return False
    return not allowed & {canonical(name) for name in DISTRIBUTIONS.get(top, [top])}


def strangers(path: Path, allowed: set[str]) -> list[str]:
    return [f"{path.name}:{line}: {module}" for module, line in imports(path) if undeclared(module, allowed)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_package_imports_what_comes_with_it(path):
    missing = strangers(path, EVERYWHERE)
    assert not missing, f"not in install_requires of setup.cfg: {missing}"


def test_what_a_module_asks_an_extra_for_is_in_that_extra():
    asked = [(path.name, *found) for path in MODULES for found in optional_imports(path)]
    assert {extra for _, _, extra, _ in asked} == {"train", "mnist", "eval"}
    missing = [found for found in asked if undeclared(found[1], EVERYWHERE | DECLARED[found[2]])]
    assert not missing, f"not in that extra of setup.cfg: {missing}"


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_the_training_scripts_import_what_the_extra_train_brings(path):
    missing = strangers(path, EVERYWHERE | DECLARED["train"])
    assert not missing, f"neither in install_requires nor in the extra train of setup.cfg: {missing}"


def test_the_demo_imports_what_its_own_requirements_bring():
    lines = (ROOT / "examples" / "space" / "requirements.txt").read_text().splitlines()
    names = {canonical(match[0]) for line in lines if (match := re.match(r"[A-Za-z][\w.-]*", line))}
    app = ROOT / "examples" / "space" / "app.py"
    missing = strangers(app, names | {"gradio"})  # sdk in its README.md
    assert not missing, f"not in requirements.txt: {missing}"
    missing = strangers(app, EVERYWHERE | DECLARED["demo"])
    assert not missing, f"neither in install_requires nor in the extra demo of setup.cfg: {missing}"


def test_the_walk_through_and_the_tests_import_what_the_extra_test_brings():
    """Beside what the extras bring that it names."""
    everything = set().union(*DECLARED.values())
    tests = ROOT / "tests"
    modules = [*tests.rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    own = {name for path in modules for name in (path.stem, path.parent.name)}
    found = [(path, module, line) for path in modules for module, line in imports(path)]
    missing = [
        f"{path.name}:{line}: {module}"
        for path, module, line in found
        if module.split(".")[0] not in own and undeclared(module, everything)
    ]
    assert not missing, f"in no part of setup.cfg: {missing}"


def test_every_requirement_has_a_lower_bound_which_is_the_oldest_version_tested():
    oldest = oldest_versions()
    assert {"torch", "huggingface-hub", "matplotlib", "gradio"} <= oldest.keys() and "pytest" not in oldest
    lines = constraints()
    assert f"huggingface-hub=={oldest['huggingface-hub']}" in lines and oldest["huggingface-hub"].startswith("1.")
    assert len({canonical(re.split("[=<]", line)[0]) for line in lines}) == len(lines)  # each once
