"""The wheel, installed with what setup.cfg asks for into an empty environment."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.launching import ROOT, TINY, TRAIN, once

pytestmark = pytest.mark.slow

CARD = """
import json, sys
import torch
from diffusers import UNet2DModel
import ddpm_notes_pipeline
from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.hub.push import export_folder

net = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 32),
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)
DDPMNotesPipeline(net, DDPMNotesScheduler(100)).save_pretrained("model")
names = export_folder("model", "exported", "user/tiny")
print(json.dumps([ddpm_notes_pipeline.__file__, names]))
"""


def run(command: list, cwd: Path, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Without this checkout on the path."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """The wheel, of a copy: a build leaves folders behind, and takes what an older one left."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "ddpm_notes_pipeline"):
        (source / name).symlink_to(ROOT / name)
    return run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], folder)


@pytest.fixture(scope="module")
def wheel() -> Path:
    folder, _ = once("wheel", build)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """Python of an environment with the wheel and its extra `train`, in the tested versions."""

    def install(folder: Path) -> subprocess.CompletedProcess[str]:
        venv.create(folder / "venv", with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", folder / "venv"]
        # like the Makefile: compiling every file takes longer than the rest
        run([*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", f"{wheel}[train]"], folder)
        return run([*pip, "check"], folder)

    folder, _ = once("wheel-installed", install)
    return folder / "venv" / "bin" / "python"


def test_the_wheel_has_every_module_and_nothing_of_the_rest(wheel):
    package = ROOT / "ddpm_notes_pipeline"
    files = {path.relative_to(ROOT).as_posix() for kind in ("*.py", "*.jinja") for path in package.rglob(kind)}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == files
    assert [name for name in names if name.endswith("LICENSE")]


def test_the_installed_package_saves_a_pipeline_with_its_card(installed, tmp_path):
    file, names = json.loads(run([installed, "-c", CARD], tmp_path).stdout)
    assert Path(file).is_relative_to(installed.parent.parent)
    assert {"model_index.json", "pipeline.py", "README.md"} <= set(names)
    assert "user/tiny" in (tmp_path / "exported" / "README.md").read_text()


def test_the_training_script_trains_with_the_installed_package(installed, tmp_path):
    flags = [*TINY, "--max_train_steps", 2, "--lr_warmup_steps", 1, "--output_dir", "run"]
    run([installed, TRAIN, *flags], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "run" / "README.md").exists()
