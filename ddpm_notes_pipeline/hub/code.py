"""The Hub's pipeline.py: the files that are shipped, joined into one by their syntax trees.

diffusers downloads a single file, and takes each relative import in it for another file to copy. So
what the pipeline needs of this package is put into one module: the absolute imports of all files,
merged, then each file's text without its imports. The result is deterministic, and its first line
names the package's version and the digest of the lines below.
"""

import ast
import hashlib
import symtable
from pathlib import Path, PurePosixPath

from .. import __version__

PACKAGE = Path(__file__).parents[1]
SHIPPED = (
    "names.py",
    "core/seeding.py",
    "core/schedules.py",
    "core/gaussian_chain.py",
    "core/levels.py",
    "core/image_batches.py",
    "core/likelihood.py",
    "stock_config.py",
    "scheduling_ddpm_notes.py",
    "pipeline_ddpm_notes.py",
)
FOOTER = """
# ---------------------------------------------------------------- a module of its own

if "__isolated__" not in globals():
    # diffusers runs the pipeline.py of every local folder as one and the same module, each over the
    # names of the last: functions of one version would find constants of another. So what this file
    # defines lives in a module named by its digest, and this one holds the same names.
    import hashlib
    import sys
    import types

    _source = Path(__file__).read_text(encoding="utf-8")
    _name = "ddpm_notes_pipeline_" + hashlib.sha256(_source.encode()).hexdigest()[:16]
    if _name not in sys.modules:
        _module = sys.modules[_name] = types.ModuleType(_name, __doc__)
        _module.__file__, _module.__isolated__ = __file__, True
        exec(compile(_source, __file__, "exec"), vars(_module))
        # what the class saves again: the file may be replaced while the class lives on
        _module.DDPMNotesPipeline.hub_source = _source
    globals().update({name: value for name, value in vars(sys.modules[_name]).items() if not name.startswith("__")})
"""


def joined_source() -> str:
    """The text of pipeline.py for the Hub, from this package's files."""
    sources = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in SHIPPED}
    text = join(sources) + FOOTER
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"# ddpm_notes_pipeline {__version__}, sha256 of the lines below {digest}\n{text}"


def join(sources: dict[str, str]) -> str:
    """The files as one module.

    Args:
        sources: texts by path in the package ("core/levels.py"), each after those it imports.

    Raises:
        ValueError: what one module could not do: two files with one top-level name; a file that is
            used as a module, under another name, before its place, or that is not among them;
            imports inside functions. The message names file and line.
    """
    imports: dict[str, str] = {}  # name -> the statement that imports it
    owners: dict[str, str] = {}  # top-level name -> its file
    bodies = []
    for path, text in sources.items():
        tree, cut = ast.parse(text), set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if node not in tree.body:
                    raise ValueError(f"{path}, line {node.lineno}: an import must be at the top level to be joined")
                cut |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                if _is_own(node):
                    _check_own_import(node, path, owners, sources)
                else:
                    _add_import(node, path, imports)
        for symbol in symtable.symtable(text, path, "exec").get_symbols():
            name = symbol.get_name()
            if symbol.is_assigned() and not symbol.is_imported() and owners.setdefault(name, path) != path:
                raise ValueError(f"{name} is defined in {owners[name]} and in {path}; a name must have one meaning")
        lines = [line for number, line in enumerate(text.splitlines(), start=1) if number not in cut]
        bodies.append(f"\n# {'-' * 64} {path}\n\n" + "\n".join(lines).strip("\n") + "\n")
    for name in {name.partition(".")[0] for name in imports} & set(owners):
        raise ValueError(f"{name} is defined in {owners[name]} and imported by another file")
    plain_first = sorted(imports.values(), key=lambda statement: (statement.startswith("from "), statement))
    return "\n".join(plain_first) + "\n" + "\n".join(bodies)


def _is_own(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether this package is imported from."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return getattr(node, "level", 0) > 0 or any(name.partition(".")[0] == PACKAGE.name for name in modules)


def _check_own_import(
    node: ast.Import | ast.ImportFrom, path: str, owners: dict[str, str], sources: dict[str, str]
) -> None:
    """Only `from .file import name` can go: the name is then there, in the same file."""
    where = f"{path}, line {node.lineno}"
    if isinstance(node, ast.Import) or node.level == 0:
        raise ValueError(f"{where}: a shipped file must import its package relatively, by the names that it uses")
    module = PurePosixPath(path).parents[node.level - 1] / (node.module or "").replace(".", "/")
    for alias in node.names:
        as_module = f"{module / alias.name}.py"
        if as_module in sources or f"{module}.py" not in sources:
            what = f"{as_module} is used as a module" if as_module in sources else f"{module}.py is not shipped"
            raise ValueError(f"{where}: {what}; a shipped file must import names of shipped files")
        if alias.name == "*" or alias.asname not in (None, alias.name):
            raise ValueError(f"{where}: {alias.name} is imported under another name; in one file it has one name")
        if owners.get(alias.name) != f"{module}.py":
            raise ValueError(f"{where}: {alias.name} is not defined in {module}.py, or that file is joined later")


def _add_import(node: ast.Import | ast.ImportFrom, path: str, imports: dict[str, str]) -> None:
    for alias in node.names:
        one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
        statement, name = ast.unparse(one), alias.asname or alias.name
        if imports.setdefault(name, statement) != statement:
            raise ValueError(f"{path}, line {node.lineno}: {name} is bound by {statement!r} and by {imports[name]!r}")
