"""Fits the levels on an image set, and says how well they fit there and on other images."""

import math
import warnings
from typing import Any

from ..data import ImageSet
from ..level_fit import LevelFit, fit_levels, level_counts
from ..names import LEARNED_VARIANCES
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from .pixel_batches import batches
from .validation import Row

# Images that blurs are fitted on, and pixels of them in all; each image costs some 20 network
# evaluations.
FIT_IMAGES, LEAST_FIT_IMAGES, FIT_PIXELS = 128, 32, 2**17
COUNTED_IMAGES = 10_000  # whose levels are counted
LARGEST_GAP = 0.01  # bits/dim, beyond two standard errors


def fit_image_levels(pipeline: DDPMNotesPipeline, images: ImageSet, **settings: Any) -> LevelFit:
    """`fit_levels` on evenly spaced images of a set, with counts of more of them.

    Collective: every rank must call it.

    Args:
        settings: of `fit_levels`.
    """
    counts = level_counts(batch["pixel_values"] for batch in batches(images.at_most(COUNTED_IMAGES)))
    number = min(FIT_IMAGES, max(LEAST_FIT_IMAGES, FIT_PIXELS // math.prod(images.size)))
    few = batches(images.at_most(number), labelled=pipeline.num_classes is not None)
    return fit_levels(pipeline, few, counts=counts, **settings)


def fit_text(fit: LevelFit) -> str:
    """One sentence: what was fitted, and the decoder's bits on the images of the fit."""
    cost, error, own_cost = (nats / math.log(2) for nats in (*fit.decoder_costs[0], fit.own_cost[0]))
    decoder = f"the decoder at t = 0 takes {cost:.4f} ± {error:.4f} bits/dim there, and {own_cost:.4f} without levels"
    if fit.levels is None:
        return f"Levels: fitted on {fit.num_images} images and not used, as they gain too little: {decoder}."
    refined = fit.levels["guess_blur"]
    where = f"at t = 0..{max(refined)}" if refined else "nowhere"
    return f"Levels: fitted on {fit.num_images} images, gamma {fit.gamma:.3f}, x0_hat refined {where}; {decoder}."


def compare_with_fit(fit: LevelFit, row: Row, last_timestep: int) -> str:
    """The decoder's bits on the images of the fit beside those on the measured images.

    Warns if they differ by more than 0.01 bits/dim beyond two standard errors.

    Args:
        fit: its levels are used.
        last_timestep: of the row's path, one that the fit has a cost of.
    """
    assert fit.levels is not None
    cost, error = fit.decoder_costs[last_timestep]
    if row.record.variance_type not in LEARNED_VARIANCES:
        cost = fit.levels["decoder_costs"][last_timestep]
    fitted, fitted_error = cost / math.log(2), error / math.log(2)
    measured, measured_error = row.result.decoder, row.result.standard_errors["decoder"]
    text = (
        f"Decoder of levels at t = {last_timestep}, bits/dim: {fitted:.4f} ± {fitted_error:.4f} on the images of the fit, "
        f"{measured:.4f} ± {measured_error:.4f} on the measured ones"
    )
    if abs(measured - fitted) > LARGEST_GAP + 2 * math.hypot(fitted_error, measured_error):
        warnings.warn(
            f"{text}: they differ by more than {LARGEST_GAP} beyond two standard errors. The measured images are of "
            "another kind, or the network has memorised those of the fit: fit on a split that it was not trained on "
            "(--variance_split)",
            stacklevel=2,
        )
    return f"{text}."
