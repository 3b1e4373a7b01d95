"""The walk-through of the notes: the script runs, and the notebook is that script, executed.

The script is the source. After changing it, from the root of the repository:

    jupytext --to ipynb examples/notes_walkthrough.py
    jupyter execute --inplace examples/notes_walkthrough.ipynb
"""

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import PIL.Image
import pytest
from nbclient import NotebookClient

from tests.support.launching import ROOT

SCRIPT = ROOT / "examples" / "notes_walkthrough.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
# /usr/lib, ~/x, C:\x and file:// are places on one machine; 8/255 and and/or are not.
ABSOLUTE_PATH = re.compile(r"(?<![\w.\-/:])~?/[\w.\-]+/|\b[A-Za-z]:\\|file://")


def pictures(notebook: Any) -> list[PIL.Image.Image]:
    """Every picture among the outputs, in order."""
    encoded = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [PIL.Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook: Any) -> list[str]:
    """The text of the outputs."""
    printed = [output.get("text", "") for output in outputs(notebook)]
    return printed + [output.get("data", {}).get("text/plain", "") for output in outputs(notebook)]


def sources(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_the_script(committed):
    assert sources(committed) == sources(jupytext.read(SCRIPT)), f"they differ; how to pair them: {Path(__file__).name}"


def test_the_notebook_was_executed_from_top_to_bottom(committed):
    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [
        output for output in outputs(committed) if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_the_notebook_shows_a_picture_for_each_figure_that_its_code_draws(committed):
    drawn = sum(source.count("plt.show()") for kind, source in sources(committed) if kind == "code")
    shown = pictures(committed)
    assert len(shown) == drawn >= 10
    for picture in shown:
        assert len(picture.convert("L").getcolors() or []) > 10  # not an empty canvas
    assert NOTEBOOK.stat().st_size < 1.5 * 2**20


def test_the_notebook_names_no_place_on_the_machine_that_ran_it(committed):
    found = [match.group() for text in texts(committed) for match in ABSOLUTE_PATH.finditer(text)]
    assert not found
    assert not ABSOLUTE_PATH.search(str(committed.metadata))


@pytest.mark.slow
def test_the_script_runs_whole_from_another_folder_and_draws_what_the_notebook_shows(committed, tmp_path, monkeypatch):
    """Its own assertions hold the library to the closed forms. Two minutes: it trains."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # conftest's would draw nowhere
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads on busy cores wait for each other
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    notebook = jupytext.read(SCRIPT)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(pictures(notebook)) == len(pictures(committed))
    assert not list(tmp_path.iterdir())  # nothing is left behind
    found = [match.group() for text in texts(notebook) for match in ABSOLUTE_PATH.finditer(text)]
    assert not found
