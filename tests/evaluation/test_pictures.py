"""The animation of samples while they form: about 20 frames, small enough for a card."""

import math

import numpy as np
import PIL.Image
import pytest
import torch

from ddpm_notes_pipeline.data import to_uint8
from ddpm_notes_pipeline.evaluation.pictures import Trajectory, image_grid, save_bit_map, save_nearest
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
