"""Start-up: --help and a first step beside `import torch`, our import beside diffusers' own."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench_training import OurTraining
from measure import ROOT, Row, Settings, environment, ratio_row, rounds_of

ROUNDS = 11
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "training/train.py --help": ["training/train.py", "--help"],
    "training/evaluate.py --help": ["training/evaluate.py", "--help"],
    "from diffusers import DDPMPipeline": ["-c", "from diffusers import DDPMPipeline"],
    "from ddpm_notes_pipeline import DDPMNotesPipeline": ["-c", "from ddpm_notes_pipeline import DDPMNotesPipeline"],
}
DIGITS = ["--config", "training/configs/digits.yaml", "--report_to", "none"]


def clock() -> float:
    """Seconds on the clock of `Settings`; CPU time is that of processes that have ended."""
    return sum(os.times()[2:4]) if Settings.clock == "cpu" else time.perf_counter()


def whole_process(words: list[str]) -> float:
    """Seconds that an interpreter takes from start to end."""
    started = clock()
    subprocess.run([sys.executable, *words], env=environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return clock() - started


def first_step(folder: Path) -> float:
    """Seconds until training/train.py has written its first loss; decodes the images once."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    training = OurTraining(folder, DIGITS, logging_steps=1)
    try:
        return training.run(1)
    finally:
        training.end()


def startup() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], float]] = {
            what: partial(whole_process, words) for what, words in COMMANDS.items()
        }
        calls["first step"] = partial(first_step, Path(folder))
        times: dict[str, list[float]] = {what: [] for what in calls}
        for i in range(rounds_of(ROUNDS) + 1):
            for what, call in calls.items():
                seconds = call()
                if i > 0:  # the first round fills the caches
                    times[what].append(seconds)
    torch, step = times["import torch"], times["first step"]
    scripts = [what for what in COMMANDS if what.endswith("--help")]
    theirs, ours = list(COMMANDS)[-2:]
    return [
        *(ratio_row(f"`{what}`", "`import torch`", torch, times[what], limit=True) for what in scripts),
        ratio_row("training/train.py to its first step, digits, cached", "`import torch`", torch, step, limit=True),
        ratio_row(f"`{ours}`", f"`{theirs}`", times[theirs], times[ours], limit=True),
    ]
