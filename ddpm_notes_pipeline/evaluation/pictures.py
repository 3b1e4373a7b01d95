"""Pictures that a run leaves: losses, samples beside real images, samples as they form."""

import contextlib
import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..core.likelihood import BitsPerDimOutput
from ..data import to_uint8

LIGHT, DARK, SQUARES = 204, 153, 8  # of the checkerboard below transparent pixels; squares along a side
LONGEST_NAME = 20  # of a class, in letters
DPI, TALLEST = 110, 10  # pixels an inch; of a grid of samples, in inches

if importlib.util.find_spec("matplotlib") is None:  # fails before anything is trained
    raise ImportError('matplotlib is missing: pip install "ddpm_notes_pipeline[train]"')


@contextlib.contextmanager
def _figure(
    path: Path, rows: int, columns: int, widths: Sequence[float] | None = None, **options: Any
) -> Iterator[Any]:
    """The axes of a figure that is saved when the block ends: (rows, columns)."""
    from matplotlib.figure import Figure  # when there is something to draw: training does without its 25 MiB

    figure = Figure(layout="constrained", **options)
    yield figure.subplots(rows, columns, sharex=rows > 1, squeeze=False, width_ratios=widths)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def on_checkerboard(images: np.ndarray) -> np.ndarray:
    """RGBA images as they are seen over light and dark grey squares: (N, 4, H, W) -> (N, 3, H, W).

    Both are uint8, rounded to the nearest level. Images of other channels are returned as they are.
    """
    if images.shape[1] != 4:
        return images
    square = math.ceil(max(images.shape[2:]) / SQUARES)
    rows, columns = (np.arange(side) // square for side in images.shape[2:])
    board = np.where((rows[:, None] + columns) % 2, DARK, LIGHT)
    colours, alpha = images[:, :3].astype(np.int32), images[:, 3:].astype(np.int32)
    return ((alpha * colours + (255 - alpha) * board + 127) // 255).astype(np.uint8)


def image_grid(images: np.ndarray, columns: int | None = None, side: int = 32) -> Image.Image:
    """Images (N, C, H, W) uint8 in a grid, about square unless `columns` says otherwise.

    Small images are enlarged by whole pixels to about `side` pixels. RGBA images lie on a
    checkerboard.
    """
    images = on_checkerboard(images)
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = scale = max(1, math.ceil(side / max(height, width)))
    tiles = images.repeat(scale, axis=2).repeat(scale, axis=3)
    # white left of each image and above it, and where the last row is not full
    tiles = np.pad(tiles, ((0, rows * columns - n), (0, 0), (gap, 0), (gap, 0)), constant_values=255)
    height, width = tiles.shape[2:]
    grid = tiles.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    canvas = np.pad(
        grid.reshape(rows * height, columns * width, channels), ((0, gap), (0, gap), (0, 0)), constant_values=255
    )
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def class_grid(images: np.ndarray, labels: np.ndarray, classes: Sequence[int], columns: int) -> Image.Image:
    """`image_grid` with a row for each of `classes`, white where it has too few images."""
    seen = on_checkerboard(images)
    grid = np.full((len(classes), columns, *seen.shape[1:]), 255, np.uint8)
    for row, label in zip(grid, classes, strict=True):
        of_class = seen[labels == label]
        row[: len(of_class)] = of_class
    return image_grid(grid.reshape(-1, *seen.shape[1:]), columns)


def save_samples(
    path: Path,
    real: np.ndarray,
    samples: np.ndarray,
    title: str,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Real images on the left, samples on the right, both (N, C, H, W) uint8.

    Args:
        labels: of the real images and of the samples. With them each class of the samples has a
            row, its name at its left.
        class_names: by label; None: the labels themselves.
    """
    grids, names = [image_grid(real), image_grid(samples)], []
    if labels is not None:
        classes = np.unique(labels[1]).tolist()
        columns = max(int(np.bincount(some).max()) for some in labels)
        pairs = zip((real, samples), labels, strict=True)
        grids = [class_grid(images, some, classes, columns) for images, some in pairs]
        known = dict(enumerate(class_names or ()))
        names = [known.get(label, str(label)) for label in classes]
    width, height = grids[0].size
    broad = 1.5 * width / DPI if names else 0  # long rows would lose pixels in five inches
    inches = min(max(5, broad), TALLEST * width / height)  # a grid's width
    with _figure(path, 1, 2, figsize=(max(6, 2 * inches), inches * height / width + 0.4)) as axes:
        for axis, name, grid in zip(axes[0], ("real images", title), grids, strict=True):
            axis.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")  # of RGB the map is ignored
            axis.set_title(name, fontsize=10)
            places = (np.arange(len(names)) + 0.5) * height / max(1, len(names)) - 0.5
            short = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
            axis.set_yticks(places, short, fontsize=8, parse_math=False)
            axis.set_xticks([])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)


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
    at, values = np.asarray(steps), np.asarray(losses)
    at, values = at[np.isfinite(values)], values[np.isfinite(values)]
    window = max(1, len(values) // 100)
    with _figure(path, 1 + bool(validation), 1, figsize=(7, 6 if validation else 4)) as axes:
        above, below = axes[0, 0], axes[-1, 0]
        above.plot(at, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
        if len(values) > window:
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            above.plot(at[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
        above.set(ylabel="loss", title=title, yscale="log" if (values > 0).all() else "linear")
        if validation:
            columns = ("step", "bits_per_dim", "standard_error")
            at, bits, errors = (np.array([row[name] for row in validation], float) for name in columns)
            below.plot(at, bits, color="tab:orange", marker="o", markersize=3, label="validation, ± standard error")
            below.fill_between(at, bits - errors, bits + errors, color="tab:orange", alpha=0.25)
            wide = np.nanmax(bits) > 10 * np.nanmin(bits) > 0 if np.isfinite(bits).any() else False
            below.set(ylabel="bits/dim", yscale="log" if wide else "linear")
        below.set(xlabel="optimizer step")
        for axis in axes[:, 0]:
            axis.legend()
            axis.grid(alpha=0.3)


def save_bits_per_dim(path: Path, curves: dict[str, np.ndarray], title: str) -> None:
    """Where the bits are: (T,) bits/dim of each timestep, and their running sum from t = 0 upwards.

    Terms are means over 50 ranges of timesteps: few evaluations an image resolve no more.
    """
    with _figure(path, 1, 2, figsize=(10, 4)) as axes:
        left, right = axes[0]
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
        left.figure.suptitle(title)


def save_bit_map(path: Path, images: np.ndarray, result: BitsPerDimOutput, log_snr: np.ndarray) -> None:
    """Where the bits are in images, and at which noise: up to 8 images above their maps, and bars.

    Args:
        images: (N, C, H, W) uint8.
        result: of these images, measured with `return_map`.
        log_snr: (T,), of each timestep.
    """
    assert result.maps is not None and result.by_level is not None
    with _figure(path, 1, 2, (1, 1.1), figsize=(11, 4.6)) as axes:
        _draw_maps(axes[0, 0], images[:8], result.maps[:8].sum(1).numpy())
        _draw_bars(axes[0, 1], result.by_level.numpy(), log_snr)
        n = len(result.per_image)
        title = (
            f"{result.total:.3f} ± {result.standard_error:.3f} bits/dim" if n > 1 else f"{result.total:.3f} bits/dim"
        )
        axes[0, 1].set_title(f"Where they are spent: {title} over {n} image{'s' if n > 1 else ''}", fontsize=10)


def save_nearest(path: Path, sets: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Images above their nearest training images, with the distance below.

    Args:
        sets: by name: images and their nearest ones, both (N, C, H, W) uint8, and distances (N,).
    """
    with _figure(path, len(sets), 1, figsize=(8, 2.6 * len(sets))) as axes:
        for axis, (name, (images, nearest, distances)) in zip(axes[:, 0], sets.items(), strict=True):
            picture = image_grid(np.concatenate([images, nearest]), columns=len(images))
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(f"{name}, and their nearest training images", fontsize=10)
            axis.axis("off")
            for i, distance in enumerate(distances):  # no ticks: they would be shared by all axes
                place = (i + 0.5) * picture.width / len(images)
                axis.text(place, 1.02 * picture.height, f"{distance:.3f}", ha="center", va="top")


def _draw_maps(axis: Any, images: np.ndarray, maps: np.ndarray) -> None:
    """Rows of up to four images above their maps (N, H, W), in bits a pixel."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, float(np.quantile(maps, 0.995))), "magma")
    grey = images.shape[1] < 3
    seen = images[:, :1] if grey else on_checkerboard(images)
    pictures = np.broadcast_to(seen, (len(images), 3, *images.shape[2:]))
    drawn = np.asarray(colours.cmap(colours.norm(maps), bytes=True))[..., :3].transpose(0, 3, 1, 2)
    columns, rows = min(4, len(images)), []
    for i in range(0, len(images), columns):
        for tiles in (pictures[i : i + columns], drawn[i : i + columns]):
            rows.append(np.pad(tiles, ((0, columns - len(tiles)), *[(0, 0)] * 3), constant_values=255))
    axis.imshow(image_grid(np.concatenate(rows), columns), interpolation="nearest")
    axis.set_title("Images, and the bits of each pixel", fontsize=10)
    axis.axis("off")
    axis.figure.colorbar(colours, ax=axis, label="bits per pixel", extend="max", aspect=30, pad=0.03)


def _draw_bars(axis: Any, by_level: np.ndarray, log_snr: np.ndarray, bins: int = 12) -> None:
    """bits/dim of prior, ranges of log SNR and decoder, stacked by class of level."""
    from matplotlib.ticker import MaxNLocator

    last = int(np.flatnonzero(by_level[:-1].sum(1))[0])  # the path's: the decoder's
    steps = np.delete(np.arange(len(log_snr)), last)
    finite = log_snr[steps][np.isfinite(log_snr[steps])]
    low, high = (finite[-1], finite[0]) if len(finite) else (0.0, 0.0)
    high = max(high, low + 1)  # two timesteps have one bar
    position = np.clip((log_snr[steps] - low) / (high - low) * bins, 0, bins)  # -inf with the lowest
    sums = np.zeros((bins, 3))
    np.add.at(sums, position.astype(int).clip(max=bins - 1), by_level[steps])
    bars = np.concatenate([by_level[-1:], sums, by_level[last : last + 1]])
    at, bottom = np.array([-1.5, *(np.arange(bins) + 0.5), bins + 1.5]), np.zeros(len(bars))
    classes = {"lowest level (0)": "#1b1b3a", "levels between": "#8d99ae", "highest level (255)": "#f4a261"}
    for values, (name, colour) in zip(bars.T, classes.items(), strict=True):
        axis.bar(at, values, 0.85, bottom, label=f"{name}: {values.sum():.3f}", color=colour)
        bottom += values
    ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(low, high) if low <= tick <= high]
    places = [(tick - low) / (high - low) * bins for tick in ticks]
    axis.set_xticks([at[0], *places, at[-1]], ["prior", *(f"{tick:g}" for tick in ticks), "decoder"])
    axis.set(xlabel="log SNR of the noisy image: noise on the left, data on the right", ylabel="bits/dim")
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    axis.legend(title="bits/dim spent on pixels of", fontsize=8, title_fontsize=8)
