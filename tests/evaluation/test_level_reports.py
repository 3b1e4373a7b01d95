"""What is said of fitted levels: how they fit, and whether they fit other images as well."""

import warnings

import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.level_reports import (
    compare_with_fit,
    fit_image_levels,
    fit_text,
)
from ddpm_notes_pipeline.evaluation.validation import Row
from ddpm_notes_pipeline.level_fit import fit_levels, level_counts
from tests.test_level_fit import noisy_start, plain_sight, three_levels


@pytest.fixture(scope="module")
def fit():
    return fit_levels(plain_sight(size=8), three_levels(64, 8))


def measured(fit, images):
    """A row of these images, on the path of t = 0 alone."""
    pipeline = plain_sight(noisy_start(levels=fit.levels), size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the path's prior
        return Row.of(pipeline.scheduler, "even", [0], pipeline.bits_per_dim(images, timesteps=[0]))


def test_images_like_those_of_the_fit_give_no_warning(fit):
    row = measured(fit, three_levels(100, 8, seed=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = compare_with_fit(fit, row, 0)
    assert f"{row.result.decoder:.4f}" in text
    assert f"{fit.decoder_costs[0][0] / 0.6931472:.4f} ± {fit.decoder_costs[0][1] / 0.6931472:.4f}" in fit_text(fit)


def test_images_of_another_kind_than_those_of_the_fit_give_a_warning(fit):
    grey = torch.where(three_levels(100, 8) == 0, 128, 0).byte()  # the rare level everywhere
    with pytest.warns(UserWarning, match="differ by more than 0.01"):
        compare_with_fit(fit, measured(fit, grey), 0)


def test_a_set_is_fitted_on_few_images_and_counted_on_more():
    """With a guess that leaves no doubt gamma fell to -0.96, and 0 to that power is no weight."""
    train = load_images("digits", split="train", show_progress=False)
    scheduler = DDPMNotesScheduler(40, beta_end=0.4)
    pipeline = DDPMNotesPipeline(plain_sight(scheduler, size=8).unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    fit = fit_image_levels(pipeline, train)
    few = train.take([i * 1438 // 128 for i in range(128)])
    assert fit.num_images == 128
    assert fit.levels == fit_levels(pipeline, few, counts=level_counts([train.take(range(1438))])).levels
