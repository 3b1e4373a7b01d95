"""Pictures of samples, of samples while they form, of bits; transparent images in them."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ddpm_notes_pipeline.data import to_uint8
from ddpm_notes_pipeline.evaluation.pictures import (
    Trajectory,
    image_grid,
    on_checkerboard,
    save_bit_map,
    save_nearest,
    save_samples,
)
from ddpm_notes_pipeline.pipeline_ddpm_notes import BitsPerDimOutput


@pytest.mark.parametrize("steps, frames", [(1, 1), (7, 7), (20, 20), (50, 20), (1000, 20)])
def test_the_pictures_are_spread_over_the_steps_and_end_with_the_last(tmp_path, steps, frames):
    trajectory = Trajectory()
    path = torch.linspace(-1, 1, steps)
    for i in range(steps):  # the first image tells the step
        latents = torch.linspace(-1, 1, 64).roll(i).reshape(1, 1, 8, 8).repeat(9, 1, 1, 1)
        latents[:, :, 0, 0] = path[i]
        trajectory(latents, i, steps)
    trajectory.save(tmp_path / "t.gif")
    with PIL.Image.open(tmp_path / "t.gif") as animation:
        assert animation.n_frames == frames and animation.info["loop"] == 0
        animation.seek(frames - 1)
        last = np.asarray(animation.convert("L"))
    assert (last == np.asarray(image_grid(to_uint8(latents[:8]).numpy(), 4, side=64))).all()
    shown = [int(frame[0, 0, 0, 0]) for frame in trajectory.frames]
    wanted = [round((float(path[-(-steps * (i + 1) // frames) - 1]) + 1) * 127.5) for i in range(frames)]
    assert np.abs(np.subtract(shown, wanted)).max() <= 1


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 128, 128), (3, 200, 256), (4, 64, 64)])
def test_noise_of_any_size_is_well_below_a_megabyte(tmp_path, shape):
    trajectory = Trajectory()
    for i in range(20):
        trajectory(torch.randn(16, *shape, generator=torch.Generator().manual_seed(i)), i, 20)
    trajectory.save(tmp_path / "t.gif")
    assert (tmp_path / "t.gif").stat().st_size < 800_000
    with PIL.Image.open(tmp_path / "t.gif") as animation:
        assert animation.n_frames == 20 and max(animation.size) <= 400


@pytest.mark.parametrize(("shape", "last"), [((1, 1, 8, 8), 0), ((5, 3, 12, 9), 3), ((16, 4, 6, 6), 0)])
def test_a_map_of_bits_is_drawn_for_any_number_of_images_channels_and_steps(tmp_path, shape, last):
    """Also where the last SNR is 0, whose logarithm has no place on an axis."""
    T, generator = 30, torch.Generator().manual_seed(0)
    by_level = torch.rand(T + 1, 3, generator=generator, dtype=torch.float64)
    by_level[:last] = 0
    maps = torch.rand(shape, generator=generator)
    result = BitsPerDimOutput.from_parts(torch.ones(shape[0], 3).double(), torch.zeros(T), 64, 1, maps, by_level)
    images = (255 * maps).byte().numpy()
    save_bit_map(tmp_path / "map.png", images, result, np.array([*np.linspace(9, -9, T - 1), -math.inf]))
    with PIL.Image.open(tmp_path / "map.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert 900 < pixels.shape[1] < 1400 and 400 < pixels.shape[0] < 700
    for colour in ("1b1b3a", "8d99ae", "f4a261"):  # of each class of level
        assert (pixels == list(bytes.fromhex(colour))).all(-1).sum() > 500


@pytest.mark.parametrize("log_snr", [[5.0], [5.0, -3.0], [5.0, -math.inf]])
def test_a_model_of_one_or_two_timesteps_has_a_map(tmp_path, log_snr):
    """It had no range of log SNR to divide: evaluate.py ended before its card."""
    T = len(log_snr)
    by_level, maps = torch.ones(T + 1, 3).double(), torch.rand((2, 1, 8, 8))
    result = BitsPerDimOutput.from_parts(torch.ones(2, 3).double(), torch.zeros(T), 64, 1, maps, by_level)
    save_bit_map(tmp_path / "map.png", (255 * maps).byte().numpy(), result, np.array(log_snr))
    with PIL.Image.open(tmp_path / "map.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    bars = (pixels == list(bytes.fromhex("f4a261"))).all(-1).any(0)  # of the prior, a step and the decoder
    assert np.diff(bars.astype(int)).clip(0).sum() >= T + 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 24)])
@pytest.mark.parametrize("sets", [1, 2])
def test_images_are_drawn_above_their_nearest_ones_with_distances(tmp_path, shape, sets):
    generator = np.random.default_rng(0)
    images, nearest = (generator.integers(60, 190, (8, *shape), dtype=np.uint8) for _ in range(2))
    drawn = {f"Set {i}": (images, nearest, np.arange(8) / 7) for i in range(sets)}
    save_nearest(tmp_path / "nearest.png", drawn)
    with PIL.Image.open(tmp_path / "nearest.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert 700 < pixels.shape[1] < 1000 and 150 * sets < pixels.shape[0] < 400 * sets
    assert ((pixels > 55) & (pixels < 195)).all(-1).mean() > 0.3  # the images fill much of it
    for i in range(sets):  # below each set are its own distances
        other = {**drawn, f"Set {i}": (images, nearest, np.arange(8) / 7 + 0.1)}
        save_nearest(tmp_path / "other.png", other)
        assert (tmp_path / "other.png").read_bytes() != (tmp_path / "nearest.png").read_bytes()


# ------------------------------------------------------------ transparency


def seen(image: np.ndarray) -> np.ndarray:
    """An RGBA image (4, H, W) on squares of an eighth of its longer side, in fractions."""
    _, height, width = image.shape
    square = math.ceil(max(height, width) / 8)
    out = np.empty((3, height, width), np.uint8)
    for y, x in np.ndindex(height, width):
        board = 204 if (y // square + x // square) % 2 == 0 else 153
        alpha = Fraction(int(image[3, y, x]), 255)
        out[:, y, x] = [round(alpha * int(colour) + (1 - alpha) * board) for colour in image[:3, y, x]]
    return out


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (7, 20)])
def test_transparent_pixels_lie_on_a_checkerboard(size):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, *size), dtype=np.uint8)
    images[0, 3], images[1, 3] = 255, 0
    found = on_checkerboard(images)
    np.testing.assert_array_equal(found, np.stack([seen(image) for image in images]))
    np.testing.assert_array_equal(found[0], images[0, :3])
    assert sorted(np.unique(found[1])) == [153, 204]
    for channels in (1, 3):
        np.testing.assert_array_equal(on_checkerboard(images[:, :channels]), images[:, :channels])


def test_a_grid_of_transparent_images_is_that_of_the_images_on_the_checkerboard():
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 12, 10), dtype=np.uint8)
    grid = image_grid(images)
    assert grid.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(grid), np.asarray(image_grid(np.stack([seen(i) for i in images]))))


def test_the_animation_shows_transparent_samples_on_the_checkerboard(tmp_path):
    """Few colours, since a frame of a GIF holds 256."""
    random, trajectory = np.random.default_rng(2), Trajectory()
    levels = random.choice(np.array([0, 255], np.uint8), (3, 4, 8, 8))
    trajectory(torch.from_numpy(levels) / 127.5 - 1, 0, 1)
    trajectory.save(tmp_path / "t.gif")
    with PIL.Image.open(tmp_path / "t.gif") as animation:
        found = np.asarray(animation.convert("RGB"))
    expected = image_grid(np.stack([seen(image) for image in levels]), 3, side=64)
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_map_of_bits_shows_transparent_images_on_the_checkerboard_and_sums_all_channels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = np.random.default_rng(3).integers(0, 256, (8, 4, 8, 8), dtype=np.uint8)
    images[:, 3, :4] = 0
    maps, by_level = torch.rand(8, 4, 8, 8, generator=generator), torch.rand(21, 3, generator=generator).double()
    pictures = {}
    for name, shown, drawn in (
        ("rgba", images, maps),
        ("rgb", np.stack([seen(image) for image in images]), maps.sum(1, keepdim=True).expand(-1, 3, -1, -1) / 3),
    ):
        result = BitsPerDimOutput.from_parts(torch.ones(8, 3).double(), torch.zeros(20), 64, 1, drawn, by_level)
        save_bit_map(tmp_path / f"{name}.png", shown, result, np.linspace(9, -9, 20))
        with PIL.Image.open(tmp_path / f"{name}.png") as picture:
            pictures[name] = np.asarray(picture.convert("RGB"), int)
    assert np.abs(pictures["rgba"] - pictures["rgb"]).max() <= 2  # a sum of floats may fall in the next colour


# ------------------------------------------------------------ a row per class


def runs(values: np.ndarray) -> list[int]:
    """The values without those that equal the one before."""
    return [int(value) for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def panel_rows(path: Path, levels: list[int]) -> list[list[list[int]]]:
    """The levels of each row of images, from left to right, of the left and the right half."""
    with PIL.Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"), int)
    for level in levels:  # a colour map of grey rounds some levels down
        pixels[pixels == level - 1] = level
    halves = pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]
    found = []
    for half in halves:
        of_images = np.isin(half, levels)
        lines = of_images.sum(1) > 15  # crossing an image at least, and not a letter
        starts = np.flatnonzero(lines & ~np.roll(lines, 1))
        rows = [half[start + 5][of_images[start + 5]] for start in starts]
        found.append([[value for value in runs(row) if np.sum(row == value) > 15] for row in rows])
    return found


def test_each_class_has_a_row_of_samples_beside_one_of_real_images(tmp_path):
    """An image has its class's level, and 10 more for each image of the class before it."""
    level = {0: 30, 1: 90, 3: 150}
    real_labels, sample_labels = np.array([3, 0, 1, 0, 3]), np.array([0, 1, 3, 0, 1, 3, 0])

    def of(labels):
        counts, images = dict.fromkeys(level, 0), []
        for label in labels.tolist():
            images.append(np.full((1, 32, 32), level[label] + 10 * counts[label], np.uint8))
            counts[label] += 1
        return np.stack(images)

    save_samples(
        tmp_path / "s.png",
        of(real_labels),
        of(sample_labels),
        "samples",
        (real_labels, sample_labels),
        ["cat", "dog", "emu", "a class of a very long name, $or$ two"],
    )
    left, right = panel_rows(tmp_path / "s.png", [start + 10 * i for start in level.values() for i in range(3)])
    assert right == [[30, 40, 50], [90, 100], [150, 160]]
    assert left == [[30, 40], [90], [150, 160]]


