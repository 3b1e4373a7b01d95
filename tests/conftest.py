"""For every test: a private Hugging Face home, no network, one thread a worker; the joined file.

DDPM_NOTES_DEVICE=cuda runs the suites of scheduler, pipeline, objectives and updates on a GPU.

Runs before any test module is imported, so the environment set here is the one that torch and the
Hugging Face libraries read, in this process and in the ones that tests start.
"""

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # "gw0", "gw1", ...; None in a run without -n and in its controller

# One folder a session, one below it for each worker: the user's cache, token and accelerate
# configuration stay out of the tests, and workers do not share the folder from which downloaded
# code is imported. pytest-xdist starts its workers with the controller's environment, which is how
# they learn of the session's folder; the controller removes it.
if WORKER is None:
    SESSION_HOME = Path(tempfile.mkdtemp(prefix="ddpm_notes_tests_"))
    atexit.register(shutil.rmtree, SESSION_HOME, ignore_errors=True)
    os.environ["DDPM_NOTES_TESTS_HOME"] = str(SESSION_HOME)
HF_HOME = Path(os.environ["DDPM_NOTES_TESTS_HOME"], WORKER or "main")
HF_HOME.mkdir(exist_ok=True)

OVERRIDES = """
    DIFFUSERS_CACHE HF_ASSETS_CACHE HF_DATASETS_CACHE HF_HUB_CACHE HF_MODULES_CACHE HF_TOKEN HF_TOKEN_PATH HF_XET_CACHE
    HUGGINGFACE_HUB_CACHE HUGGING_FACE_HUB_TOKEN PYTORCH_TRANSFORMERS_CACHE TRACKIO_DIR TRANSFORMERS_CACHE
"""
for name in OVERRIDES.split():  # each would win over HF_HOME, or make a run depend on who runs it
    os.environ.pop(name, None)
os.environ.update(
    HF_HOME=str(HF_HOME),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

if WORKER is not None:  # workers already fill the cores; more threads than cores make every test slower
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if "torch" in sys.modules:  # a plugin was first: too late for the environment
        sys.modules["torch"].set_num_threads(1)

JOINED = os.environ.get("DDPM_NOTES_JOINED") == "1"
DEVICE = os.environ.get("DDPM_NOTES_DEVICE", "cpu")  # read by support/devices.py
if DEVICE != "cpu":  # the tests' bounds are those of float32, and two calls are compared bit for bit
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def use_joined_file() -> None:
    """Put the one file that is shipped to the Hub in the place of the modules it is joined from.

    The package is imported afresh on top of it: what `ddpm_notes_pipeline` re-exports, and what its
    other modules take from those, comes from the joined file as well.
    """
    package = "ddpm_notes_pipeline"
    source = importlib.import_module(f"{package}.pipeline_ddpm_notes").pipeline_source()
    shipped = importlib.import_module(f"{package}.hub.code").SHIPPED
    modules = [name.removesuffix(".py").replace("/", ".") for name in shipped]
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]

    path = HF_HOME / "joined" / "pipeline.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pipeline", path)
    joined = importlib.util.module_from_spec(spec)
    sys.modules["pipeline"] = joined
    spec.loader.exec_module(joined)
    # Checked before their names are taken: a joined file that still imports the package would test
    # the package.
    leaked = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    if leaked:
        raise RuntimeError(f"the joined file imports {leaked}: on the Hub it has to stand alone")

    for name in modules:
        sys.modules[f"{package}.{name}"] = joined
    for name in modules:  # `from .core import levels` asks the parent for its attribute
        parent, _, last = f"{package}.{name}".rpartition(".")
        setattr(importlib.import_module(parent), last, joined)


if JOINED:
    use_joined_file()


@pytest.fixture
def hub() -> Iterator[Any]:
    """A Hugging Face Hub on 127.0.0.1 for this test alone: a `loopback_hub.Hub`, started."""
    from tests.support.loopback_hub import Hub

    with Hub() as hub:
        yield hub
        assert not hub.errors, hub.errors[0]


@pytest.fixture(scope="session")
def forked() -> Iterator[Any]:
    """Runs a script in forked processes, `training/train.py` by default: a `launching.Trainer`."""
    from tests.support.launching import Trainer

    trainer = Trainer()
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def train(forked) -> Any:
    """Runs `python training/train.py FLAGS` in a forked process."""
    return forked


@pytest.fixture(scope="session")
def launch() -> Any:
    """Runs `accelerate launch training/train.py FLAGS`: the function `launching.launch`."""
    from tests.support.launching import launch

    return launch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes through the fixtures above."""
    for item in items:
        if {"launch", "forked"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("launch")


def pytest_report_header() -> str:
    return f"ddpm_notes: {'the joined file pipeline.py' if JOINED else 'the package'}; on {DEVICE}; HF_HOME={HF_HOME}"
