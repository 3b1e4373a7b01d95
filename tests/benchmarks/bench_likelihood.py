"""Evaluations for bits/dim: all T terms per image beside a random few, at equal standard error."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from measure import ROOT, Row, Settings, count_row, environment

IMAGES, TRAINING_STEPS = 48, 400


def trained_pipeline(folder: Path) -> DDPMNotesPipeline:
    """A short training run on the digits: the spread of the terms depends on the network."""
    words = ["--config", "training/configs/digits.yaml", "--max_train_steps", str(TRAINING_STEPS), "--num_samples", "1"]
    words += ["--ddpm_num_inference_steps", "2", "--output_dir", str(folder / "out"), "--cache_dir", str(folder)]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return DDPMNotesPipeline.from_pretrained(str(folder / "out"))


def likelihood() -> list[Row]:
    """Evaluations at equal standard error are proportional to (evaluations) x (standard error)^2.

    The standard error falls with the root of their number, whether they go to more images or more
    terms.
    """
    with tempfile.TemporaryDirectory() as name:
        pipeline = trained_pipeline(Path(name))
        pipeline.set_progress_bar_config(disable=True)
        pixels = load_images("digits", split="test", cache_dir=name, show_progress=False)
        images = pixels.take(torch.arange(min(len(pixels), round(IMAGES * Settings.effort))))
        full = pipeline.bits_per_dim(images, full=True)
        rows = []
        for evaluations in (38, 12):
            few = pipeline.bits_per_dim(images, evaluations_per_image=evaluations, pilot_images=images)
            distance = abs(few.total - full.total) / (few.standard_error**2 + full.standard_error**2) ** 0.5
            if distance > 4:
                raise RuntimeError(f"{few.total} and {full.total} bits/dim are {distance:.1f} standard errors apart")
            # The pilot takes 16 images, however large the set: spread over the 10,000 of CIFAR-10's
            # test.
            pilot = (few.network_evaluations / len(images) - evaluations) * len(images) / 10_000
            equal = (evaluations + pilot) * (few.standard_error / full.standard_error) ** 2
            errors = f"{full.total:.3f} ± {full.standard_error:.3f} and {few.total:.3f} ± {few.standard_error:.3f}"
            rows.append(
                count_row(
                    f"bits/dim of {len(images)} digits, {evaluations} evaluations an image ({errors})",
                    "the full sum over T = 1000, at equal standard error",
                    full.network_evaluations / len(images),
                    equal,
                    "evaluations/image",
                    "x fewer",
                )
            )
    return rows
