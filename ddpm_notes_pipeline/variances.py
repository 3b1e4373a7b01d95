"""What data tells the scheduler: the best variance of every step, the best path.

The notes fix the variance ("not considered here"). For a network that predicts x0_hat, the
isotropic variance of p(x_s | x_t) that minimises the bound is posterior variance + c_0^2 V_t, where

    V_t = E |x_0 - x0_hat(x_t)|^2 / dims        over images and noise, x0_hat as used (clipped)

is the network's denoising error: T numbers, measured once, that give the optimum for every pair (t,
s), since the KL of two Gaussians is least where the variance equals the mean squared distance of
samples from the mean. With it a step costs, in nats/dim,

    cost(t, s) = log(optimal / posterior variance) / 2 = log(1 + (SNR_s - SNR_t) V_t) / 2

which depends on the pair alone: the best path of K steps is a shortest path (Watson et al. 2021,
arXiv 2106.03802, for any bound that is a sum over pairs). V_t is measured on x0_hat itself; the
score's norm (Analytic-DPM, arXiv 2201.06503) gives the same number only for a perfect, unclipped
denoiser.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from .core.levels import Levels, to_model_range
from .core.seeding import seeded_generator
from .names import LEARNED_VARIANCES
from .pipeline_ddpm_notes import DDPMNotesPipeline, is_ddpm
from .scheduling_ddpm_notes import DDPMNotesScheduler

STREAM = 2  # of random numbers, apart from those of bits_per_dim


@dataclass
class DenoisingError:
    """V_t and how well it is known.

    Attributes:
        original_sample_mse: (T,) float64, V_t, mean squared error of x0_hat over images, noise and
            dims.
        standard_error: (T,) float64, of each V_t, over the (image, noise) pairs it was measured on.
        counts: (T,) int64, how many those were.
        num_images, network_evaluations: in all.
    """

    original_sample_mse: torch.Tensor
    standard_error: torch.Tensor
    counts: torch.Tensor
    num_images: int
    network_evaluations: int


@torch.no_grad()
def measure_original_sample_mse(
    pipeline: DDPMNotesPipeline,
    images: Any,
    class_labels: Any = None,
    timesteps_per_image: int = 32,
    batch_size: int = 128,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> DenoisingError:
    """Measure V_t of the pipeline's network on images.

    Each image is seen at a few timesteps, spread evenly over 0..T-1 with a random offset.

    Args:
        pipeline: its scheduler must be a DDPM.
        images, class_labels: as of `DDPMNotesPipeline.bits_per_dim`; read once, never held whole.
        timesteps_per_image: network evaluations for each image.
        batch_size: noisy images through the network at once.
        seed: of timesteps and noise.
        accelerator: splits the images over its processes; each returns the result of all, which
            does not depend on their number. Collective: every rank must call it.

    Raises:
        ValueError: images that `bits_per_dim` refuses; too few of them to reach every timestep.
    """
    scheduler = _ddpm(pipeline)
    T, n = len(scheduler), timesteps_per_image
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(3, T, dtype=torch.float64)  # count, sum, sum of squares
    number = 0
    with pipeline.image_progress_bar(desc="denoising error", unit="image", disable=rank > 0) as bar:
        for pixels, labels in pipeline.image_batches(images, class_labels):
            mine = torch.arange(len(pixels))[(rank - number) % processes :: processes]
            for rows in mine.split(max(1, batch_size // n)) if len(mine) else ():
                generators = [seeded_generator(seed, STREAM, number + int(row)) for row in rows]
                u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
                t = ((torch.arange(n) + u[:, None]) * T / n).long().clamp(max=T - 1).flatten()
                noise = torch.cat([torch.randn((n, *pixels.shape[1:]), generator=g) for g in generators])
                x_0, x_0_hat = _denoise(pipeline, pixels, labels, rows.repeat_interleave(n), t, noise)
                errors = (x_0 - x_0_hat).pow(2).flatten(1).mean(1, dtype=torch.float64).cpu()
                sums.index_add_(1, t, torch.stack([torch.ones_like(errors), errors, errors**2]))
            number += len(pixels)
            bar.update(len(pixels))
    if accelerator is not None:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    count, total, squares = sums
    if bool((count < 2).any()):
        raise ValueError(
            f"{number} images at {n} timesteps each reach timestep {int(count.argmin())} {int(count.min())} times; "
            f"there must be at least 2 (about {math.ceil(4 * T / n)} images, or more `timesteps_per_image`)"
        )
    mean = total / count
    standard_error = ((squares / count - mean**2).clamp(min=0) / (count - 1)).sqrt()
    return DenoisingError(mean, standard_error, count.long(), number, int(count.sum()))


def _denoise(
    pipeline: DDPMNotesPipeline,
    pixels: torch.Tensor,
    labels: torch.Tensor | None,
    rows: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 of these rows of the pixels, and x0_hat(x_t), clipped as the config says."""
    device, dtype = pipeline.execution_device, pipeline.sample_dtype
    x_0, noise = to_model_range(pixels[rows]).to(device, dtype), noise.to(device, dtype)
    x_t = pipeline.scheduler.add_noise(x_0, noise, t)
    output = pipeline.predict(x_t, t, None if labels is None else labels[rows])
    return x_0, pipeline.scheduler.predict_original_sample(output.to(dtype), x_t, t)


