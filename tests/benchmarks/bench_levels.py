"""Bits of photographs with fitted levels: they gain nothing, and must lose nothing.

Digits use few of the 256 levels, photographs all of them alike. The model sees patches of the left
three quarters of scikit-learn's two photographs and is measured on patches of the right quarter,
with each decoder on the same noise.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.evaluation.yardsticks import compressed_sizes, measure_yardsticks
from ddpm_notes_pipeline.level_fit import fit_levels, level_counts
from measure import ROOT, Row, Settings, count_row, environment
from models import save_images

GAUSSIAN = "the Gaussian decoder of fixed_small"
SIDE, STRIDE, TRAINING_STEPS, FIT_IMAGES = 16, 8, 2000, 128
FLAGS = f"""
    --block_out_channels 32 64 --layers_per_block 1 --attention_levels 1 --random_flip true
    --max_train_steps {TRAINING_STEPS} --train_batch_size 32 --learning_rate 1e-3 --lr_warmup_steps 100
    --ema_max_decay 0.999 --no_fit_levels --report_to none --num_samples 1 --ddpm_num_inference_steps 2
""".split()


def photographs() -> tuple[torch.Tensor, torch.Tensor]:
    """Left three quarters and right quarter of two photographs, uint8 (2, 3, H, W)."""
    both = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    height, width = (size // SIDE * SIDE for size in both.shape[2:])
    both = both[:, :, :height, :width]
    return both[..., : 3 * width // 4], both[..., 3 * width // 4 :]


def patches(images: torch.Tensor, stride: int) -> torch.Tensor:
    """Every patch of SIDE x SIDE pixels, so many pixels apart, uint8 (N, 3, SIDE, SIDE)."""
    windows = images.unfold(2, SIDE, stride).unfold(3, SIDE, stride)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()


def trained_pipeline(images: torch.Tensor, folder: Path) -> DDPMNotesPipeline:
    """A small DDPM of the images: some minutes on one thread."""
    data = save_images(images.permute(0, 2, 3, 1).numpy(), folder / "patches")
    words = ["--dataset_name", str(data), "--output_dir", str(folder / "out"), "--cache_dir", str(folder), *FLAGS]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return DDPMNotesPipeline.from_pretrained(str(folder / "out"))


def schedulers(pipeline: DDPMNotesPipeline, training: torch.Tensor) -> dict[str, DDPMNotesScheduler]:
    """The scheduler with its own Gaussian decoder, and with levels fitted on training patches."""
    few = training[torch.linspace(0, len(training) - 1, FIT_IMAGES).long()]
    levels = fit_levels(pipeline, few, counts=level_counts([training])).levels
    config = pipeline.scheduler.config
    return {GAUSSIAN: pipeline.scheduler, "levels": DDPMNotesScheduler.from_config(config, levels=levels)}


def levels() -> list[Row]:
    """Bits/dim with levels beside a Gaussian decoder and beside simple codes.

    Raises:
        RuntimeError: levels cost more than the Gaussian, by four standard errors.
    """
    left, right = photographs()
    training, held_out = patches(left, STRIDE), patches(right, SIDE)
    held_out = held_out[
        torch.linspace(0, len(held_out) - 1, min(len(held_out), round(len(held_out) * Settings.effort))).long()
    ]
    with tempfile.TemporaryDirectory() as name:
        pipeline = trained_pipeline(training, Path(name))
    pipeline.set_progress_bar_config(disable=True)
    bits = {}
    for decoder, scheduler in schedulers(pipeline, training).items():
        pipeline.scheduler = scheduler
        bits[decoder] = pipeline.bits_per_dim(held_out, pilot_images=held_out)
    ours, theirs = bits["levels"], bits[GAUSSIAN]
    change = ours.per_image - theirs.per_image
    error = float(change.std()) / math.sqrt(len(change))
    if change.mean() > 4 * error:
        raise RuntimeError(f"levels cost {change.mean():.4f} ± {error:.4f} bits/dim more than the Gaussian")
    what = f"bits/dim of {len(held_out)} patches of photographs (16x16x3), levels"
    beside = f"{what} ({change.mean():+.4f} ± {error:.4f})"
    rows = [count_row(beside, GAUSSIAN, theirs.total, ours.total, "bits/dim")]
    whole = 8 * sum(compressed_sizes(image)["WebP"] for image in right) / right.numel()
    codes = {**measure_yardsticks([training], [held_out]).bits, "WebP of the two quarters whole": whole}
    return rows + [count_row(what, code, theirs, ours.total, "bits/dim") for code, theirs in codes.items()]
