"""Simple codes for images: what they cost by hand, and how a model compares with them."""

import io
import lzma
import math

import numpy as np
import PIL.Image
import pytest
import torch

from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation import yardsticks
from ddpm_notes_pipeline.evaluation.yardsticks import Yardsticks, image_yardsticks, measure_yardsticks


def digits(split):
    return load_images("digits", split=split, show_progress=False)


@pytest.fixture(scope="module")
def measured():
    return image_yardsticks(digits("train"), digits("test"))


def smoothed(counts, parent, strength):
    return (counts + strength * parent) / (counts.sum() + strength)


def best_strength(histograms, parents):
    """The power of 2 that codes each counted level best with the counts of the others."""

    def bits(strength):
        total = 0.0
        for counts, parent in zip(histograms, parents, strict=True):
            for k in np.flatnonzero(counts):
                left = counts.copy()
                left[k] -= 1
                total -= counts[k] * math.log2(max(smoothed(left, parent, strength)[k], 1e-300))
        return total

    return min((2.0**i for i in range(-2, 13)), key=bits)


def test_histograms_cost_the_cross_entropy_of_their_shares(measured):
    train, test = (one.take(range(len(one))).numpy().reshape(len(one), 64) for one in (digits("train"), digits("test")))
    flat = np.full(256, 1 / 256)
    whole = np.bincount(train.ravel(), minlength=256).astype(float)
    shares = smoothed(whole, flat, best_strength([whole], [flat]))
    assert measured.bits["one histogram"] == pytest.approx(-np.log2(shares[test]).mean(), rel=1e-12)
    each = [np.bincount(column, minlength=256).astype(float) for column in train.T]
    strength = best_strength(each, [shares] * 64)
    bits = [-np.log2(smoothed(counts, shares, strength)[column]) for counts, column in zip(each, test.T, strict=True)]
    assert measured.bits["independent pixels"] == pytest.approx(np.mean(bits), rel=1e-12)
    occurring = math.log2(len(np.unique(train)))
    assert measured.bits["uniform over the levels that occur"] == pytest.approx(occurring, rel=1e-12)
    assert (measured.num_images, measured.num_training_images) == (359, 1438)


def test_compressors_cost_their_files(measured):
    test = digits("test").take(range(359)).numpy()
    xz = len(lzma.compress(test.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    assert measured.bits["xz"] == pytest.approx(8 * xz / test.size, rel=1e-12)
    size = 0
    for image in test:
        file = io.BytesIO()
        PIL.Image.fromarray(image[0]).save(file, "PNG", optimize=True)
        size += len(file.getvalue())
    assert measured.bits["PNG"] == pytest.approx(8 * size / test.size, rel=1e-12)


def test_the_training_images_that_are_counted_are_capped_and_evenly_spaced(measured, monkeypatch):
    train, test = digits("train"), digits("test")
    monkeypatch.setattr(yardsticks, "MOST_TRAINING_PIXELS", 100 * train.dims + 5)
    few = image_yardsticks(train, test)
    assert few.num_training_images == 100
    picked = train.take([i * 1438 // 100 for i in range(100)])
    assert few.bits == pytest.approx(measure_yardsticks([picked], [test.take(range(359))]).bits, rel=1e-12)
    assert few.bits["independent pixels"] > measured.bits["independent pixels"]


def test_a_verdict_names_what_is_beaten_and_what_is_not():
    codes = Yardsticks({"one histogram": 3.0, "xz": 2.5, "PNG": 5.0}, 10, 20)
    assert codes.verdict(2.7) == "Fewer bits than one histogram, PNG; not fewer than xz (2.500)."
    assert codes.verdict(2.0) == "Fewer bits than each of 3 simple codes."
    assert codes.verdict(9.0) == "More bits than each of 3 simple codes."


def test_a_verdict_leaves_open_what_is_closer_than_two_standard_errors():
    codes = Yardsticks({"one histogram": 3.0, "xz": 2.5, "PNG": 5.0}, 10, 20)
    assert codes.verdict(2.9, 0.04) == codes.verdict(2.9)
    assert codes.verdict(2.9, 0.06) == (
        "Fewer bits than PNG; not fewer than xz (2.500); within two standard errors of one histogram (3.000)."
    )
    assert codes.verdict(2.45, 0.1).endswith("; within two standard errors of xz (2.500).")
    assert codes.verdict(2.7, float("nan")) == codes.verdict(2.7)


def test_a_set_without_images_is_refused():
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="training is empty"):
        measure_yardsticks([], [image])
    with pytest.raises(ValueError, match="images is empty"):
        measure_yardsticks([image], [])
