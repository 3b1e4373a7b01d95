"""Evaluations for bits/dim: all T terms per image beside a random few, at equal standard error."""

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from measure import ROOT, Row, Settings, count_row, environment, rounds_of

IMAGES, TRAINING_STEPS, SEEDS = 48, 400, 20
LARGE_SET = 10_000  # images that the pilot's evaluations are spread over, as in CIFAR-10's test set


def trained_pipeline(folder: Path) -> DDPMNotesPipeline:
    """A short training run on the digits: the spread of the terms depends on the network."""
    words = ["--config", "training/configs/digits.yaml", "--max_train_steps", str(TRAINING_STEPS), "--num_samples", "1"]
    words += ["--ddpm_num_inference_steps", "2", "--output_dir", str(folder / "out"), "--cache_dir", str(folder)]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return DDPMNotesPipeline.from_pretrained(str(folder / "out"))


def likelihood() -> Iterator[Row]:
    """Evaluations at equal standard error, for the digits and a model of 4,000 MNIST images."""
    with tempfile.TemporaryDirectory() as name:
        models = {"digits": trained_pipeline(Path(name))}
        models["mnist"] = DDPMNotesPipeline.from_pretrained(ROOT / "tests" / "examples" / "ddpm-mnist-4000")
        for data, pipeline in models.items():
            pipeline.set_progress_bar_config(disable=True)
            pixels = load_images(data, split="test", cache_dir=name, show_progress=False)
            images = pixels.at_most(min(len(pixels), round(IMAGES * Settings.effort)))
            yield from beside_the_full_sum(pipeline, images.take(range(len(images))), data)


def beside_the_full_sum(pipeline: DDPMNotesPipeline, images: torch.Tensor, data: str) -> Iterator[Row]:
    """A row for each number of evaluations an image.

    Evaluations at equal standard error are proportional to (evaluations) x (standard error)^2: the
    error falls with the root of their number, whether they go to more images or more terms.

    Raises:
        RuntimeError: the mean over the seeds is four standard errors off the full sum.
    """
    full = pipeline.bits_per_dim(images, full=True)
    for evaluations in (8, 12):
        settings = {"evaluations_per_image": evaluations, "pilot_images": images}
        runs = [pipeline.bits_per_dim(images, seed=seed, **settings) for seed in range(rounds_of(SEEDS))]
        totals = torch.tensor([run.total for run in runs], dtype=torch.float64)
        variance = statistics.mean(run.standard_error**2 for run in runs)
        pilot = runs[0].network_evaluations - evaluations * len(images)
        # of the noise alone, in which the runs differ: their images are the same
        noise = [float((run.per_image - full.per_image).var()) / len(images) for run in runs]
        said, spread = math.sqrt(statistics.mean(noise)), float(totals.std())
        # the full sum has noise of its own, less than that of any run
        distance = abs(float(totals.mean()) - full.total) / math.hypot(spread / math.sqrt(len(runs)), spread)
        if distance > 4:
            raise RuntimeError(f"{float(totals.mean())} and {full.total} bits/dim are {distance:.1f} errors apart")
        errors = f"{full.total:.3f} ± {full.standard_error:.3f} in full, {float(totals.mean()):.3f} ± {math.sqrt(variance):.3f}"
        yield count_row(
            f"bits/dim of {len(images)} images of {data}, {evaluations} evaluations an image ({errors}; "
            f"spread over {len(runs)} seeds {spread:.4f}, as the errors say {said:.4f})",
            "the full sum over T = 1000, at equal standard error",
            full.network_evaluations / len(images),
            (evaluations + pilot / LARGE_SET) * variance / full.standard_error**2,
            "evaluations/image",
            "x fewer",
        )
