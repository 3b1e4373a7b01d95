"""Pictures that a run leaves: losses, samples beside real images, samples as they form."""

import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import to_uint8

if importlib.util.find_spec("matplotlib") is None:  # fails before anything is trained
    raise ImportError('matplotlib is missing: pip install "ddpm_notes_pipeline[train]"')


def pyplot() -> Any:
    """matplotlib's, imported when there is something to draw: training does without its 25 MiB."""
    if "matplotlib.pyplot" not in sys.modules:  # a notebook has chosen where it draws
        importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def image_grid(images: np.ndarray, columns: int | None = None, side: int = 32) -> Image.Image:
    """Images (N, C, H, W) uint8 in a grid, about square unless `columns` says otherwise.

    Small images are enlarged by whole pixels to about `side` pixels.
    """
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = max(1, math.ceil(side / max(height, width)))
    rows = math.ceil(n / columns)
    gap = scale
    canvas = np.full(
        (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (i // columns) * (height * scale + gap) + gap, (i % columns) * (width * scale + gap) + gap
        enlarged = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale] = enlarged
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def save_samples(path: Path, real: np.ndarray, samples: np.ndarray, title: str) -> None:
    """Real images on the left, samples on the right, both (N, C, H, W) uint8."""
    plt = pyplot()
    pictures = [("real images", image_grid(real)), (title, image_grid(samples))]
    width, height = pictures[0][1].size
    figure, axes = plt.subplots(1, 2, figsize=(10, 5 * height / width + 0.4), layout="constrained")
    for axis, (name, picture) in zip(axes, pictures, strict=True):
        grey = picture.mode == "L"
        axis.imshow(picture, cmap="gray" if grey else None, vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


class Trajectory:
    """The first few samples as they form, as an animation of about 20 frames well below 1 MB.

    To be given to `sampling.sample` as `watch`. Noise compresses badly: of large images it shows
    fewer, and none larger than 128 pixels a side.
    """

    FRAMES, IMAGES, SIDE, PIXELS = 20, 8, 128, 24576

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []

    def __call__(self, latents: torch.Tensor, i: int, steps: int) -> None:
        """Keep x (B, C, H, W), pixels in [-1, 1], of step i of `steps` if it is a frame."""
        if (i + 1) * self.FRAMES // steps == i * self.FRAMES // steps and i + 1 < steps:
            return
        side = max(latents.shape[2:])
        few = latents[: max(1, min(self.IMAGES, self.PIXELS // min(side, self.SIDE) ** 2))].float()
        if side > self.SIDE:
            few = torch.nn.functional.interpolate(few, scale_factor=self.SIDE / side, mode="area")
        self.frames.append(to_uint8(few).cpu().numpy())

    def save(self, path: Path) -> None:
        """Write an endless GIF that rests on the last frame."""
        pictures = [image_grid(frame, columns=min(4, len(frame)), side=64) for frame in self.frames]
        durations = [120] * (len(pictures) - 1) + [2000]  # milliseconds
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_losses(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    title: str,
    validation: Sequence[dict[str, Any]] = (),
) -> None:
    """Loss of each step, and its running mean over a hundredth of the run; bits/dim below it.

    `validation` has the rows of validation.jsonl: "step", "bits_per_dim" and "standard_error",
    drawn as a band; None where one was not finite.
    """
    plt = pyplot()
    figure, axes = plt.subplots(
        1 + bool(validation), 1, figsize=(7, 6 if validation else 4), sharex=True, squeeze=False, layout="constrained"
    )
    axis = axes[0, 0]
    values = np.asarray(losses)
    steps, values = np.asarray(steps)[np.isfinite(values)], values[np.isfinite(values)]
    window = max(1, len(values) // 100)
    axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    if len(values) > window:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    axis.set(ylabel="loss", title=title)
    if (values > 0).all():
        axis.set_yscale("log")
    axis.legend()
    if validation:
        below = axes[1, 0]
        columns = ("step", "bits_per_dim", "standard_error")
        at, bits, errors = (np.array([row[name] for row in validation], float) for name in columns)
        below.plot(at, bits, color="tab:orange", marker="o", markersize=3, label="validation, ± standard error")
        below.fill_between(at, bits - errors, bits + errors, color="tab:orange", alpha=0.25)
        wide = np.nanmax(bits) > 10 * np.nanmin(bits) > 0 if np.isfinite(bits).any() else False
        below.set(ylabel="bits/dim", yscale="log" if wide else "linear")
        below.legend()
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    axes[-1, 0].set(xlabel="optimizer step")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def save_bits_per_dim(path: Path, curves: dict[str, np.ndarray], title: str) -> None:
    """Where the bits are: (T,) bits/dim of each timestep, and their running sum from t = 0 upwards.

    Terms are means over 50 ranges of timesteps: few evaluations an image resolve no more.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, bits in curves.items():
        T = len(bits)
        edges = np.unique(np.linspace(1, T, min(T, 51)).round().astype(int))
        means = [bits[a:b].mean() for a, b in itertools.pairwise(edges)]
        (line,) = left.step(edges[:-1], means, where="post", label=name)
        left.plot([0], bits[:1], marker="o", color=line.get_color())
        right.plot(np.arange(T), bits.cumsum(), color=line.get_color(), label=name)
    left.set(xlabel="timestep t (0, the dot: the decoder)", ylabel="bits/dim of one timestep", yscale="log")
    right.set(xlabel="timestep t", ylabel="bits/dim of timesteps 0..t", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
