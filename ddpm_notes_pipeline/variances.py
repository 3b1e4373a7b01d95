"""What data tells the scheduler: the best variance of every step, the best variance of the decoder, the best steps to keep.

The notes fix the variance ("not considered here"). For a network that predicts x0_hat, the isotropic variance of p(x_s | x_t) that
minimises the bound is pv + c_0^2 V_t, where

    V_t = E |x_0 - x0_hat(x_t)|^2 / dims        over images and noise, x0_hat as used (clipping included)

is the network's denoising error: T numbers, measured once, that give the optimum for every pair (t, s), since the KL of two Gaussians
is least where the variance equals the mean squared distance of samples from the mean. With it a step costs, in nats/dim,

    cost(t, s) = log(optimal / pv) / 2 = log(1 + (SNR_s - SNR_t) V_t) / 2

which depends on the pair alone: the best path of K steps is a shortest path (Watson et al. 2021, arXiv 2106.03802, for any bound that
is a sum over pairs). V_t is measured on x0_hat itself; the score's norm (Analytic-DPM, arXiv 2201.06503) gives the same number only for
a perfect, unclipped denoiser.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .pipeline_ddpm_notes import DDPMNotesPipeline, _in_model_range
from .scheduling_ddpm_notes import DDPMNotesScheduler, discretized_gaussian_log_likelihood

DECODER_FLOOR = 1e-6
DECODER_PIXELS = 2**20  # residuals kept to fit the decoder's variance: more change its third digit


@dataclass
class DenoisingError:
    """V_t and how well it is known.

    Attributes:
        original_sample_mse: (T,) float64, V_t, mean squared error of x0_hat over images, noise and dims.
        standard_error: (T,) float64, of each V_t, over the (image, noise) pairs that it was measured on.
        counts: (T,) int64, how many those were. num_images, network_evaluations: in all.
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
    """Measure V_t of the pipeline's network on images, each at a few timesteps spread evenly over 0..T-1 with a random offset.

    Args:
        pipeline: its scheduler must be a DDPM. images, class_labels: as in `DDPMNotesPipeline.bits_per_dim`; read once, never held whole.
        timesteps_per_image: network evaluations for each image.
        batch_size: noisy images through the network at once. seed: of timesteps and noise.
        accelerator: splits the images over its processes; every one returns the result of all. It does not depend on their number.

    Raises:
        ValueError: images that `bits_per_dim` refuses; too few of them to reach every timestep.
    """
    scheduler = _ddpm(pipeline)
    T = len(scheduler)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(3, T, dtype=torch.float64)  # count, sum, sum of squares
    number = 0
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    with tqdm(**{"desc": "denoising error", "unit": "image", "disable": rank > 0, **shown}) as bar:
        for pixels, labels in pipeline._image_batches(images, class_labels):
            own = torch.arange(len(pixels))[(-(number - rank)) % processes :: processes]
            for rows in own.split(max(1, batch_size // timesteps_per_image)):
                if len(rows):
                    generators = [_generator(seed, number + int(row)) for row in rows]
                    u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
                    part = torch.arange(timesteps_per_image)
                    t = ((part + u[:, None]) * T / timesteps_per_image).long().clamp(max=T - 1).flatten()
                    noise = torch.cat(
                        [torch.randn((timesteps_per_image, *pixels.shape[1:]), generator=g) for g in generators]
                    )
                    x_0 = _in_model_range(pixels[rows]).repeat_interleave(timesteps_per_image, 0)
                    own_labels = None if labels is None else labels[rows].repeat_interleave(timesteps_per_image)
                    x_0, x_0_hat = _denoise(pipeline, scheduler, x_0, noise, t, own_labels)
                    errors = (x_0 - x_0_hat).pow(2).flatten(1).mean(1, dtype=torch.float64).cpu()
                    sums.index_add_(1, t, torch.stack([torch.ones_like(errors), errors, errors**2]))
            number += len(pixels)
            bar.update(len(pixels))
    if accelerator is not None:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    count, total, squares = sums
    if bool((count < 2).any()):
        raise ValueError(
            f"{number} images at {timesteps_per_image} timesteps each reach timestep {int(count.argmin())} {int(count.min())} times; "
            f"allowed: at least 2 times each (about {math.ceil(4 * T / timesteps_per_image)} images, or more timesteps_per_image)"
        )
    mean = total / count
    spread = ((squares / count - mean**2).clamp(min=0) / (count - 1)).sqrt()
    return DenoisingError(mean, spread, count.long(), number, int(count.sum()))


@torch.no_grad()
def fit_decoder_variance(
    pipeline: DDPMNotesPipeline,
    images: Any,
    class_labels: Any = None,
    last_timestep: int = 0,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[float, float]:
    """The variance of p(x_0 | x_t) that encodes the pixels best, at the last timestep t of a path.

    The decoder's cost is the exact mass of a pixel's bin, so its best variance is not V_t: a network that is surely right needs none. It
    is found by three rounds of a finer and finer grid over log variance, floored at 1e-6, on up to 2^20 pixels.

    Returns:
        the variance, and the decoder's cost with it in nats/dim.
    """
    scheduler = _ddpm(pipeline)
    originals, means, pixels_seen, number = [], [], 0, 0
    for pixels, labels in pipeline._image_batches(images, class_labels):
        for rows in torch.arange(len(pixels)).split(batch_size):
            noise = torch.cat(
                [torch.randn((1, *pixels.shape[1:]), generator=_generator(seed, number + int(row))) for row in rows]
            )
            t = torch.full((len(rows),), last_timestep)
            x_0 = _in_model_range(pixels[rows])
            x_0, x_0_hat = _denoise(pipeline, scheduler, x_0, noise, t, None if labels is None else labels[rows])
            originals.append(x_0.flatten().cpu())
            means.append(x_0_hat.flatten().cpu())
            pixels_seen += originals[-1].numel()
            if pixels_seen >= DECODER_PIXELS:
                break
        number += len(pixels)
        if pixels_seen >= DECODER_PIXELS:
            break
    if not originals:
        raise ValueError("images is empty; allowed: at least one image")
    x_0, mean = torch.cat(originals)[:DECODER_PIXELS], torch.cat(means)[:DECODER_PIXELS]

    def cost(log_variance: float) -> float:
        return -float(discretized_gaussian_log_likelihood(x_0, mean, torch.tensor(log_variance)).mean())

    low, high = math.log(DECODER_FLOOR), math.log(4.0)
    for _ in range(3):
        grid = np.linspace(low, high, 17)
        costs = [cost(float(point)) for point in grid]
        best = int(np.argmin(costs))
        low, high = float(grid[max(0, best - 1)]), float(grid[min(16, best + 1)])
    return max(math.exp(grid[best]), DECODER_FLOOR), min(costs)


def optimal_scheduler(
    scheduler: DDPMNotesScheduler, original_sample_mse: Any, decoder_variance: float | dict[int, float] | None = None
) -> DDPMNotesScheduler:
    """The scheduler with `variance_type="optimal"` and what it needs in its config, where saving and stock classes keep it."""
    mse = [float(value) for value in original_sample_mse]
    return DDPMNotesScheduler.from_config(
        scheduler.config, variance_type="optimal", original_sample_mse=mse, decoder_variance=decoder_variance
    )


def step_costs(scheduler: DDPMNotesScheduler, original_sample_mse: Any = None) -> np.ndarray:
    """cost(t, s) of a step with the optimal variance, nats/dim, as a (T, T) float64 table [t, s]; inf where s >= t."""
    mse = np.asarray(
        scheduler.original_sample_mse if original_sample_mse is None else original_sample_mse, dtype=np.float64
    )
    if mse.shape != (len(scheduler),):
        raise ValueError(
            f"original_sample_mse has shape {mse.shape}; allowed: ({len(scheduler)},), measured by measure_original_sample_mse"
        )
    log_alpha_bar = scheduler._log_alpha_bar[:-1].numpy()
    snr = np.exp(log_alpha_bar) / -np.expm1(log_alpha_bar)
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
    """The path of K steps with the least bound, for `set_timesteps(timesteps=...)`, by dynamic programming over pairs.

    Args:
        scheduler: gives the schedule, and V_t if `original_sample_mse` does not.
        num_inference_steps: K, at least 1.
        prior_costs: (T,) nats/dim of starting at each timestep; None starts at T - 1.
        decoder_costs: {t: nats/dim} of ending at each of some timesteps; None ends at 0.

    Returns:
        K timesteps, strictly falling.
    """
    T, K = len(scheduler), num_inference_steps
    if isinstance(K, bool) or int(K) != K or not 1 <= K <= T:
        raise ValueError(f"num_inference_steps is {K!r}; allowed: a whole number from 1 to {T}")
    costs = step_costs(scheduler, original_sample_mse)
    start = np.full(T, np.inf)
    start[T - 1 if prior_costs is None else slice(None)] = (
        0.0 if prior_costs is None else np.asarray(prior_costs, dtype=np.float64)
    )
    end = np.full(T, np.inf)
    for t, cost in ({0: 0.0} if decoder_costs is None else decoder_costs).items():
        end[t] = cost
    # reach[s]: least cost of a path of so many nodes from its start to s; came[k][s]: the node before s on it
    reach, came = start, []
    for _ in range(K - 1):
        through = reach[:, None] + costs
        came.append(through.argmin(axis=0))
        reach = through.min(axis=0)
    t = int(np.argmin(reach + end))
    if not math.isfinite(reach[t] + end[t]):
        raise ValueError(
            f"num_inference_steps is {K} and no path of so many steps joins the allowed first and last timesteps"
        )
    path = [t]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return path[::-1]


def prior_costs(scheduler: DDPMNotesScheduler, mean_square: float) -> np.ndarray:
    """Prior's cost of starting at each timestep, (T,) nats/dim, for images with E[x_0^2] = `mean_square`."""
    log_alpha_bar = scheduler._log_alpha_bar[:-1].numpy()
    alpha_bar = np.exp(log_alpha_bar)
    return 0.5 * (alpha_bar * (mean_square - 1) - np.log(-np.expm1(log_alpha_bar)))


def _ddpm(pipeline: DDPMNotesPipeline) -> DDPMNotesScheduler:
    if not isinstance(pipeline.scheduler, DDPMNotesScheduler):
        raise ValueError(f"the scheduler is {type(pipeline.scheduler).__name__}; allowed: a DDPM (DDPMNotesScheduler)")
    return pipeline.scheduler


def _generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of image `number`, other ones than bits_per_dim's."""
    state = np.random.SeedSequence([seed, 2, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _denoise(
    pipeline: DDPMNotesPipeline,
    scheduler: DDPMNotesScheduler,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    labels: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and x0_hat(x_t), clipped as the config says, on the pipeline's device."""
    device, network_dtype = pipeline._execution_device, pipeline.unet.dtype
    dtype = torch.promote_types(network_dtype, torch.float32)
    x_0, noise = x_0.to(device, dtype), noise.to(device, dtype)
    x_t = scheduler.add_noise(x_0, noise, t)
    output = pipeline._predict(x_t, t.to(device), network_dtype, None if labels is None else labels.to(device))
    return x_0, scheduler.predict_original_sample(output.to(dtype), x_t, t)