def test_the_name_of_a_class_stands_left_of_its_row(tmp_path):
    images, labels = np.full((4, 1, 32, 32), 200, np.uint8), np.array([0, 0, 1, 1])

    def ink(names) -> list[int]:
        """Dark pixels left of the images, beside each of the two rows of the right half."""
        save_samples(tmp_path / "s.png", images, images, "samples", (labels, labels), names)
        with PIL.Image.open(tmp_path / "s.png") as picture:
            pixels = np.asarray(picture.convert("L"), int)
        right = pixels[:, pixels.shape[1] // 2 :]
        grey = right == 200
        lines, first = np.flatnonzero(grey.sum(1) > 40), np.flatnonzero(grey.sum(0) > 40)[0]
        middle = (lines[0] + lines[-1]) // 2
        return [int((part[:, :first] < 100).sum()) for part in (right[lines[0] : middle], right[middle : lines[-1]])]

    assert ink(["", ""]) == [0, 0]
    above, below = ink(["cat", ""])
    assert above > 10 and below == 0
    above, below = ink(["", "cat"])
    assert above == 0 and below > 10
    assert min(ink(None)) > 3  # the labels themselves


def test_many_rows_of_one_sample_make_no_endless_picture(tmp_path):
    images, labels = np.zeros((12, 4, 32, 32), np.uint8), np.arange(12)
    save_samples(tmp_path / "s.png", images, images, "samples", (labels, labels), list("abcdefghijkl"))
    with PIL.Image.open(tmp_path / "s.png") as picture:
        assert max(picture.size) < 1300
