"""The joined file: what can be joined is the same program, and what cannot is refused by name."""

import ast
import sys

import pytest

from ddpm_notes_pipeline.hub.code import PACKAGE, SHIPPED, join, joined_source

A = "import math\n\nONE = 1\n\n\ndef double(x):\n    return 2 * x\n"


def run(text):
    names = {}
    exec(compile(text, "joined", "exec"), names)
    return names


@pytest.mark.parametrize(
    "statement",
    [
        "from .a import ONE, double",
        "from .a import (\n    ONE,  # the first\n    double,\n)",
        "from .a import ONE\nfrom .a import double",
        "from .a import ONE as ONE\nfrom .a import (double)",
        "from .a import ONE, \\\n    double",
    ],
)
def test_imports_of_shipped_names_are_cut_however_they_are_written(statement):
    joined = join({"a.py": A, "b.py": f"{statement}\n\nTWO = double(ONE)  # of a.py\n"})
    assert run(joined)["TWO"] == 2
    assert "from ." not in joined and "TWO = double(ONE)  # of a.py" in joined


def test_names_are_found_from_and_in_folders():
    sources = {"core/a.py": A, "core/b.py": "from .a import double\n\nTWO = double(1)\n"}
    sources |= {"c.py": "from .core.b import TWO\n\nTHREE = TWO + 1\n"}
    sources |= {"other/d.py": "from ..c import THREE\nfrom ..core.a import double\n\nSIX = double(THREE)\n"}
    assert run(join(sources))["SIX"] == 6


def test_absolute_imports_of_all_files_come_first_and_once():
    sources = {
        "a.py": '"""A."""\n\nimport os\nimport math\nfrom collections import (\n    deque,\n    abc,\n)\n\nA = deque\n',
        "b.py": "import math\nimport os.path\nfrom collections import deque\n\nB = os.path.join, math.pi\n",
    }
    imports = "import math\nimport os\nimport os.path\nfrom collections import abc\nfrom collections import deque\n"
    joined = join(sources)
    assert joined.startswith(imports) and joined.count("import ") == 5
    assert run(joined)["A"].__name__ == "deque"


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ("ONE = 2\n", "ONE is defined in a.py and in b.py"),
        ("def double(x):\n    return x\n", "double is defined in a.py and in b.py"),
        ("class double:\n    pass\n", "double is defined in a.py and in b.py"),
        ("for ONE in ():\n    pass\n", "ONE is defined in a.py and in b.py"),
        ("from numbers import Number as ONE\n", "ONE is defined in a.py and imported by another file"),
        ("import cmath as math\n", "b.py, line 1: math is bound by 'import cmath as math' and by 'import math'"),
        ("from . import a\n\nTWO = a.ONE\n", "b.py, line 1: a.py is used as a module"),
        ("from .a import ONE as FIRST\n", "b.py, line 1: ONE is imported under another name"),
        ("from .a import *\n", r"b.py, line 1: \* is imported under another name"),
        ("from .a import TWO\n", "b.py, line 1: TWO is not defined in a.py"),
        ("from .c import ONE\n", "b.py, line 1: c.py is not shipped"),
        ("\nfrom ddpm_notes_pipeline.a import ONE\n", "b.py, line 2: .* relatively"),
        ("import ddpm_notes_pipeline.a\n", "b.py, line 1: .* relatively"),
        ("def f():\n    from .a import ONE\n    return ONE\n", "b.py, line 2: an import must be at the top"),
        ("def f():\n    import math\n    return math\n", "b.py, line 2: an import must be at the top"),
    ],
    ids=lambda value: value.strip().partition("\n")[0],
)
def test_what_one_file_cannot_mean_is_refused(b, message):
    with pytest.raises(ValueError, match=message):
        join({"a.py": A, "b.py": b})


def test_a_file_must_come_after_those_it_imports():
    with pytest.raises(ValueError, match=r"b.py, line 1: ONE is not defined in a.py, or that file is joined later"):
        join({"b.py": "from .a import ONE\n", "a.py": A})


def test_a_module_of_a_folder_is_refused_as_a_module():
    with pytest.raises(ValueError, match=r"b.py, line 1: core/a.py is used as a module"):
        join({"core/a.py": A, "b.py": "from .core import a\n"})


def test_the_shipped_files_import_what_comes_with_diffusers_and_each_other_alone():
    allowed = {"torch", "numpy", "PIL", "tqdm", "diffusers"} | set(sys.stdlib_module_names)
    for name in SHIPPED:
        for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).partition(".")[0] in allowed, name


def test_the_joined_file_is_the_same_every_time_and_holds_every_file():
    source = joined_source()
    assert joined_source() == source
    assert [source.index(f"- {name}\n") for name in SHIPPED] == sorted(source.index(f"- {name}\n") for name in SHIPPED)
