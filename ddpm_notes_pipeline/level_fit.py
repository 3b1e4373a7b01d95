"""Fits the levels of 8-bit data, and the blurs of a network's guesses of them, on training images.

With h the network's guess of a pixel, p(k | h) is proportional to pi_k exp(-(x_k - h)^2 / (2 blur))
(core/levels.py), with pi_k the share of level k among the training pixels to a power gamma: a power
below 1, as plain shares count the background twice where the network knows better.

    decoder  gamma and 1 / blur maximise the likelihood, which is concave in both: Newton's method
    guess    a blur of its own minimises the squared error of E[x_k | h], weighted as in the bound

All are functions of (x_t, t) fitted on other images: the bound stays a bound.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from .core.levels import (
    HALF_PIXEL,
    LOGITS_AT_ONCE,
    NUM_LEVELS,
    LevelPosterior,
    Levels,
    discretized_gaussian_log_likelihood,
    to_model_range,
)
from .core.seeding import seeded_generator
from .names import LEARNED_VARIANCES
from .pipeline_ddpm_notes import DDPMNotesPipeline, is_ddpm
from .scheduling_ddpm_notes import DDPMNotesScheduler

STREAM = 3  # of random numbers, apart from those of bits_per_dim and of the variances
TIMESTEPS = 20
PIXEL_VALUES = 2**14  # over all images and channels, that the fit looks at
PULL = 1e-4  # of gamma towards 1, nats: decides where the guesses are so sure that gamma hardly counts
GAMMAS = (0.1, 4.0)  # what gamma may be: 0 to a negative power is no weight
# What has to be gained on the images of the fit, beside twice its standard error: the network may
# know them by heart, and less does not carry over to other images.
SMALLEST_GAIN = 0.01  # of the squared error of a guess
SMALLEST_DECODER_GAIN = 0.02  # of the decoder's cost: photographs gain 1 % there and lose as much elsewhere
SMALLEST_BLUR = 1e-7  # an exact guess would have none


@dataclass
class LevelFit:
    """Fitted levels, and how well they fit.

    Attributes:
        levels: `DDPMNotesScheduler`'s setting of that name; None where the decoder at t = 0 gains
            too little by them.
        own_cost: (nats/dim, its standard error over images) of the decoder at t = 0 without levels.
        gamma: the weights are the shares of the levels to this power.
        decoder_costs: {t: (nats/dim, its standard error over images)} for paths that end at t; at
            t = 0 with the network's own variance, if it outputs one.
        guess_errors: {t: (without, with, standard error of the difference)}: mean squared error of
            x0_hat, weighted as in the bound's term.
        num_images, network_evaluations: in all.
    """

    levels: dict[str, Any] | None
    own_cost: tuple[float, float]
    gamma: float
    decoder_costs: dict[int, tuple[float, float]]
    guess_errors: dict[int, tuple[float, float, float]]
    num_images: int
    network_evaluations: int


@dataclass
class Guesses:
    """A network's guesses of some pixels of N images at one timestep, float64 (N, C, P) each.

    Attributes:
        t: the timestep.
        raw: x0_hat as the network says it. clipped: as the scheduler's config clips it.
        variance: of the scheduler's Gaussian decoder p(x_0 | x_t); None where it is to be fitted.
        weight: of the squared error in the bound's term, posterior variance / variance.
    """

    t: int
    raw: torch.Tensor
    clipped: torch.Tensor
    variance: torch.Tensor | None
    weight: torch.Tensor


def level_counts(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """How often each level occurs in each channel, (C, 256) int64.

    Args:
        batches: of uint8 images (B, C, H, W).

    Raises:
        ValueError: no images.
    """
    counts = None
    for pixels in batches:
        channels = [torch.bincount(channel.flatten(), minlength=NUM_LEVELS) for channel in pixels.transpose(0, 1)]
        counts = torch.stack(channels) + (0 if counts is None else counts)
    if counts is None:
        raise ValueError("images is empty; it must have at least one image")
    return counts


@torch.no_grad()
def fit_levels(
    pipeline: DDPMNotesPipeline,
    images: Any,
    class_labels: Any = None,
    counts: torch.Tensor | None = None,
    batch_size: int = 128,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> LevelFit:
    """Fit the levels' weights and blurs to the network's guesses of training images.

    Levels are used where the decoder at t = 0 gains clearly: more than 2 % of its cost and two
    standard errors. Few levels have to occur, or some much more often than others, for that. The
    guess is refined up to the last timestep at which that lowers the bound's own term clearly: by
    more than 1 % of the squared error and two standard errors.

    Args:
        pipeline: its scheduler must be a DDPM; levels that it has already are ignored.
        images, class_labels: as of `DDPMNotesPipeline.bits_per_dim`; about a hundred training
            images, without augmentation. Never those whose bits are reported.
        counts: (C, 256), how often each level occurs in the training set; None counts `images`,
            which may lack rare levels.
        batch_size: noisy images through the network at once.
        seed: of the noise, and of the pixels that are looked at.
        accelerator: splits the network's work over its processes; each returns the same result,
            whatever their number. Collective: every rank must call it.

    Raises:
        ValueError: images that `bits_per_dim` refuses, or none.
    """
    if not is_ddpm(pipeline.scheduler):
        raise ValueError(f"the scheduler is {type(pipeline.scheduler).__name__}; it must be a DDPMNotesScheduler")
    scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config, levels=None, eta=None)
    batches = list(pipeline.image_batches(images, class_labels))
    if not batches:
        raise ValueError("images is empty; it must have at least one image")
    counts = level_counts(pixels for pixels, _ in batches) if counts is None else counts
    grid = np.unique(np.geomspace(1, len(scheduler), TIMESTEPS + 4).round().astype(int) - 1).tolist()
    x_0, guesses = _evaluate(pipeline, scheduler, batches, grid, batch_size, seed, accelerator)

    learned = scheduler.variance_type in LEARNED_VARIANCES
    shares = (counts / counts.sum(1, keepdim=True)).double()
    gamma, precision = most_likely(shares, x_0, guesses[0] if learned else replace(guesses[0], variance=None))
    decoder_scale = 1 / precision if learned else None
    weights = shares.pow(gamma)  # 0 stays 0
    weights /= weights.sum(1, keepdim=True)
    decoder_blur = {guess.t: 1 / most_likely(weights, x_0, replace(guess, variance=None), 1.0)[1] for guess in guesses}

    posterior = LevelPosterior(Levels(weights.tolist(), decoder_blur, {}), len(scheduler))
    costs, errors, guess_blur = {}, {}, {}
    for guess in guesses:
        blur = torch.tensor(decoder_blur[guess.t], dtype=torch.float64)
        costs[guess.t] = _mean_and_error(-posterior.log_mass(x_0, guess.raw, blur))
    of_blurs = {t: cost for t, (cost, _) in costs.items()}
    first = guesses[0]
    assert first.variance is not None
    tau = first.variance / precision if learned else torch.tensor(decoder_blur[0], dtype=torch.float64)
    own_cost = -discretized_gaussian_log_likelihood(x_0, first.clipped, first.variance.log())
    cost = -posterior.log_mass(x_0, first.raw, tau)
    costs[0], own = _mean_and_error(cost), _mean_and_error(own_cost)
    helps = _is_clear(own_cost - cost, SMALLEST_DECODER_GAIN * own[0])
    for guess in guesses[1:]:  # no step to s >= 0 starts at t = 0
        before = guess.weight * (guess.clipped - x_0) ** 2
        best_blur, after = least_squares_blur(posterior, x_0, guess, decoder_blur[guess.t])
        errors[guess.t] = (float(before.mean()), float(after.mean()), _mean_and_error(before - after)[1])
        if not _is_clear(before - after, SMALLEST_GAIN * float(before.mean())):
            break
        guess_blur[guess.t] = best_blur
    levels = Levels(weights.tolist(), decoder_blur, guess_blur, decoder_scale, of_blurs)
    config = levels.to_config() if helps else None
    return LevelFit(config, own, gamma, costs, errors, len(x_0), len(x_0) * len(grid))


def most_likely(
    weights: torch.Tensor, x_0: torch.Tensor, guess: Guesses, gamma: float | None = None
) -> tuple[float, float]:
    """The gamma and precision that maximise the mean of log p(level of x_0 | guess).

    p(k | h) is proportional to weights_k^gamma exp(-precision (x_k - h)^2 / (2 variance)): an
    exponential family with two features. The gradient is theirs at the true level minus their mean
    under p, the curvature their covariance: Newton's method, with steps that never lose.

    Args:
        weights: (C, 256). x_0: (N, C, P). guess: its variance is 1 where it is None.
        gamma: given where it is not to be fitted.

    Returns:
        gamma and precision: 1 / blur, or 1 / scale of the variance.
    """
    variance = torch.ones_like(x_0) if guess.variance is None else guess.variance
    start = 1 / max(float(((x_0 - guess.raw) ** 2 / variance).mean()), SMALLEST_BLUR)
    best = torch.tensor([1.0 if gamma is None else gamma, start], dtype=torch.float64)
    free = slice(0 if gamma is None else 1, 2)
    value, gradient, curvature = _likelihood(weights, x_0, guess.raw, variance, best)
    for _ in range(30):
        step = torch.zeros(2, dtype=torch.float64)
        step[free] = torch.linalg.lstsq(curvature[free, free], gradient[free, None]).solution[:, 0]
        gain = 0.0
        for length in 0.5 ** torch.arange(12):
            tried = best + length * step
            tried[0] = tried[0].clamp(*GAMMAS)
            tried[1] = tried[1].clamp(best[1] / 4, 1 / SMALLEST_BLUR)
            found = _likelihood(weights, x_0, guess.raw, variance, tried)
            if found[0] > value:
                gain, best, (value, gradient, curvature) = found[0] - value, tried, found
                break
        if gain < 1e-9:
            break
    return float(best[0]), float(best[1])


def _likelihood(
    weights: torch.Tensor, x_0: torch.Tensor, h: torch.Tensor, variance: torch.Tensor, parameters: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The mean of log p in (gamma, precision), its gradient (2,) and minus its curvature (2, 2).

    Less PULL (gamma - 1)^2.
    """
    n, off_1 = x_0.numel(), parameters[0] - 1
    value, gradient = -n * PULL * float(off_1) ** 2, torch.stack([-2 * n * PULL * off_1, torch.zeros_like(off_1)])
    curvature = torch.tensor([[2 * n * PULL, 0], [0, 0]], dtype=torch.float64)
    for c in range(x_0.shape[1]):
        occurring = weights[c].nonzero().flatten()
        levels, log_weights = (2 * occurring.double() - 255) / 255, weights[c][occurring].log()
        columns = (images[:, c].flatten().split(LOGITS_AT_ONCE // len(levels)) for images in (x_0, h, variance))
        for x, h_n, variance_n in zip(*columns, strict=True):
            own = torch.searchsorted(levels, x - HALF_PIXEL).clamp(max=len(levels) - 1)[:, None]
            known = (levels[own[:, 0]] - x).abs() < HALF_PIXEL  # a level of weight 0 says nothing
            distance = -((levels - h_n[:, None]) ** 2) / (2 * variance_n[:, None])
            distance, own = distance[known], own[known]
            log_p = (parameters[0] * log_weights + parameters[1] * distance).log_softmax(1)
            p = log_p.exp()
            mean = torch.stack([p @ log_weights, (p * distance).sum(1)])
            off = torch.stack([log_weights.expand_as(distance), distance]) - mean[:, :, None]  # (2, n, levels)
            value += float(log_p.gather(1, own).sum())
            gradient += off.gather(2, own.expand(2, -1, 1)).sum((1, 2))
            curvature += (off * p).flatten(1) @ off.flatten(1).T
    return value / n, gradient / n, curvature / n


def least_squares_blur(
    posterior: LevelPosterior, x_0: torch.Tensor, guess: Guesses, start: float
) -> tuple[float, torch.Tensor]:
    """The blur whose mean of the level has the least weighted squared error, and that error.

    From a sixteenth of `start` to sixteen times as much, then nearer and nearer around the best.
    """

    def error(log_blur: float) -> torch.Tensor:
        mean, _ = posterior.mean_variance(guess.raw, torch.tensor(math.exp(log_blur), dtype=torch.float64))
        return guess.weight * (mean - x_0) ** 2

    middle, step = math.log(start), math.log(4)
    tried = {point: error(point) for point in (middle + k * step for k in range(-2, 3))}
    for _ in range(4):
        best, step = min(tried, key=lambda point: float(tried[point].mean())), step / 2
        tried |= {point: error(point) for point in (best - step, best + step)}
    best = min(tried, key=lambda point: float(tried[point].mean()))
    return math.exp(best), tried[best]


def _evaluate(
    pipeline: DDPMNotesPipeline,
    scheduler: DDPMNotesScheduler,
    batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    grid: list[int],
    batch_size: int,
    seed: int,
    accelerator: Accelerator | None,
) -> tuple[torch.Tensor, list[Guesses]]:
    """Pixels x_0 (N, C, P) of the images, and the network's guesses of them at each timestep."""
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device, dtype = pipeline.execution_device, pipeline.sample_dtype
    x_0 = torch.cat([to_model_range(pixels) for pixels, _ in batches])
    known = [label for _, label in batches if label is not None]
    labels = torch.cat(known) if known else None
    N, dims = len(x_0), x_0[0, 0].numel()
    order = torch.randperm(dims, generator=seeded_generator(seed, STREAM, N))
    kept = order[: max(1, PIXEL_VALUES // (N * x_0.shape[1]))].sort().values
    # every guess has its own noise, whichever process makes it; the others leave zeros
    found = torch.zeros(4, N * len(grid), x_0.shape[1], len(kept))
    mine = torch.arange(N * len(grid))[rank::processes]
    with pipeline.image_progress_bar(desc="levels", unit="image", total=len(mine), disable=rank > 0) as bar:
        for items in mine.split(batch_size):
            image, t = items % N, torch.tensor(grid)[items // N]
            noise = [torch.randn(x_0.shape[1:], generator=seeded_generator(seed, STREAM, int(item))) for item in items]
            x_t = scheduler.add_noise(x_0[image].to(device, dtype), torch.stack(noise).to(device, dtype), t)
            output = pipeline.predict(x_t, t, None if labels is None else labels[image]).to(dtype)
            raw = scheduler.predict_original_sample(output, x_t, t, clip=False)
            clipped = scheduler.predict_original_sample(output, x_t, t)
            _, decoder_variance = scheduler.reverse_mean_variance(output, x_t, t, -1)
            _, variance = scheduler.reverse_mean_variance(output, x_t, t, t - 1)
            _, least = scheduler.posterior_mean_variance(x_t, x_t, t, t - 1)
            weight = torch.where(t.to(device).reshape(-1, 1, 1, 1) == 0, 1, least / variance)
            for row, value in zip(found, (raw, clipped, decoder_variance, weight), strict=True):
                row[items] = value.expand_as(raw).flatten(2)[:, :, kept].float().cpu()
            bar.update(len(items))
    if accelerator is not None:
        found = accelerator.reduce(found.to(device), "sum").cpu()
    guesses = []
    for step, values in zip(grid, found.double().unflatten(1, (len(grid), N)).unbind(1), strict=True):
        guesses.append(Guesses(step, *values))
    return x_0.flatten(2)[:, :, kept].double(), guesses


def _is_clear(gain: torch.Tensor, least: float) -> bool:
    """Whether the mean gain is above both the least one that counts and two standard errors."""
    mean, error = _mean_and_error(gain)
    return mean > max(2 * error, least)


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean over everything, and its standard error over images."""
    per_image = values.flatten(1).mean(1)
    return float(per_image.mean()), float(per_image.std()) / math.sqrt(len(per_image))
