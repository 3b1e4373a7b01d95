"""Taking images of a set, and parts of one."""

import pickle
import zlib

import numpy as np
import pytest
import torch

from ddpm_notes_pipeline.data import HELD_OUT, hold_out
from tests.data.making import levels_of, random_pixels, write_images


def test_index_outside_the_set_is_refused(digits):
    assert digits.take([]).shape == (0, 1, 8, 8)
    assert torch.equal(digits.take(torch.tensor([5, 5])), digits.take(np.array([5, 5])))
    for index in ([-1], [0, 1438]):
        with pytest.raises(IndexError, match=r"0\.\.1437"):
            digits.take(index)


def test_pickled_set_leaves_its_pixels_in_the_file(load):
    images = load(dataset_name="digits", resolution=64)
    assert images.take([7]).shape == (1, 1, 64, 64)
    again = pickle.loads(blob := pickle.dumps(images))
    assert len(blob) < 20_000 < images.file.path.stat().st_size
    assert torch.equal(again.take([7]), images.take([7]))


@pytest.mark.parametrize("share, count", [(0.3, 3), (0.04, 1)])
def test_held_out_images_are_none_of_those_trained_on(load, tmp_path, share, count):
    names = [f"{'ab'[n % 2]}/{n}.png" for n in range(20 if share == 0.04 else 10)]
    images = load(write_images(tmp_path / "f", names), label_column="label")
    training, held_out = hold_out(images, share, seed=0)
    assert len(held_out) == count and held_out.split == HELD_OUT
    assert sorted(levels_of(training) + levels_of(held_out)) == sorted(levels_of(images))
    for part in (training, held_out):
        assert part.labels.tolist() == [level % 2 for level in levels_of(part)]
    again = hold_out(images, share, seed=0)
    assert [part.fingerprint for part in again] == [training.fingerprint, held_out.fingerprint]
    others = [hold_out(images, share, seed=seed)[1] for seed in range(1, 9)]
    assert len({one.fingerprint for one in (held_out, *others)}) > 3


def test_held_out_images_are_those_of_every_version(digits):
    """Of the formula, written out: another version does not train on what was held out before."""
    random = np.random.default_rng(np.random.SeedSequence([7, zlib.crc32(b"held_out")]))
    assert hold_out(digits, 0.1, seed=7)[1].index.tolist() == sorted(random.permutation(1438)[:144])


def test_a_part_of_images_of_many_sizes_holds_their_pixels(tmp_path, load):
    files = {f"{n:02d}.png": random_pixels(16 + n, 40 - n, seed=n) for n in range(12)}
    images = load(write_images(tmp_path / "f", files), resolution=8)
    training, held_out = hold_out(images, 0.25, seed=3)
    for part in (training, held_out):
        assert (part.take(range(len(part))) == images.take(part.index)).all()
    half = hold_out(images, 0.5, seed=3)[1]
    few = half.at_most(2)
    assert len(few) == 2 and set(few.index) < set(half.index) and half.at_most(6) is half
    assert (few.take([0, 1]) == images.take(few.index)).all()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.001, 0.999, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(load, tmp_path, share):
    images = load(write_images(tmp_path / "f", [f"{n}.png" for n in range(10)]))
    with pytest.raises(ValueError, match=r"validation_share is .* of 10 images"):
        hold_out(images, share, seed=0)