def _ddpm(pipeline: DDPMNotesPipeline) -> DDPMNotesScheduler:
    if not is_ddpm(pipeline.scheduler):
        raise ValueError(f"the scheduler is {type(pipeline.scheduler).__name__}; it must be a DDPMNotesScheduler")
    return pipeline.scheduler


def optimal_scheduler(
    scheduler: DDPMNotesScheduler, original_sample_mse: Any, decoder_variance: float | dict[int, float] | None = None
) -> DDPMNotesScheduler:
    """The scheduler with `variance_type="optimal"` and what was measured, in its config.

    Args:
        scheduler: stays as it is.
        original_sample_mse: (T,), V_t. decoder_variance: as of `DDPMNotesScheduler`.
    """
    mse = [float(value) for value in original_sample_mse]
    return DDPMNotesScheduler.from_config(
        scheduler.config, variance_type="optimal", original_sample_mse=mse, decoder_variance=decoder_variance
    )


def step_costs(scheduler: DDPMNotesScheduler, original_sample_mse: Any = None) -> np.ndarray:
    """cost(t, s) of a step with the optimal variance, nats/dim.

    Args:
        scheduler: gives the schedule, and V_t if `original_sample_mse` does not.

    Returns:
        (T, T) float64 table [t, s]; inf where s >= t.

    Raises:
        ValueError: not T values of V_t.
    """
    mse = np.asarray(
        scheduler.original_sample_mse if original_sample_mse is None else original_sample_mse, dtype=np.float64
    )
    if mse.shape != (len(scheduler),):
        raise ValueError(
            f"original_sample_mse has shape {mse.shape}; it must be ({len(scheduler)},), as measure_original_sample_mse "
            "measures it"
        )
    snr = scheduler.chain.pair(torch.arange(len(scheduler)), -1).snr_t.numpy()
    with np.errstate(invalid="ignore"):
        costs = 0.5 * np.log1p((snr[None, :] - snr[:, None]) * mse[:, None])
    return np.where(np.tri(len(snr), k=-1, dtype=bool), costs, np.inf)


def best_timesteps(
    scheduler: DDPMNotesScheduler,
    num_inference_steps: int,
    original_sample_mse: Any = None,
    prior_costs: Any = None,
    decoder_costs: dict[int, float] | None = None,
) -> list[int]:
    """The path of K steps with the least bound, by dynamic programming over pairs.

    Args:
        scheduler: gives the schedule, and V_t if `original_sample_mse` does not.
        num_inference_steps: K, at least 1.
        prior_costs: (T,) nats/dim of starting at each timestep; None starts at T - 1.
        decoder_costs: {t: nats/dim} of ending at each of some timesteps; None takes those of the
            scheduler's levels, and ends at 0 if there are none or the variance is learned.

    Returns:
        K timesteps, strictly falling, for `set_timesteps(timesteps=...)`.

    Raises:
        ValueError: K out of range, or no path of K steps between the first and last timesteps.
    """
    T, K = len(scheduler), num_inference_steps
    if isinstance(K, bool) or int(K) != K or not 1 <= K <= T:
        raise ValueError(f"num_inference_steps is {K!r}; it must be a whole number from 1 to {T}")
    costs = step_costs(scheduler, original_sample_mse)
    start = np.full(T, np.inf)
    if prior_costs is None:
        start[T - 1] = 0.0
    else:
        start[:] = prior_costs
    if decoder_costs is None and scheduler.levels is not None:
        levels = Levels.from_config(scheduler.levels)
        # A learned variance gives each pixel's decoder its blur, at timestep 0 alone.
        own_decoder = scheduler.variance_type in LEARNED_VARIANCES and levels.decoder_scale is not None
        decoder_costs = None if own_decoder else levels.decoder_costs
    end = np.full(T, np.inf)
    for t, cost in ({0: 0.0} if decoder_costs is None else decoder_costs).items():
        end[t] = cost
    # reach[s]: least cost of a path of so many nodes from its start to s
    # came[k][s]: the node before s on it
    reach, came = start, []
    for _ in range(K - 1):
        through = reach[:, None] + costs
        came.append(through.argmin(axis=0))
        reach = through.min(axis=0)
    t = int(np.argmin(reach + end))
    if not math.isfinite(reach[t] + end[t]):
        raise ValueError(
            f"num_inference_steps is {K}, and no path of so many steps joins the first and last timesteps to choose from"
        )
    path = [t]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return path[::-1]


def prior_costs(scheduler: DDPMNotesScheduler, mean_square: float) -> np.ndarray:
    """The prior's cost of starting at each timestep, (T,) float64 nats/dim.

    Args:
        scheduler: gives the schedule.
        mean_square: E[x_0^2] of the images.
    """
    return scheduler.chain.pair(torch.arange(len(scheduler)), -1).prior_kl(mean_square).numpy()
