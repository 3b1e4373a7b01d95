"""What is imported, and when: --help needs no torch, a first step no plots, metrics or trackers.

Untimed: a module that is not imported costs nothing. `make bench ONLY=startup` measures the rest.
"""

import subprocess
import sys

import pytest

from tests.support.launching import ROOT, describe, environment_of_runs

# Each of these takes a second or more, but for accelerate.
HEAVY = {"torch", "diffusers", "datasets", "accelerate"}
# Needed at the end of a run, if at all.
LATE = {"matplotlib", "torchmetrics", "tensorboard", "trackio", "wandb", "efficientnet_lite_pytorch"}
FIRST_STEP = """
import sys
from ddpm_notes_pipeline.training.arguments import DataArguments, ModelArguments, RunArguments
from ddpm_notes_pipeline.training.run import TrainingRun

model = ModelArguments(block_out_channels=[32, 32], layers_per_block=1)
run = TrainingRun(DataArguments("digits"), model, RunArguments(sys.argv[1], max_train_steps=1, report_to="none"))
run.update(*next(run.batches()))
print(*{name.partition(".")[0] for name in sys.modules})
"""
BESIDE_DIFFUSERS = """
import sys
from diffusers import DDPMPipeline

before = set(sys.modules)
from ddpm_notes_pipeline import DDPMNotesPipeline
print(*(set(sys.modules) - before))
"""


def python(*command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    options = {"cwd": ROOT, "env": environment_of_runs(), "capture_output": True, "text": True, "timeout": 150}
    result = subprocess.run([sys.executable, *command], **options)
    assert result.returncode == expect, describe(result)
    return result


def imported_by(*command: str, expect: int) -> tuple[set[str], str]:
    """The packages that a command imports, and what it prints beside."""
    result = python("-X", "importtime", *command, expect=expect)
    lines = result.stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    printed = result.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))
    return {name.partition(".")[0] for name in names}, printed


@pytest.fixture(scope="module")
def of_the_library():
    """What the library that reads the flags imports itself: torch, before transformers 5.5."""
    return imported_by("-c", "from transformers import HfArgumentParser", expect=0)[0]


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("train.py --help", 0, "--dataset_name"),
        ("evaluate.py --help", 0, "--dataset_name"),
        ("train.py --learning_rat 1", 2, "did you mean --learning_rate?"),
        ("evaluate.py --model outputs/a --max_image 1", 2, "did you mean --max_images?"),
        ("train.py --config nowhere.yaml", 2, "nowhere.yaml"),
        ("train.py --dataset_name digits --train_data_dir pngs", 2, "exactly one of them must be given"),
        ("evaluate.py --model a --dataset_name digits --samplers ddim", 2, "they must go with --metrics"),
        ("evaluate.py --model a --dataset_name digits --guidance_scales 2", 2, "it must go with --metrics"),
    ],
)
def test_help_and_mistakes_in_the_flags_wait_for_no_torch(line, status, words, of_the_library):
    script, *flags = line.split()
    names, printed = imported_by(f"training/{script}", *flags, expect=status)
    assert words in printed
    assert "ddpm_notes_pipeline" in names
    assert sorted((names - of_the_library) & HEAVY) == []


@pytest.mark.slow
def test_a_first_step_waits_for_nothing_that_the_end_of_a_run_needs(tmp_path):
    names = set(python("-c", FIRST_STEP, str(tmp_path / "out")).stdout.splitlines()[-1].split())
    assert HEAVY <= names
    assert sorted(names & LATE) == []


@pytest.mark.slow
def test_the_pipeline_imports_what_diffusers_own_does_and_its_own_files_alone():
    more = python("-c", BESIDE_DIFFUSERS).stdout.split()
    assert "ddpm_notes_pipeline.pipeline_ddpm_notes" in more
    assert not [name for name in more if name.partition(".")[0] != "ddpm_notes_pipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_an_extra_that_is_not_installed_is_one_line(script):
    """Before anything is trained: pictures come last."""
    code = "import importlib.util as u, runpy, sys; find = u.find_spec; "
    code += "u.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest); "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--dataset_name", "digits", *(["--model", "none"] if script == "evaluate.py" else [])]
    result = python("-c", code, f"training/{script}", *flags, expect=1)
    expected = f'{script}: error: matplotlib is missing: pip install "ddpm_notes_pipeline[train]"'
    assert result.stderr.strip().splitlines()[-1] == expected and "Traceback" not in result.stderr


def test_the_package_alone_waits_for_nothing():
    names, _ = imported_by("-c", "import ddpm_notes_pipeline", expect=0)
    assert "ddpm_notes_pipeline" in names and not names & (HEAVY | {"numpy", "transformers"})
