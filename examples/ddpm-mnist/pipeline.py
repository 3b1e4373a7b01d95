# ddpm_notes_pipeline 0.2.0, sha256 of the lines below 0ec7f3035aab59ea4b73dec0638e659821b8f50c5c435f479e4441a320122791
import importlib
import inspect
import itertools
import json
import math
import numpy as np
import os
import torch
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from diffusers import DDPMScheduler
from diffusers import DiffusionPipeline
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from functools import cached_property
from pathlib import Path
from tqdm.auto import tqdm
from typing import Any
from typing import ClassVar
from typing import NamedTuple

# ---------------------------------------------------------------- names.py

"""Names that settings may have, and a default; no imports, as flags list them without torch."""

# of the scheduler
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES, "optimal")
# of training
OBJECTIVES = ("simple", "hybrid", "vlb")
WEIGHTINGS = ("none", "min_snr")
TIMESTEP_SAMPLINGS = ("uniform", "stratified", "loss_second_moment")
EVALUATIONS_PER_IMAGE = 12  # of the network, for bits/dim


# ---------------------------------------------------------------- core/seeding.py

"""Random number generators that are a function of a few integers."""



def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the integers (each at least 0) alone.

    So the noise of an image can depend on (seed, its number) and not on who draws it. Streams of
    different integers are independent (numpy's `SeedSequence`), up to torch's generator, which has
    2^32 of them: of 10,000 images, two share a stream once in a hundred times.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# ---------------------------------------------------------------- core/schedules.py

"""Noise schedules by name: the T betas of each, float64. numpy alone, as flags list their names."""




def cosine_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """alpha_bar(u) / alpha_bar(0) of arXiv 2102.09672, eq. 17; the two ends are not used."""
    return capped_betas(np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2)


def laplace_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """arXiv 2407.03297, table 1 (mu = 0, b = 0.5): alpha_bar = snr / (1 + snr)."""
    u = np.arange(1, T + 1) / T
    log_snr = -0.5 * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return capped_betas(np.append(1.0, 1 / (1 + np.exp(-log_snr))))


def log_snr_betas(T: int, log_snr_start: float, log_snr_end: float) -> np.ndarray:
    """log(alpha_bar / (1 - alpha_bar)) linear in t, from the first timestep's to the last's.

    With it the bound's weight of the squared eps error is the same at every s >= 0 (fixed_small),
    (exp(step) - 1) / 2: Algorithm 1 minimises the sum of its KLs (arXiv 2107.00630, eq. 13).
    """
    log_alpha_bar = -np.logaddexp(0, -np.linspace(log_snr_start, log_snr_end, T))
    return -np.expm1(np.diff(log_alpha_bar, prepend=0))


def capped_betas(alpha_bar: np.ndarray) -> np.ndarray:
    """The betas of an alpha_bar at 0..T, at most 0.999."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


# name -> (T, its two ends) -> betas, float64
SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "scaled_linear": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": lambda T, start, end: (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))) + start,
    "laplace": laplace_betas,
    "log_snr": log_snr_betas,
}
BETA_SCHEDULES = tuple(SCHEDULES)
LOG_SNR_RANGE = (10.0, -7.0)  # noise of 0.86 levels at the start, a prior of 7e-4 bits/dim at most


def make_betas(
    T: int,
    beta_start: float,
    beta_end: float,
    schedule: str,
    trained_betas: Any = None,
    log_snr_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """The T betas of a named schedule (or your own, checked), float64.

    Args:
        T: number of timesteps.
        beta_start, beta_end: ends of "linear", "scaled_linear" and "sigmoid".
        schedule: one of `BETA_SCHEDULES`.
        trained_betas: (T,) betas in the place of a schedule.
        log_snr_range: ends of "log_snr", the first above the last; None is `LOG_SNR_RANGE`.

    Raises:
        ValueError: a beta outside (0, 1) (the last may be 1), a wrong number of them, an unknown
            schedule, a log SNR that does not fall.
    """
    ends = (beta_start, beta_end)
    if schedule == "log_snr":
        given = list(log_snr_range or LOG_SNR_RANGE)
        if len(given) != 2 or not all(map(math.isfinite, given)) or given[0] <= given[1]:
            raise ValueError(f"log_snr_range is {given}; it must be two finite numbers, the first above the last")
        ends = (given[0], given[1])
    if trained_betas is not None:
        betas = np.asarray(trained_betas, dtype=np.float64)
        if betas.shape != (T,):
            raise ValueError(f"trained_betas has shape {betas.shape}; it must be ({T},), as num_train_timesteps says")
    elif schedule in SCHEDULES:
        betas = SCHEDULES[schedule](T, *ends)
    else:
        raise ValueError(f"beta_schedule is {schedule!r}; it must be one of {', '.join(BETA_SCHEDULES)}")
    wrong = ~((betas > 0) & (betas < 1))
    wrong[-1] &= betas[-1] != 1
    if wrong.any():
        source = f"beta_start {beta_start}, beta_end {beta_end}: schedule {schedule!r}"
        where = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{source if trained_betas is None else 'trained_betas'} has beta {betas[where]} at timestep {where}; "
            "it must be above 0 and below 1 (the last one may be 1)"
        )
    return betas


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose sqrt(alpha_bar) is shifted and scaled to start as before and end at exactly 0.

    arXiv 2305.08891, algorithm 1.

    Raises:
        ValueError: a single beta.
    """
    signal = np.exp(0.5 * np.cumsum(np.log1p(-betas[:-1] if betas[-1] == 1 else -betas)))
    signal = np.append(signal, 0.0) if betas[-1] == 1 else signal
    if len(signal) == 1:
        raise ValueError("rescale_betas_zero_snr is True with num_train_timesteps 1; it must be at least 2")
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alpha_bar = signal**2
    return np.append(betas[0], 1 - alpha_bar[1:] / alpha_bar[:-1])


# ---------------------------------------------------------------- core/gaussian_chain.py

"""The Gaussian chain of DDPM (Ho et al. 2020, arXiv 2006.11239): every coefficient, written once.

A fixed chain adds noise to an image x_0 in T small steps, beta_t at a time. With alpha_bar_t the
product of 1 - beta up to t, any x_t is one jump away from the image:

    q(x_t | x_0)      = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)               forward jump
    q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, posterior_variance I)   for s < t      posterior
    p(x_s | x_t)      = N(c_0 x0_hat(x_t) + c_t x_t, variance I)                    reverse step

A network supplies x0_hat, its guess of x_0 (directly, as the noise eps, or as the velocity v).

Timesteps are counted as diffusers does, t = 0..T-1, and **s = -1 is the data x_0** (alpha_bar = 1).
The tables are float64 and logarithmic, so that 1 - alpha_bar keeps its digits at both ends.
"""



Timesteps = int | torch.Tensor


def widest_float(device: torch.device) -> torch.dtype:
    """float64; float32 on mps, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_device(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x on a device; nobody waits for a copy to an accelerator.

    A copy to the CPU is waited for: its values could be read before they have arrived.
    """
    return x.to(device, dtype or x.dtype, non_blocking=x.is_cpu)


class Table:
    """A 1-d tensor on the CPU, looked up on the device of its index, where it is copied once."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """All values on a device."""
        if device not in self._copies:
            dtype = widest_float(device) if self.values.is_floating_point() else self.values.dtype
            self._copies[device] = to_device(self.values, device, dtype)
        return self._copies[device]

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.on(index.device)[index]


@dataclass(frozen=True)
class StepPair:
    """The coefficients of steps from t to s, float64, each of shape (B,) or (1,), on t's device.

    Attributes:
        t, s: the timesteps, int64, s < t; s = -1 is the data.
        log_alpha_bar_t, log_alpha_bar_s: what all the others are computed from.
    """

    t: torch.Tensor
    s: torch.Tensor
    log_alpha_bar_t: torch.Tensor
    log_alpha_bar_s: torch.Tensor

    def to(self, device: torch.device) -> "StepPair":
        """The same on another device."""
        steps = (to_device(x, device) for x in (self.t, self.s))
        logs = (to_device(x, device, widest_float(device)) for x in (self.log_alpha_bar_t, self.log_alpha_bar_s))
        return StepPair(*steps, *logs)

    @cached_property
    def alpha_bar_t(self) -> torch.Tensor:
        return self.log_alpha_bar_t.exp()

    @cached_property
    def alpha_bar_s(self) -> torch.Tensor:
        return self.log_alpha_bar_s.exp()

    @cached_property
    def one_minus_alpha_bar_t(self) -> torch.Tensor:
        return -torch.expm1(self.log_alpha_bar_t)

    @cached_property
    def one_minus_alpha_bar_s(self) -> torch.Tensor:
        return -torch.expm1(self.log_alpha_bar_s)

    @cached_property
    def a(self) -> torch.Tensor:
        """alpha_bar_t / alpha_bar_s: the signal that a jump from s to t keeps."""
        return (self.log_alpha_bar_t - self.log_alpha_bar_s).exp()

    @cached_property
    def b(self) -> torch.Tensor:
        """1 - a: the noise that a jump from s to t adds (beta_t where s = t - 1)."""
        return -torch.expm1(self.log_alpha_bar_t - self.log_alpha_bar_s)

    @cached_property
    def c_0(self) -> torch.Tensor:
        """Coefficient of x_0 in the posterior's mean (Ho et al. 2020, eq. 7)."""
        return self.alpha_bar_s.sqrt() * self.b / self.one_minus_alpha_bar_t

    @cached_property
    def c_t(self) -> torch.Tensor:
        """Coefficient of x_t in the posterior's mean."""
        return self.a.sqrt() * self.one_minus_alpha_bar_s / self.one_minus_alpha_bar_t

    @cached_property
    def posterior_variance(self) -> torch.Tensor:
        """Variance of q(x_s | x_t, x_0); 0 at the data."""
        return self.one_minus_alpha_bar_s * self.b / self.one_minus_alpha_bar_t

    @cached_property
    def snr_t(self) -> torch.Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t)."""
        return self.alpha_bar_t / self.one_minus_alpha_bar_t

    @cached_property
    def snr_gain(self) -> torch.Tensor:
        """SNR_s - SNR_t = c_0^2 / posterior variance (arXiv 2107.00630, eq. 13); inf at s = -1."""
        return self.alpha_bar_s * self.b / (self.one_minus_alpha_bar_t * self.one_minus_alpha_bar_s)

    def prior_kl(self, mean_square: Any) -> torch.Tensor:
        """KL(q(x_t | x_0), N(0, I)) in nats per dim, (B,), of images with this mean of x_0^2."""
        alpha_bar = self.alpha_bar_t
        # log(1 - alpha_bar), by whichever of its two forms keeps its digits
        log_noise = torch.where(alpha_bar < 0.5, torch.log1p(-alpha_bar), self.one_minus_alpha_bar_t.log())
        return 0.5 * (alpha_bar * (mean_square - 1) - log_noise)

    @property
    def all_at_data(self) -> bool:
        """Whether every s is the data; False on an accelerator, as telling would force a sync."""
        return self.s.is_cpu and bool((self.s < 0).all())

    @property
    def none_at_data(self) -> bool:
        """Whether no s is the data; False on an accelerator."""
        return self.s.is_cpu and not bool((self.s < 0).any())


class GaussianChain:
    """The chain of T betas: the coefficients of any pair of timesteps.

    Args:
        betas: (T,) float64, each in (0, 1); the last may be 1 (zero terminal SNR).

    Attributes:
        betas: as given.
        log_alpha_bar: (T + 1,) float64; the last entry, which is index -1, is 0 for the data.
    """

    def __init__(self, betas: np.ndarray) -> None:
        self.betas = betas
        log_alpha = np.log1p(-betas, where=betas < 1, out=np.full_like(betas, -np.inf))
        self.log_alpha_bar = torch.from_numpy(np.append(np.cumsum(log_alpha), 0.0))
        self._table = Table(self.log_alpha_bar)

    def __len__(self) -> int:
        return len(self.betas)

    def pair(self, t: Timesteps, s: Timesteps) -> StepPair:
        """The coefficients of steps from t to s (s = -1 is the data), looked up on t's device.

        Args:
            t: 0..T-1, an int or an integer tensor of shape (B,).
            s: -1..T-2, the same; below t.

        Raises:
            ValueError: timesteps of another type, out of range, or with s >= t. Timesteps on an
                accelerator are not checked, as that would force a device sync.
        """
        first, last = self._timesteps(t, "t", 0), self._timesteps(s, "s", -1)
        if first.device != last.device:
            device = last.device if first.is_cpu else first.device  # never to the CPU: a sync
            first, last = to_device(first, device), to_device(last, device)
        if first.numel() != last.numel() and 1 not in (first.numel(), last.numel()):
            raise ValueError(
                f"t has {first.numel()} entries and s has {last.numel()}; they must be as many, or one of them single"
            )
        first, last = torch.broadcast_tensors(first, last)
        if first.is_cpu and bool((last >= first).any()):
            worst = int((last - first).argmax())
            raise ValueError(
                f"the pair (t, s) is ({int(first[worst])}, {int(last[worst])}); it must have s < t (s = -1 is the data)"
            )
        return self.unchecked_pair(first, last)

    def unchecked_pair(self, t: torch.Tensor, s: torch.Tensor) -> StepPair:
        """`pair` of timesteps known to be right: int64, both (B,) or (1,), on one device."""
        return StepPair(t, s, self._table[t], self._table[s])

    def _timesteps(self, value: Timesteps, name: str, lowest: int) -> torch.Tensor:
        """An int or an integer tensor as int64 of shape (B,) or (1,), checked if on the CPU."""
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.ndim > 1:
                raise ValueError(
                    f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}; "
                    "timesteps must be an int, or integers of shape (B,)"
                )
            index = value.reshape(-1).long()
            if index.device.type == "mps":  # it has no float64
                index = index.cpu()
        elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            index = torch.tensor([int(value)], device="cpu")
        else:
            raise ValueError(f"{name} is {value!r}; timesteps must be an int, or an integer tensor of shape (B,)")
        if index.is_cpu and index.numel() and not lowest <= int(index.min()) <= int(index.max()) < len(self):
            outside = [i for i in index.tolist() if not lowest <= i < len(self)]
            raise ValueError(f"{name} has timesteps {shorten(outside)}; they must be from {lowest} to {len(self) - 1}")
        return index


def shorten(values: list) -> str:
    """A list for a message, its middle left out where it is long."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


# ---------------------------------------------------------------- core/levels.py

"""8-bit pixels: the 256 levels x_k = k / 127.5 - 1, k = 0..255, and how likely each one is.

Two answers to "how likely is level k, given the network's guess h of the pixel?":

    Gaussian   the mass that N(h, variance) puts on the bin around x_k (Ho et al. 2020, eq. 13)
    levels     p(k | h) = pi_k exp(-(x_k - h)^2 / (2 blur)) / sum over j of the same

The Gaussian cannot know that most levels hardly occur: four fifths of MNIST's pixels are black. The
second is Bayes' rule: h is a blurred observation of a level whose prior probability is pi_k. Its
mean is also the better guess of a pixel that must be one of these levels. With flat pi, h = x_t /
sqrt(alpha_bar) and blur = 1 / SNR it is the decoder of VDM (arXiv 2107.00630); here pi and blur are
fitted on training images (level_fit.py).
"""




NUM_LEVELS = 256
HALF_PIXEL = 1 / 255  # half the distance between two neighbouring levels
UNIFORM_SHARE = 2.0**-16  # of the decoder: the code of a level of weight 0 takes 24 bits, not infinitely many
LOGITS_AT_ONCE = 2**18  # what a processor keeps in its cache


def to_model_range(pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 k in 0..255 -> float32 x = k / 127.5 - 1 in [-1, 1], of the same shape.

    Computed as (2k - 255) / 255: the numerator is exact and a single division rounds, so x is the
    float32 nearest to the true value on any device, and 255 - k gives -x.

    Raises:
        ValueError: another dtype.
    """
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; it must be torch.uint8 (0..255)")
    # Divided by a tensor: CUDA turns a Python number into a product with its rounded reciprocal.
    return pixel_values.float().mul_(2).sub_(255).div_(torch.full((), 255.0, device=pixel_values.device))


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Floating x in [-1, 1] -> uint8 k = round((x + 1) * 127.5), clamped to 0..255.

    Raises:
        ValueError: another dtype.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be a floating-point image in [-1, 1]")
    return ((x.to(torch.promote_types(x.dtype, torch.float32)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_pixels(images: Any, channels: int) -> torch.Tensor:
    """8-bit images of any kind as uint8 (N, C, H, W).

    Args:
        images: a uint8 tensor (N, C, H, W), a uint8 array (N, H, W, C) or (N, C, H, W), a list of
            pictures, or floats k / 127.5 - 1 with k = 0..255.
        channels: C.

    Raises:
        ValueError: what is not 8-bit images of C channels; the message names what was seen.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            return torch.empty((0, channels, 1, 1), dtype=torch.uint8)
        images = _stack([np.asarray(image) for image in images])
    x = images
    if isinstance(images, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(images))
        if x.ndim == 4 and x.shape[-1] == channels and x.shape[1] != channels:
            x = x.permute(0, 3, 1, 2)
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != channels:
        seen = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"images has {seen}; it must be (N, {channels}, H, W), as the model has {channels} channel(s)")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise ValueError(f"images has dtype {x.dtype}; it must be uint8, or floats k / 127.5 - 1 with k = 0..255")
    _check_levels(x.double())
    return to_uint8(x)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"images has sizes {sorted({array.shape[:2] for array in arrays})}; it must have one size")
    return np.stack([array[..., None] if array.ndim == 2 else array for array in arrays])


def _check_levels(x: torch.Tensor) -> None:
    """ValueError where float64 images are off the levels by more than 2 % of their distance."""
    if not x.numel():
        return
    lowest, highest = float(x.min()), float(x.max())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("images has values that are not finite; it must have floats k / 127.5 - 1 with k = 0..255")
    levels = (x + 1) * 127.5
    off = float((levels - levels.round()).abs().max())
    if lowest < -1.001 or highest > 1.001 or off > 0.02:
        raise ValueError(
            f"images has floats from {lowest:.4g} to {highest:.4g}, up to {off / 127.5:.2g} away from the 256 levels "
            "k / 127.5 - 1; it must have those levels (only 8-bit images have a number of bits), or be uint8"
        )


def discretized_gaussian_log_likelihood(
    x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """log of the mass that N(mean, variance) puts on each pixel's bin (Ho et al. 2020, eq. 13).

    The bin of a level x is x +- 1/255; the outermost two reach to infinity, so that the masses of
    the 256 levels sum to 1. The normal CDF is exact.

    Args:
        x_0: levels in [-1, 1]. mean, log_variance: broadcast against it.

    Returns:
        nats, elementwise, in float64 (`widest_float`); finite and differentiable.
    """
    dtype = widest_float(x_0.device)
    x_0, mean, log_variance = x_0.to(dtype), mean.to(dtype), log_variance.to(dtype)
    inverse_std = torch.exp(-0.5 * log_variance)
    lower = (x_0 - mean - HALF_PIXEL) * inverse_std
    upper = (x_0 - mean + HALF_PIXEL) * inverse_std
    # 40 standard deviations beyond the other edge stand for infinity (the mass out there is below
    # 1e-347): the gradients stay finite
    far = torch.maximum(lower.abs(), upper.abs()) + 40
    lower = torch.where(x_0 < -1 + HALF_PIXEL, -far, lower)
    upper = torch.where(x_0 > 1 - HALF_PIXEL, far, upper)
    # the CDF is accurate in its lower tail: reflect the bins that lie above the mean
    above = lower + upper > 0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


@dataclass(frozen=True)
class Levels:
    """What is fitted about the levels of a data set and about a network's guesses of them.

    Attributes:
        weights: pi, 256 numbers of at least 0 for each channel; a weight of 0 is a level that never
            occurs.
        decoder_blur: {t: blur} of the decoder p(x_0 | x_t) at some timesteps; between them its
            logarithm is interpolated in log(t + 1).
        guess_blur: the same of x0_hat in a step to s >= 0. Beyond the largest t the guess is left
            as it is.
        decoder_scale: where the network outputs a variance and the path ends at t = 0, the blur of
            each pixel is that variance times this; None takes `decoder_blur` there, too.
        decoder_costs: {t: nats/dim} of the decoder with `decoder_blur`, for paths that end at t.
            None where they were not measured.

    Raises:
        ValueError: weights of another number, negative, not finite, or all 0; a blur or a cost that
            is not above 0.
    """

    weights: list[list[float]]
    decoder_blur: dict[int, float]
    guess_blur: dict[int, float]
    decoder_scale: float | None = None
    decoder_costs: dict[int, float] | None = None

    def __post_init__(self) -> None:
        for c, row in enumerate(self.weights):
            if len(row) != NUM_LEVELS:
                raise ValueError(f"levels has {len(row)} weights for channel {c}; it must have {NUM_LEVELS}")
            if not all(math.isfinite(w) and w >= 0 for w in row) or not any(row):
                raise ValueError(
                    f"levels has weights from {min(row)} to {max(row)} for channel {c}; they must be finite, "
                    "at least 0, and not all 0"
                )
        if not self.weights or not self.decoder_blur:
            raise ValueError("levels has no weights or no decoder_blur; it must have both")
        scale = {} if self.decoder_scale is None else {0: self.decoder_scale}
        for t, blur in (*self.decoder_blur.items(), *self.guess_blur.items(), *scale.items()):
            if t < 0 or not (math.isfinite(blur) and blur > 0):
                raise ValueError(f"levels has a blur of {blur!r} at timestep {t}; it must be finite and above 0")
        for t, cost in (self.decoder_costs or {}).items():
            if t < 0 or not (math.isfinite(cost) and cost > 0):
                raise ValueError(f"levels has a cost of {cost!r} at timestep {t}; it must be finite and above 0")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Levels":
        """From a config's entry; JSON turns a dictionary's keys into strings."""

        def by_timestep(name: str) -> dict[int, float]:
            return {int(t): float(value) for t, value in config[name].items()}

        return cls(
            weights=[list(map(float, row)) for row in config["weights"]],
            decoder_blur=by_timestep("decoder_blur"),
            guess_blur=by_timestep("guess_blur"),
            decoder_scale=config.get("decoder_scale"),
            decoder_costs=by_timestep("decoder_costs") if config.get("decoder_costs") else None,
        )

    def to_config(self) -> dict[str, Any]:
        """As a config's entry, of 6 digits."""
        config: dict[str, Any] = {
            "weights": [[_rounded(w) for w in row] for row in self.weights],
            "decoder_blur": {t: _rounded(blur) for t, blur in self.decoder_blur.items()},
            "guess_blur": {t: _rounded(blur) for t, blur in self.guess_blur.items()},
        }
        if self.decoder_scale is not None:
            config["decoder_scale"] = _rounded(self.decoder_scale)
        if self.decoder_costs is not None:
            config["decoder_costs"] = {t: _rounded(cost) for t, cost in self.decoder_costs.items()}
        return config


def num_unseen(pixels: torch.Tensor, levels: dict[str, Any] | None) -> int:
    """How many pixels have a level of weight 0.

    Args:
        pixels: uint8 (B, C, H, W).
        levels: the scheduler's setting; None has no weights.
    """
    if levels is None:
        return 0
    weights = torch.tensor(levels["weights"], device=pixels.device)
    channel = torch.arange(len(weights), device=pixels.device)[:, None, None]
    return int((weights[channel, pixels.long()] == 0).sum())


class LevelPosterior:
    """p(k | h) of the levels that occur, for each channel, and its blurs.

    Args:
        fitted: weights and blurs.
        T: number of timesteps.

    Attributes:
        decoder_blur: of each last timestep. decoder_scale: as of `Levels`.
        guess_blur: of each timestep, 0 where the guess is not refined.

    Methods take h of shape (B, C, ...) and a blur that broadcasts against it, and compute in
    float64, 2^18 numbers at a time.
    """

    def __init__(self, fitted: Levels, T: int) -> None:
        self.decoder_scale = fitted.decoder_scale
        self.decoder_blur = Table(_interpolated(fitted.decoder_blur, T))
        self.guess_blur = Table(_interpolated(fitted.guess_blur, T, beyond=0))
        pi = torch.tensor(fitted.weights, dtype=torch.float64, device="cpu")
        levels = (2 * torch.arange(NUM_LEVELS, dtype=torch.float64, device="cpu") - 255) / 255
        self._log_weights = [Table(row.log() - row.sum().log()) for row in pi]
        self._occurring = [Table(row.nonzero().flatten()) for row in pi]
        self._levels = Table(levels)

    def mean_variance(self, h: torch.Tensor, blur: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the level given h, shape and dtype of h.

        Raises:
            ValueError: h has another number of channels than the weights.
        """
        self._check_channels(h)
        moments = []
        for c in range(h.shape[1]):
            rows = []
            for levels, logits in self._logits(h, blur, c):
                p = logits.softmax(1)
                mean = p @ levels
                rows.append(torch.stack([mean, (p * (levels - mean[:, None]) ** 2).sum(1)]))
            moments.append(torch.cat(rows, 1).reshape(2, len(h), *h.shape[2:]))
        means, variances = torch.stack(moments, 2).to(h.dtype)
        return means, variances

    def log_mass(self, x_0: torch.Tensor, h: torch.Tensor, blur: torch.Tensor) -> torch.Tensor:
        """log p(level of x_0 | h), nats, elementwise, float64; a 2^-16th of it is uniform.

        Args:
            x_0: levels in [-1, 1], shape of h.
        """
        self._check_channels(h)
        k = ((x_0.to(widest_float(h.device)) + 1) * 127.5).round().long()
        channels = []
        for c in range(h.shape[1]):
            occurring, rows = self._occurring[c].on(h.device), []
            for k_n, (_, logits) in zip(_pixels(k, c, len(occurring)), self._logits(h, blur, c), strict=True):
                place = torch.searchsorted(occurring, k_n).clamp(max=len(occurring) - 1)
                own = logits.log_softmax(1).gather(1, place[:, None])[:, 0]
                rows.append(own.masked_fill(occurring[place] != k_n, -math.inf))
            channels.append(torch.cat(rows).reshape(len(h), *h.shape[2:]))
        log_p = torch.stack(channels, 1) + math.log1p(-UNIFORM_SHARE)
        return torch.logaddexp(log_p, torch.full_like(log_p, math.log(UNIFORM_SHARE / NUM_LEVELS)))

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The occurring level nearest to each pixel, shape and dtype of x."""
        channels = []
        for c in range(x.shape[1]):
            levels = self._levels[self._occurring[c].on(x.device)]
            between = (levels[1:] + levels[:-1]) / 2
            channels.append(levels[torch.bucketize(x[:, c].to(levels.dtype), between)])
        return torch.stack(channels, 1).to(x.dtype)

    def _check_channels(self, h: torch.Tensor) -> None:
        if h.ndim < 2 or h.shape[1] != len(self._occurring):
            raise ValueError(
                f"levels has weights of {len(self._occurring)} channel(s) and the images have shape {tuple(h.shape)}; "
                f"they must be (B, {len(self._occurring)}, ...)"
            )

    def _logits(self, h: torch.Tensor, blur: torch.Tensor, c: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The levels that occur (L,) and their logits (n, L), n pixels of a channel at a time."""
        occurring = self._occurring[c].on(h.device)
        levels, log_weights = self._levels[occurring], self._log_weights[c][occurring]
        blur = blur.to(levels.dtype).expand_as(h)
        for h_n, blur_n in zip(_pixels(h, c, len(levels)), _pixels(blur, c, len(levels)), strict=True):
            yield levels, log_weights - (levels - h_n[:, None]) ** 2 / (2 * blur_n[:, None])


def _pixels(images: torch.Tensor, c: int, levels: int) -> tuple[torch.Tensor, ...]:
    """A channel's pixels, as many at a time as give `LOGITS_AT_ONCE` logits."""
    return images[:, c].flatten().split(max(1, LOGITS_AT_ONCE // levels))


def _interpolated(blur: dict[int, float], T: int, beyond: float | None = None) -> torch.Tensor:
    """A blur at every timestep, (T,) float64; `beyond` the largest known one, if it is given."""
    if not blur:
        return torch.zeros(T, dtype=torch.float64, device="cpu")
    known = sorted(blur)
    log_blur = np.interp(np.log1p(np.arange(T)), np.log1p(known), [math.log(blur[t]) for t in known])
    table = torch.from_numpy(np.exp(log_blur))
    if beyond is not None:
        table[known[-1] + 1 :] = beyond
    return table


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


# ---------------------------------------------------------------- core/image_batches.py

"""Whatever a user calls images, as a stream of uint8 batches with their labels."""




ImageBatch = tuple[torch.Tensor, torch.Tensor | None]  # uint8 (B, C, H, W), labels (B,)


def image_batches(images: Any, channels: int, class_labels: Any = None, need_labels: bool = False) -> Iterator:
    """(uint8 (B, C, H, W), labels or None), on the CPU, for each batch of `images` that has any.

    Args:
        images: what `as_pixels` takes; or a picture; or an iterable of batches of these, or of
            dicts with "pixel_values" and maybe "class_labels". It is read once.
        channels: C.
        class_labels: one label for all images, or one an image; None takes the batches' own.
        need_labels: refuse batches without labels.

    Raises:
        ValueError: no 8-bit images; labels that are not as many as the images.
    """
    if _is_picture(images):
        images = [images]
    whole = isinstance(images, (torch.Tensor, np.ndarray)) or (
        isinstance(images, (list, tuple)) and all(map(_is_picture, images))
    )
    if not whole and not isinstance(images, Iterable):
        raise ValueError(
            f"images is {type(images).__name__}; it must be 8-bit images as tensors, arrays, PIL images, or batches of them"
        )
    given = None if class_labels is None else torch.as_tensor(class_labels).reshape(-1)
    one_each = given is not None and given.numel() != 1
    start = 0
    for batch in [images] if whole else images:
        pixels, labels = batch, None
        if isinstance(batch, dict):
            pixels, labels = batch["pixel_values"], batch.get("class_labels")
        pixels = as_pixels(pixels.cpu() if isinstance(pixels, torch.Tensor) else pixels, channels)
        if not len(pixels):
            continue
        end = start + len(pixels)
        if given is not None:
            labels = given[start:end] if one_each else given
            if one_each and (given.numel() < end or (whole and given.numel() > end)):
                raise _wrong_number_of_labels(given, f"{end}" if whole else f"at least {end}")
        elif need_labels and labels is None:
            raise ValueError(
                'class_labels has one label for each of images, and pilot_images has no labels; it must be batches of {"pixel_values": ..., "class_labels": ...}, or class_labels one label for all'
            )
        yield pixels, labels
        start = end
    if given is not None and one_each and start and given.numel() != start:
        raise _wrong_number_of_labels(given, f"{start}")


def first_images(batches: Iterator[ImageBatch], n: int) -> tuple[list[ImageBatch], list[ImageBatch]]:
    """The batches that hold the first n images (all, if there are fewer), and these one by one."""
    held: list[ImageBatch] = []
    images: list[ImageBatch] = []
    while len(images) < n and (batch := next(batches, None)) is not None:
        held.append(batch)
        images += _one_by_one([batch])
    return held, images[:n]


def regrouped(batches: Iterable[ImageBatch], n: int) -> Iterator[ImageBatch]:
    """The same images n at a time: a network's rounding depends on the size of its batches."""
    for _, images in itertools.groupby(_one_by_one(batches), lambda image: image[0].shape):
        while group := list(itertools.islice(images, n)):
            pixels, labels = zip(*group)
            yield torch.cat(pixels), None if any(label is None for label in labels) else torch.cat(labels)


def _one_by_one(batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
    for pixels, labels in batches:
        for i in range(len(pixels)):
            one = pixels[i : i + 1].clone()  # a view would hold its whole batch
            yield one, None if labels is None else labels[i : i + 1]


def number_of_images(images: Any) -> int | None:
    """How many images there are; None where they come one batch after another."""
    if _is_picture(images):
        return 1
    if isinstance(images, dict):
        images = images["pixel_values"]
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return len(images) if images.ndim else None
    numbers: list[Any] = [number_of_images(part) for part in images] if isinstance(images, (list, tuple)) else [None]
    return None if None in numbers else sum(numbers)


def _is_picture(image: Any) -> bool:
    """A PIL image, told by the protocol through which numpy reads it."""
    return hasattr(image, "__array_interface__") and not isinstance(image, (np.ndarray, np.generic))


def _wrong_number_of_labels(labels: torch.Tensor, images: str) -> ValueError:
    return ValueError(
        f"class_labels has {labels.numel()} labels for {images} images; it must have one an image, or one for all"
    )


# ---------------------------------------------------------------- core/likelihood.py

"""The likelihood bound of DDPM for images of 8 bits a pixel (the notes' figures 6-8).

    -log2 P(x_0) <= prior + steps + decoder,    expectations over x_t ~ q(x_t | x_0)

    prior    KL(q(x_T | x_0), N(0, I))
    steps    sum over the path's (t, s), s >= 0, of E KL(q(x_s | x_t, x_0), p(x_s | x_t))
    decoder  E -log P(x_0 | x_t) at the path's last t

Each term of the steps needs the network. A random few of them, each divided by its probability,
have the same mean: an unbiased estimate at a fraction of the cost.
"""




DEFENSIVE_SHARE = 0.1  # share of an image's terms that is drawn whatever the pilot images said
PILOT_IMAGES, PILOT_STEPS = 16, 48

# x_t (R, C, H, W), t (R,), labels (R,) or None -> the network's output
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class BitsPerDimOutput(BaseOutput):
    """An upper bound of -log2 P(x_0) / dims over a set of images, and its parts, in bits/dim.

    Attributes:
        total: mean over the images of prior + diffusion + decoder.
        standard_error: of the total, over the images (nan for a single one): the images' own spread
            and the Monte Carlo noise together.
        prior, diffusion, decoder: the parts of the total; diffusion is the sum of the steps.
        standard_errors: those of the parts, by name.
        per_timestep: (T,) float64, mean term of each timestep, the decoder's at the path's last;
            zeros off the path. Sums to diffusion + decoder. Unless every term was evaluated, each
            entry is unbiased but noisy: look at sums over ranges.
        per_image: (N,) float64, total of each image.
        parts_per_image: (N, 3) float64: prior, diffusion, decoder.
        dims: C*H*W, what the bits are divided by.
        network_evaluations: images that the network was evaluated on, in all.
        maps: (N, C, H, W) float32, bits of each pixel, unbiased; an image's sum is its total times
            dims. None unless asked for.
        by_level: (T + 1, 3) float64, bits/dim of each timestep, and last of the prior, that are
            spent on pixels of the lowest level (0), of levels between, and of the highest (255).
            None unless asked for.
    """

    total: float
    standard_error: float
    prior: float
    diffusion: float
    decoder: float
    standard_errors: dict[str, float]
    per_timestep: torch.Tensor
    per_image: torch.Tensor
    parts_per_image: torch.Tensor
    dims: int
    network_evaluations: int
    maps: torch.Tensor | None = None
    by_level: torch.Tensor | None = None

    def __str__(self) -> str:
        parts = f"prior {self.prior:.4f}, steps {self.diffusion:.4f}, decoder {self.decoder:.4f}"
        return (
            f"{self.total:.4f} ± {self.standard_error:.4f} bits/dim ({parts}) over {len(self.per_image)} image(s) of "
            f"{self.dims} dims; {self.network_evaluations} network evaluations"
        )

    @classmethod
    def from_parts(
        cls,
        parts: torch.Tensor,
        per_timestep: torch.Tensor,
        dims: int,
        network_evaluations: int,
        maps: torch.Tensor | None = None,
        by_level: torch.Tensor | None = None,
    ) -> "BitsPerDimOutput":
        """From (N, 3) parts of each image, and sums over images of each timestep's term (T,)."""
        n = len(parts)
        names = ("prior", "diffusion", "decoder")
        errors = (parts.std(0) if n > 1 else torch.full((3,), math.nan)) / math.sqrt(n)
        per_image = parts.sum(1)
        return cls(
            total=float(per_image.mean()),
            standard_error=float(per_image.std()) / math.sqrt(n) if n > 1 else math.nan,
            **dict(zip(names, parts.mean(0).tolist(), strict=True)),
            standard_errors=dict(zip(names, errors.tolist(), strict=True)),
            per_timestep=per_timestep / n,
            per_image=per_image,
            parts_per_image=parts,
            dims=dims,
            network_evaluations=network_evaluations,
            maps=maps,
            by_level=None if by_level is None else by_level / n,
        )


@dataclass
class AllTerms:
    """Every term of a path, once."""

    per_image: int

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (M,) into the path, the decoder's last, and the weights of their terms."""
        index = torch.arange(self.per_image, device=generator.device)
        return index, torch.ones_like(index, dtype=torch.float64)


@dataclass
class RandomTerms:
    """n of a path's K - 1 steps with the probabilities (K - 1,), and always the decoder."""

    n: int
    probabilities: torch.Tensor

    @property
    def per_image(self) -> int:
        return self.n + 1

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AllTerms.draw`: one step in each of n equal parts of the cumulative distribution."""
        p = self.probabilities
        u = torch.rand(self.n, generator=generator, dtype=torch.float64, device=generator.device)
        u = (torch.arange(self.n, device=u.device) + u) / self.n
        drawn = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        index = torch.cat([drawn, drawn.new_tensor([len(p)])])
        return index, torch.cat([1 / (self.n * p[drawn]), p.new_ones(1)])


@dataclass
class Bound:
    """Measures the bound of images, batch by batch, and adds up its terms by timestep.

    Each image gets noise of its own, from (seed, its number): how images are batched does not
    matter, and two models with one seed are compared on the same noise.

    Args:
        scheduler: a DDPM with its path set (`add_noise`, `prior_kl`, `vlb_terms`, `chain`).
        predict: the network.
        device, dtype: where and in what type noisy images are made.
        clip: whether x0_hat is clipped; None as the scheduler's config says.
        batch_size: noisy images through the network at once.
        seed: of all noise.
        keep_maps: keep the bits of each pixel.

    Attributes:
        terms: which terms are evaluated for each image; all of them until `draw_terms`.
        evaluations: images that the network was evaluated on so far.
        per_timestep: (T,) float64, sum over the images so far of each timestep's term, bits/dim.
        by_level: (T + 1, 3) float64, the same by class of level, and last of the prior's.
        maps: (C, H, W) bits of each pixel, for each image so far.
    """

    scheduler: Any
    predict: Predict
    device: torch.device
    dtype: torch.dtype
    clip: bool | None
    batch_size: int
    seed: int
    keep_maps: bool = False
    evaluations: int = 0
    terms: AllTerms | RandomTerms = field(init=False)

    def __post_init__(self) -> None:
        self.t = self.scheduler.timesteps
        self.s = torch.cat([self.t[1:], self.t.new_tensor([-1])])
        self.per_timestep = torch.zeros(len(self.scheduler), dtype=torch.float64, device="cpu")
        self.by_level = torch.zeros(len(self.scheduler) + 1, 3, dtype=torch.float64, device="cpu")
        self.maps: list[torch.Tensor] = []
        self.terms = AllTerms(len(self.t))

    def draw_terms(self, n: int, pilot: Iterable[ImageBatch]) -> None:
        """Evaluate n of the steps for each image, drawn as the pilot images suggest, not all."""
        density = even_density(self.scheduler.chain, self.t[:-1], self.s[:-1])
        even = (torch.arange(PILOT_STEPS, device=density.device) + 0.5) / PILOT_STEPS
        grid = torch.searchsorted(density.cumsum(0), even)
        grid = grid.clamp(max=len(density) - 1).unique()
        nats = []
        for i, (pixels, labels) in enumerate(pilot):
            generator = seeded_generator(self.seed, 0, 1 + i)
            noise = torch.randn((len(grid), *pixels.shape[1:]), generator=generator, device="cpu")
            nats.append(self._nats(to_model_range(pixels), labels, grid, noise).flatten(1).sum(1))
        self.terms = RandomTerms(n, pilot_probabilities(grid, torch.stack(nats), density))

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor | None, first: int) -> torch.Tensor:
        """Prior, steps and decoder of each image, (B, 3) float64 bits/dim.

        Args:
            pixels: uint8 (B, C, H, W). labels: (B,) or None.
            first: number of the first image.
        """
        x_0 = to_model_range(pixels)
        B, M = len(x_0), self.terms.per_image
        generators = [seeded_generator(self.seed, 1, first + i) for i in range(B)]
        draws = [self.terms.draw(generator) for generator in generators]
        index, weight = (torch.cat(column) for column in zip(*draws))
        noise = torch.cat([torch.randn((M, *x_0.shape[1:]), generator=g, device="cpu") for g in generators])
        repeated = None if labels is None else labels.repeat_interleave(M)
        nats = self._nats(x_0.repeat_interleave(M, 0), repeated, index, noise, per_pixel=self.keep_maps)

        bits_per_nat = 1 / (x_0[0].numel() * math.log(2))  # bits/dim
        if self.keep_maps:
            self._keep_maps(pixels, x_0, nats * weight.reshape(-1, 1, 1, 1) / math.log(2), index)
        terms = nats.flatten(1).sum(1) * weight * bits_per_nat
        self.per_timestep.index_add_(0, self.t[index], terms)
        terms = terms.reshape(B, M)

        # prior: what x_T still knows of the image
        prior = self.scheduler.prior_kl(x_0) * bits_per_nat
        # steps: KL(q(x_s | x_t, x_0), p(x_s | x_t)), all or a random few, each over its probability
        steps = terms[:, :-1].sum(1)
        # decoder: -log P(x_0 | x_t) at the last pair
        decoder = terms[:, -1]
        return torch.stack([prior, steps, decoder], dim=1)

    def _keep_maps(self, pixels: torch.Tensor, x_0: torch.Tensor, bits: torch.Tensor, index: torch.Tensor) -> None:
        """Add the bits of each pixel, (B * M, C, H, W), to the maps and to the sums by level."""
        B, dims = len(pixels), pixels[0].numel()
        prior = self.scheduler.prior_kl(x_0, per_pixel=True) / math.log(2)
        self.maps.extend((bits.unflatten(0, (B, -1)).sum(1) + prior).float())
        classes = (pixels > 0).long() + (pixels == 255).long()  # lowest, between, highest
        for c in range(3):
            share = (classes == c).double()
            sums = (bits.unflatten(0, (B, -1)) * share[:, None]).flatten(2).sum(2).flatten() / dims
            self.by_level[:, c].index_add_(0, self.t[index], sums)
            self.by_level[-1, c] += float((prior * share).sum()) / dims

    def _nats(
        self,
        x_0: torch.Tensor,
        labels: torch.Tensor | None,
        index: torch.Tensor,
        noise: torch.Tensor,
        per_pixel: bool = False,
    ) -> torch.Tensor:
        """The path's terms number `index` (R,), one for each row of noise; float64 on the CPU.

        x_0 and labels have R rows, or a single one for all. The result has shape (R, 1), or that
        of noise where it is per pixel.
        """
        x_0 = x_0.expand_as(noise)
        labels = None if labels is None else labels.expand(len(noise))
        nats = []
        for rows in torch.arange(len(index), device="cpu").split(self.batch_size):
            x, eps = (images[rows].to(self.device, self.dtype) for images in (x_0, noise))
            t, s = self.t[index[rows]], self.s[index[rows]]
            x_t = self.scheduler.add_noise(x, eps, t)
            output = self.predict(x_t, t, None if labels is None else labels[rows])
            terms = self.scheduler.vlb_terms(output.to(self.dtype), x, x_t, t, s, self.clip, per_pixel)
            nats.append(terms.cpu() if per_pixel else terms[:, None].cpu())
        self.evaluations += len(index)
        return torch.cat(nats).double()


def even_density(chain: Any, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A probability for each step: half even over the steps, half even in log SNR.

    The second half is for clean images, where the terms are large.
    """
    log_snr_gain = chain.pair(s, -1).snr_t.log() - chain.pair(t, -1).snr_t.log()
    share = log_snr_gain.nan_to_num(posinf=0.0)
    return 0.5 / len(t) + 0.5 * share / share.sum()


def pilot_probabilities(grid: torch.Tensor, nats: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """p proportional to the spread of each step's term: the least noise for the number of draws.

    The draws are evenly spread, so that a term's mean, which varies slowly from step to step, adds
    no noise: what counts is its standard deviation over images and noise. A few images know it
    badly, the less of them the more: the mean's share in the spread is 1 / (pilot images), and
    neighbouring steps are averaged.

    Args:
        grid: the steps that were measured, (G,). nats: their terms, (pilot images, G).
        density: (K - 1,). A share of the draws follows it and no pilot, which may have missed rare
            large terms: no weight can explode.
    """
    spread = (nats.var(0, unbiased=False) + nats.mean(0).pow(2) / len(nats)).sqrt().clamp(min=1e-12)
    padded = torch.cat([spread[:1], spread, spread[-1:]])
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    p = torch.from_numpy(np.exp(np.interp(np.arange(len(density)), grid.numpy(), smooth.log().numpy())))
    return (1 - DEFENSIVE_SHARE) * p / p.sum() + DEFENSIVE_SHARE * density


# ---------------------------------------------------------------- stock_config.py

"""How settings that stock diffusers classes do not know live in a config that they load.

Ours sit in one private entry, which stock classes load and save again without a word. Each of the
others has a stand-in that stock classes can work with:

- `variance_type`: the learned type where the network outputs a variance, as they must know to split
  its output, and "fixed_small" elsewhere.
- `beta_schedule`: a schedule that not every stock scheduler knows by name is written out, as
  `trained_betas`.
"""




PRIVATE_ENTRY = "_ddpm_notes"
PRIVATE_SETTINGS = ("original_sample_mse", "decoder_variance", "levels", "log_snr_range", "eta")
PRIVATE_VARIANCE = "optimal"
STOCK_CLASS = "DDPMScheduler"
STOCK_FALLBACK = "fixed_small"
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # that all stock schedulers know


class StockConfigMixin(ConfigMixin):
    """A config under a stock class's name, with our settings in a private entry.

    A subclass keeps `variance_type`, and each private setting that it changes, in an attribute of
    that name, and calls `hide_private_settings` once they are set.
    """

    variance_type: str

    def hide_private_settings(self) -> None:
        """Move what stock classes do not know into the private entry."""
        config = {name: value for name, value in self.config.items() if name not in PRIVATE_SETTINGS}
        ours = {
            name: value
            for name in PRIVATE_SETTINGS
            if (value := vars(self).get(name, self.config.get(name))) is not None
        }
        if self.variance_type == PRIVATE_VARIANCE:
            ours["variance_type"], config["variance_type"] = PRIVATE_VARIANCE, STOCK_FALLBACK
        schedule = config["beta_schedule"]
        if schedule not in STOCK_SCHEDULES and config["trained_betas"] is None:
            ours |= {"beta_schedule": schedule, "trained_betas": None}
            config |= {"beta_schedule": "linear", "trained_betas": _betas(config, ours)}
        if ours:
            config[PRIVATE_ENTRY] = ours
        # "_use_default_values" is an entry of stock configs, too: only of settings that they know,
        # and that are what the user gave
        hidden = {*PRIVATE_SETTINGS, *ours}
        defaults = [name for name in config.pop("_use_default_values", []) if name not in hidden]
        if defaults:
            config["_use_default_values"] = defaults
        self._internal_dict = FrozenDict(config)

    def private_setting(self, name: str) -> Any:
        """The configured value of a private setting, None where there is none."""
        return self.config.get(PRIVATE_ENTRY, {}).get(name)

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', under the stock class's name.

        By that name `from_config` of other classes knows what to pass over without a warning.
        """
        if "_use_default_values" in kwargs:
            # diffusers lists arguments given by position here, too; `from_config` would lose them
            parameters = inspect.signature(type(self).__init__).parameters
            names = [name for name in kwargs["_use_default_values"] if kwargs[name] is parameters[name].default]
            kwargs["_use_default_values"] = names
        if "_class_name" in kwargs:
            kwargs["_class_name"] = STOCK_CLASS
        super().register_to_config(**kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers': from a config of this or of any compatible class, changed by `kwargs`."""
        stock_variance_type = config.get("variance_type") if isinstance(config, dict) else None
        if isinstance(config, dict) and PRIVATE_ENTRY in config:
            config = _with_own_settings(config)
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        if scheduler.variance_type == PRIVATE_VARIANCE and stock_variance_type in ("learned", "learned_range"):
            ours = {**scheduler.config[PRIVATE_ENTRY], "stock_variance_type": stock_variance_type}
            scheduler.register_to_config(variance_type=stock_variance_type, **{PRIVATE_ENTRY: ours})
        return made

    def to_json_string(self) -> str:
        """The config as JSON, under the stock class's name: any diffusers loads it."""
        config = json.loads(super().to_json_string())
        self.register_to_config(_class_name=STOCK_CLASS)
        return json.dumps({**config, "_class_name": STOCK_CLASS}, indent=2, sort_keys=True) + "\n"


def _betas(config: Mapping[str, Any], ours: Mapping[str, Any]) -> list[float]:
    """The T betas of our named schedule, by the config's other settings."""
    T, start, end = (config[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    return make_betas(T, start, end, ours["beta_schedule"], log_snr_range=ours.get("log_snr_range")).tolist()


def _with_own_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with our settings in the place of their stand-ins.

    A stand-in that somebody has changed since stays, as the choice is theirs.
    """
    config = dict(config)
    ours = dict(config.pop(PRIVATE_ENTRY))
    if config.get("variance_type") != ours.pop("stock_variance_type", STOCK_FALLBACK):
        ours.pop("variance_type", None)
    if "beta_schedule" in ours and config.get("trained_betas") != _betas(config, ours):
        del ours["beta_schedule"], ours["trained_betas"]
    defaults = [name for name in config.get("_use_default_values", []) if name not in ours]
    return {**config, **ours, "_use_default_values": defaults}


# ---------------------------------------------------------------- scheduling_ddpm_notes.py

"""DDPM (Ho et al. 2020, arXiv 2006.11239) as a diffusers scheduler: the face of the Gaussian chain.

The chain gives the posterior's coefficients for any pair of timesteps s < t. The reverse step is

    p(x_s | x_t) = N(c_0 x0_hat(x_t) + c_t x_t, variance I)

where x0_hat is the network's guess of x_0. Maximum likelihood asks each reverse step to be near the
posterior in KL divergence; those KLs, the prior's and the decoder's cost are the terms of the bound
(`vlb_terms`, `prior_kl`).

Arithmetic is float32 at least, coefficients are float64 and rounded once when they meet a tensor.
"""




OFF_PATH = -2  # in the table of each timestep's next one
DECODER_FLOOR = 1e-6  # of the decoder's variance with "optimal"


@dataclass
class DDPMNotesSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x_s, shape and dtype of the sample.
        pred_original_sample: x0_hat as used in the mean (clipped if the config says so), the same.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class PathTables(NamedTuple):
    """What depends on the path of timesteps or on measured numbers, each of T entries."""

    next_timestep: Table  # s after each t of the path, -1 (the data) after its last; OFF_PATH
    log_decoder_variance: Table  # of p(x_0 | x_t), for each last timestep t
    original_sample_mse: Table  # of use to "optimal" alone
    level_posterior: LevelPosterior | None  # of fitted levels


class DDPMNotesScheduler(SchedulerMixin, StockConfigMixin):
    """DDPM's forward process, posterior, reverse step and terms of the bound, for any pair (t, s).

    A drop-in for `diffusers.DDPMScheduler` (same names, defaults, and numbers where that one is
    right), written from the equations. Timesteps are t = 0..T-1, and s = -1 is the data.

    Args:
        num_train_timesteps (`int`): T, the length of the chain.
        beta_start, beta_end (`float`): ends of "linear", "scaled_linear" and "sigmoid".
        beta_schedule (`str`): "linear" (Ho et al. 2020), "scaled_linear", "squaredcos_cap_v2"
            (cosine, arXiv 2102.09672), "sigmoid", "laplace" (arXiv 2407.03297), "log_snr" (log SNR
            linear in t, from `log_snr_range[0]` down to `log_snr_range[1]`).
        trained_betas (list of `float`, *optional*): T betas of your own, each in (0, 1); the last
            may be 1 (zero terminal SNR).
        variance_type (`str`): variance of the reverse step at s >= 0.
            "fixed_small": that of the posterior. "fixed_large": b = 1 - alpha_bar_t / alpha_bar_s.
            Their "_log" spellings are the same numbers. "learned": the second half of the output
            channels is the log variance. "learned_range": the second half is v, log variance =
            (v+1)/2 log b + (1-v)/2 log posterior variance (arXiv 2102.09672, eq. 15). "optimal":
            posterior variance + c_0^2 V_t, the best isotropic one for this network; needs
            `original_sample_mse`.
        clip_sample, clip_sample_range: clip x0_hat to [-range, range].
        prediction_type (`str`): what the network outputs: "epsilon", "sample" (x_0) or
            "v_prediction" (sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0).
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0_hat
            (arXiv 2205.11487) instead of clipping.
        timestep_spacing, steps_offset: how `set_timesteps(n)` chooses n of the T timesteps
            (arXiv 2305.08891, table 2).
        rescale_betas_zero_snr (`bool`): shift sqrt(alpha_bar) so that alpha_bar_T = 0
            (arXiv 2305.08891). Not with "epsilon", where x0_hat = (x_T - eps) / 0.
        original_sample_mse (list of T `float`, *optional*): V_t = E||x_0 - x0_hat(x_t)||^2 / dims,
            measured on data.
        decoder_variance (`float` or `dict`, *optional*): variance of the decoder p(x_0 | x_t) for a
            path that ends at timestep 0, or {last timestep: variance}.
        levels (`dict`, *optional*): what is known of the 8-bit levels of the images, fitted on
            training images (`core.levels.Levels` as a dictionary). x0_hat is then the mean of the
            level given the network's guess, and the decoder the probability of the level.
        log_snr_range (two `float`, *optional*): ends of "log_snr"; None is (10, -7).
        eta (`float`, *optional*): None samples by Algorithm 2 with `variance_type`; a number in
            [0, 1] is DDIM's eta (arXiv 2010.02502), which replaces the variance type: 0 is
            deterministic, 1 is fixed_small.

    Methods that take timesteps take an int or an integer tensor of shape (B,). Timesteps on an
    accelerator are not checked, as that would force a device sync.

    Raises:
        ValueError: a setting out of its range; the message names it, the value, and the range.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        original_sample_mse: list[float] | None = None,
        decoder_variance: float | dict[int, float] | None = None,
        levels: dict[str, Any] | None = None,
        log_snr_range: tuple[float, float] | None = None,
        eta: float | None = None,
    ) -> None:
        _check_config(self.config)
        betas = make_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, log_snr_range)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        if betas[-1] == 1 and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type is 'epsilon' with a schedule whose last alpha_bar is 0 (rescale_betas_zero_snr, or a "
                "last beta of 1), where x_0 = (x_T - eps) / 0; it must be 'v_prediction' or 'sample'"
            )
        self.chain = GaussianChain(betas)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = self.chain.log_alpha_bar[:-1].exp().float()

        self.variance_type = variance_type
        self.eta = _check_eta(eta)
        self.original_sample_mse = _check_original_sample_mse(original_sample_mse, variance_type, num_train_timesteps)
        self.decoder_variance = _check_decoder_variance(decoder_variance, num_train_timesteps)
        self.hide_private_settings()

        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set_path(list(range(num_train_timesteps))[::-1], device=None)

    @property
    def levels(self) -> dict[str, Any] | None:
        """What is fitted about the levels of the images, as `core.levels.Levels` reads it."""
        return self.private_setting("levels")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # -------------------------------------------------------------------------------- the path

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        eta: float | None = None,
    ) -> None:
        """Choose the path t_1 > t_2 > ... that `step` walks down, ending at the data.

        Args:
            num_inference_steps: how many of the T timesteps, 1..T, spaced by `timestep_spacing`.
            device: where `scheduler.timesteps` is put.
            timesteps: or the timesteps themselves, strictly falling, in 0..T-1.
            eta: as in the constructor, for this path; None takes the constructor's.

        Raises:
            ValueError: both or neither of the two given; a number or a timestep out of range;
                timesteps that do not fall.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps!r} and timesteps is {timesteps!r}; "
                "exactly one of the two must be given"
            )
        eta = self.private_setting("eta") if eta is None else _check_eta(eta)
        custom = timesteps is not None
        path = self._spaced_timesteps(num_inference_steps) if timesteps is None else _as_path(timesteps, len(self))
        self.eta = eta
        self.custom_timesteps = custom
        self.num_inference_steps = len(path)
        self._set_path(path, device)

    def _spaced_timesteps(self, n: Any) -> list[int]:
        """n timesteps by arXiv 2305.08891, table 2."""
        T, spacing, offset = len(self), self.config.timestep_spacing, self.config.steps_offset
        if not _is_whole(n) or not 1 <= n <= T:
            raise ValueError(
                f"num_inference_steps is {n!r}; it must be a whole number from 1 to {T} (num_train_timesteps)"
            )
        n = int(n)
        path: Any
        if spacing == "linspace":
            path = np.linspace(0, T - 1, n).round()[::-1]
        elif spacing == "leading":
            path = np.arange(n)[::-1] * (T // n) + offset
        else:  # trailing
            path = np.round(np.arange(T, 0, -T / n)[:n]) - 1  # rounding may make that range one longer
        if path[0] >= T:
            raise ValueError(
                f"steps_offset is {offset} and the {n} timesteps would start at {int(path[0])}; "
                f"it must keep them below {T} (num_train_timesteps)"
            )
        return [int(t) for t in path]

    def _set_path(self, path: list[int], device: str | torch.device | None) -> None:
        cpu = torch.device("cpu")  # whatever torch's default device is
        self.timesteps = torch.tensor(path, device=cpu).to(device)
        next_timestep = torch.full((len(self),), OFF_PATH, device=cpu)
        next_timestep[path] = torch.tensor([*path[1:], -1], device=cpu)
        mse = torch.tensor(self.original_sample_mse or [0.0] * len(self), dtype=torch.float64, device=cpu)
        levels = None if self.levels is None else LevelPosterior(Levels.from_config(self.levels), len(self))
        log_variances = self._decoder_variances(path).log()
        self._tables = PathTables(Table(next_timestep), Table(log_variances), Table(mse), levels)

    def _decoder_variances(self, path: list[int]) -> torch.Tensor:
        """Variance of p(x_0 | x_t) for every last timestep t, (T,) float64.

        The posterior's is 0 there. The fixed types take that of the next pair above: (1, 0) for
        t = 0, as in the papers, and the path's own last pair where it ends higher. "optimal" takes
        its own rule with posterior variance 0 and c_0 = 1. A fitted number comes first.
        """
        if self.variance_type == "optimal":
            mse = torch.tensor(self.original_sample_mse, dtype=torch.float64, device="cpu")
            variances = mse.clamp(min=DECODER_FLOOR)
        else:
            s = torch.arange(len(self), device="cpu")
            t = s + 1
            if len(path) > 1 and path[-1] > 0:
                t[path[-1]] = path[-2]
            variances = self.chain.pair(t[:-1], s[:-1]).posterior_variance
            nothing_above = self.chain.pair(len(self) - 1, -1).one_minus_alpha_bar_t
            variances = torch.cat([variances, nothing_above])
        if self.variance_type not in LEARNED_VARIANCES:
            for last, variance in (self.decoder_variance or {}).items():
                variances[last] = variance
        return variances

    def previous_timestep(self, timestep: Timesteps) -> Timesteps:
        """The s that follows t on the path, -1 (the data) after its last.

        Returns:
            As the stock scheduler: before `set_timesteps` t - 1, of t's own type; afterwards a 0-d
            int64 tensor.

        Raises:
            ValueError: t is not on the path.
        """
        _, s = self._step_on_path(timestep)
        return timestep - 1 if self.num_inference_steps is None else to_device(s.reshape(()), self.timesteps.device)

    def _step_on_path(self, timestep: Timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """t and the s that follows it, (1,) int64, where t is; checked where that costs no sync."""
        if isinstance(timestep, torch.Tensor) and not timestep.is_cpu:
            t = timestep.reshape(1).long()
            return t, self._tables.next_timestep[t]
        value = timestep.item() if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 else timestep
        if not _is_whole(value):
            raise ValueError(f"timestep is {timestep!r}; it must be one whole number on the path")
        t = torch.tensor([int(value)], device="cpu")
        if not 0 <= value < len(self) or int(s := self._tables.next_timestep[t]) == OFF_PATH:
            raise ValueError(
                f"timestep is {int(value)}; it must be on the path: {shorten(self.timesteps.tolist())} (see set_timesteps)"
            )
        return t, s

    # -------------------------------------------------------------------------- the forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

        Args:
            original_samples: x_0, floating point, (B, ...), images in [-1, 1].
            noise: eps, standard normal, same shape.
            timesteps: t in 0..T-1, int or (B,).

        Returns:
            x_t, shape and dtype of x_0; computed in float32 at least.

        Raises:
            ValueError: integer images, shapes that differ, t out of range.
        """
        dtype = _check_images(original_samples=original_samples, noise=noise)
        signal, std = _signal_and_std(self.chain.pair(timesteps, -1), original_samples, dtype)
        return (signal * original_samples + std * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512). As `add_noise`.

        It is what a network of prediction type "v_prediction" learns.
        """
        dtype = _check_images(sample=sample, noise=noise)
        signal, std = _signal_and_std(self.chain.pair(timesteps, -1), sample, dtype)
        return (signal * noise - std * sample).to(sample.dtype)

    def forward_mean_variance(self, x_0: torch.Tensor, t: Timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

        Returns:
            mean (shape of x_0) and variance (broadcasts), in float32 or x_0's wider type.
        """
        dtype = _check_images(x_0=x_0)
        pair = self.chain.pair(t, -1)
        signal, _ = _signal_and_std(pair, x_0, dtype)
        return signal * x_0, _per_image(pair.one_minus_alpha_bar_t, x_0, dtype)

    def posterior_mean_variance(
        self, x_0: torch.Tensor, x_t: torch.Tensor, t: Timesteps, s: Timesteps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_s | x_t, x_0), by Bayes' rule (the notes' figures 9-11).

        At s = -1 the mean is x_0 and the variance 0.

        Returns:
            mean (shape of x_0) and variance (broadcasts), in float32 or the images' wider type.
        """
        dtype = _check_images(x_0=x_0, x_t=x_t)
        pair = self.chain.pair(t, s)
        c_0, c_t, variance = (_per_image(c, x_0, dtype) for c in (pair.c_0, pair.c_t, pair.posterior_variance))
        return c_0 * x_0 + c_t * x_t, variance

    # -------------------------------------------------------------------------- the reverse process

    def predict_original_sample(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, clip: bool | None = None
    ) -> torch.Tensor:
        """x0_hat, the network's guess of the image (the notes' figure 13, solved for x_0).

        Args:
            model_output: the network's output, channels of x_t or twice as many (the second half
                is about the variance).
            x_t: the noisy image, (B, C, ...).
            t: its timestep.
            clip: clip or threshold x0_hat as the config describes; None: if the config says so.
                Fitted `levels` take the place of both; with False it is the raw guess.

        Returns:
            x0_hat, shape of x_t, in float32 or the wider type of the two.
        """
        _check_images(x_t=x_t)
        output, _ = self._split_output(model_output, x_t)
        pair = self.chain.pair(t, -1)
        return self._refined(self._original_sample(output, x_t, pair), pair, clip)

    def predict_noise(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, clip: bool | None = None
    ) -> torch.Tensor:
        """eps_hat = (x_t - sqrt(alpha_bar_t) x0_hat) / sqrt(1 - alpha_bar_t), the noise of x0_hat.

        Arguments and result as of `predict_original_sample`.
        """
        x_0 = self.predict_original_sample(model_output, x_t, t, clip)
        signal, std = _signal_and_std(self.chain.pair(t, -1), x_t, x_0.dtype)
        return (x_t - signal * x_0) / std

    def reverse_mean_variance(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, s: Timesteps, clip: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the reverse step p(x_s | x_t): c_0 x0_hat + c_t x_t, and its type's.

        At s = -1 it is the decoder p(x_0 | x_t): mean x0_hat, variance the decoder's; with fitted
        `levels` the mean and variance of the level.

        Returns:
            mean (shape of x_t) and variance (broadcasts), in float32 or the inputs' wider type.
        """
        _check_images(x_t=x_t)
        output, v = self._split_output(model_output, x_t)
        pair = self.chain.pair(t, s)
        guess = self._original_sample(output, x_t, pair)
        mean = self._mean(self._refined(guess, pair, clip), x_t, pair)
        variance = self._variance(pair, v, guess)
        if self._tables.level_posterior is None or pair.none_at_data:
            return mean, variance
        is_data = _per_image(pair.s, x_t) < 0
        level = self._tables.level_posterior.mean_variance(guess, self._decoder_blur(pair, v, guess))
        return torch.where(is_data, level[0], mean), torch.where(is_data, level[1], variance)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timesteps,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMNotesSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of Algorithm 2: x_s = mean + std z, and the mean alone where s = -1.

        With fitted `levels` the image at s = -1 has the occurring level nearest to each mean.

        Args:
            model_output: the network's output at (sample, timestep), channels of the sample or
                twice as many.
            timestep: t, on the path that `set_timesteps` chose. On an accelerator it is looked up
                there, unchecked: no host sync.
            sample: x_t, (B, C, ...), floating point.
            generator: for z: one, or one an image; a CPU generator serves any device, whose host
                then waits for the copy of each draw.
            return_dict: an output object, or the tuple (prev_sample, pred_original_sample).

        Returns:
            x_s and x0_hat in the sample's dtype; computed in float32 at least.

        Raises:
            ValueError: a timestep off the path, shapes that do not fit, an integer sample.
        """
        x_t = sample.to(_check_images(sample=sample))
        output, v = self._split_output(model_output, x_t)
        pair = self.chain.unchecked_pair(*self._step_on_path(timestep))

        guess = self._original_sample(output, x_t, pair)
        x_0 = self._refined(guess, pair)
        x_s = mean = self._mean(x_0, x_t, pair)
        if not pair.all_at_data:  # std is 0 at the data
            std = self._variance(pair, v, x_0).sqrt().masked_fill(_per_image(pair.s, x_t) < 0, 0)
            noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            x_s = mean + std * noise
        if self._tables.level_posterior is not None and not pair.none_at_data:
            level, _ = self._tables.level_posterior.mean_variance(guess, self._decoder_blur(pair, v, guess))
            x_s = torch.where(_per_image(pair.s, x_t) < 0, self._tables.level_posterior.nearest(level), x_s)

        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMNotesSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)

    def scale_model_input(self, sample: torch.Tensor, timestep: Timesteps | None = None) -> torch.Tensor:
        """The sample itself: DDPM's network sees x_t as it is (other schedulers scale it)."""
        return sample

    def _split_output(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's guess, and its second half where the variance type uses it."""
        learned = self.variance_type in LEARNED_VARIANCES and self.eta is None
        if not model_output.is_floating_point():
            raise ValueError(f"model_output has dtype {model_output.dtype}; it must be floating point")
        if model_output.shape == x_t.shape:
            if learned:
                raise ValueError(
                    f"model_output has {x_t.shape[1]} channels; it must have {2 * x_t.shape[1]} with variance_type "
                    f"'{self.variance_type}', the second half for the variance"
                )
            return model_output, None
        if x_t.ndim < 2 or model_output.shape != (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]):
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} and the sample {tuple(x_t.shape)}; "
                "it must be the same shape, or twice the channels (dimension 1)"
            )
        output, v = model_output.chunk(2, dim=1)
        return output, v if learned else None

    def _original_sample(self, output: torch.Tensor, x_t: torch.Tensor, pair: StepPair) -> torch.Tensor:
        """The network's guess as a guess of x_0, in the wider type of the two."""
        dtype = torch.promote_types(torch.promote_types(x_t.dtype, torch.float32), output.dtype)
        x_0 = output.to(dtype)
        if self.config.prediction_type != "sample":
            signal, std = _signal_and_std(pair, x_t, dtype)
            if self.config.prediction_type == "epsilon":  # x_t = signal x_0 + std eps
                x_0 = (x_t - std * x_0) / signal
            else:  # v = signal eps - std x_0 (arXiv 2202.00512)
                x_0 = signal * x_t - std * x_0
        return x_0

    def _refined(self, guess: torch.Tensor, pair: StepPair, clip: bool | None = None) -> torch.Tensor:
        """x0_hat as the reverse step uses it: the mean of the level given the guess, or clipped."""
        x_0 = self._clip(guess, clip)
        if self._tables.level_posterior is None or clip is False:
            return x_0
        blur = self._tables.level_posterior.guess_blur[pair.t]  # 0 where the guess is not refined
        if blur.is_cpu:  # only those images that need it
            rows = to_device((blur > 0).expand(len(x_0)).nonzero().flatten(), x_0.device)
            if not len(rows):
                return x_0
            mean, _ = self._tables.level_posterior.mean_variance(
                guess[rows], _per_image(blur, guess).expand_as(guess)[rows]
            )
            return x_0.index_put((rows,), mean)
        blur = _per_image(blur, guess)
        mean, _ = self._tables.level_posterior.mean_variance(guess, torch.where(blur > 0, blur, 1))
        return torch.where(blur > 0, mean, x_0)

    def _decoder_blur(self, pair: StepPair, v: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Blur of the guess in the levels' decoder, shaped to broadcast against x."""
        assert self._tables.level_posterior is not None
        blur = _per_image(self._tables.level_posterior.decoder_blur[pair.t], x)
        if v is None or self._tables.level_posterior.decoder_scale is None:
            return blur
        floor, excess = self._log_variance(pair, v, x)
        return torch.where(
            _per_image(pair.t, x) == 0, self._tables.level_posterior.decoder_scale * (floor + excess).exp(), blur
        )

    def _clip(self, x_0: torch.Tensor, clip: bool | None = None) -> torch.Tensor:
        """A guess of x_0 clipped or thresholded as the config says; `clip` overrides whether."""
        config = self.config
        if not (config.thresholding or config.clip_sample if clip is None else clip):
            return x_0
        if not config.thresholding:
            return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
        # arXiv 2205.11487, section 2.3: a high percentile of |x_0|, at least 1, is brought to 1
        limit = torch.quantile(x_0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        limit = _per_image(limit.clamp(min=1, max=config.sample_max_value), x_0)
        return torch.maximum(torch.minimum(x_0, limit), -limit) / limit

    def _mean(self, x_0: torch.Tensor, x_t: torch.Tensor, pair: StepPair) -> torch.Tensor:
        """Mean of the reverse step: the posterior's with x0_hat in the place of x_0."""
        if self.eta is None:  # Ho et al. 2020, eq. 7
            c_0, c_t = pair.c_0, pair.c_t
        else:
            # sqrt(abar_s) x0_hat + direction eps_hat (arXiv 2010.02502, eq. 12), direction =
            # sqrt(1 - abar_s - sigma^2), with the eps_hat that belongs to x_t and x0_hat
            variance = self.eta**2 * pair.posterior_variance
            c_t = ((pair.one_minus_alpha_bar_s - variance).clamp(min=0) / pair.one_minus_alpha_bar_t).sqrt()
            c_0 = pair.alpha_bar_s.sqrt() - c_t * pair.alpha_bar_t.sqrt()
        return _per_image(c_0, x_t, x_0.dtype) * x_0 + _per_image(c_t, x_t, x_0.dtype) * x_t

    def _variance(self, pair: StepPair, v: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Variance of the reverse step, in x's dtype and shaped to broadcast against it."""
        floor, excess = self._log_variance(pair, v, x)
        return (floor + excess).exp().to(x.dtype)

    def _log_variance(
        self, pair: StepPair, v: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log variance of the reverse step as floor + excess, float64, shaped to broadcast to x.

        The floor is the log of the posterior's variance (of the decoder's, where s = -1). The KL to
        the posterior depends on the excess alone, which is exactly 0 for fixed_small.
        """
        is_data = pair.s < 0
        floor = torch.where(is_data, self._tables.log_decoder_variance[pair.t], pair.posterior_variance.log())
        dtype = widest_float(x.device)
        if v is not None:
            v, floor = v.to(dtype), _per_image(floor, x, dtype)
            if self.variance_type == "learned":
                return floor, v - floor
            # learned_range: from the floor to log b
            return floor, (v + 1) / 2 * (_per_image(pair.b.log(), x, dtype) - floor)
        if self.eta is not None:
            excess = torch.full_like(floor, 2 * math.log(self.eta) if self.eta else -math.inf)
        elif self.variance_type == "optimal":
            # (posterior variance + c_0^2 V_t) / posterior variance
            excess = torch.log1p(pair.snr_gain * self._tables.original_sample_mse[pair.t])
        elif self.variance_type.startswith("fixed_large"):
            excess = pair.b.log() - floor
        else:
            excess = torch.zeros_like(floor)
        excess = excess.masked_fill(is_data, 0)
        return _per_image(floor, x, dtype), _per_image(excess, x, dtype)

    # ----------------------------------------------------------------------- the terms of the bound

    def prior_kl(self, x_0: torch.Tensor, t: Timesteps | None = None, per_pixel: bool = False) -> torch.Tensor:
        """KL(q(x_t | x_0), N(0, I)): what the chain's start still knows of the image.

        Args:
            x_0: images in [-1, 1], (B, ...).
            t: the path's first timestep; None takes that of `scheduler.timesteps`.
            per_pixel: not summed over dims.

        Returns:
            nats per image, summed over dims, (B,) float64; or per pixel, shape of x_0.
        """
        _check_images(x_0=x_0)
        pair = self.chain.pair(self.timesteps[0] if t is None else t, -1).to(x_0.device)
        if per_pixel:
            signal, noise = (_per_image(c, x_0) for c in (pair.alpha_bar_t, pair.prior_kl(0)))
            return signal * x_0**2 / 2 + noise
        _per_image(pair.t, x_0)  # there is one timestep, or one an image
        dims = x_0[0].numel()
        mean_square = x_0.flatten(1).pow(2).sum(1, dtype=widest_float(x_0.device)) / dims
        return dims * pair.prior_kl(mean_square)

    def vlb_terms(
        self,
        model_output: torch.Tensor,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        t: Timesteps,
        s: Timesteps,
        clip: bool | None = None,
        per_pixel: bool = False,
    ) -> torch.Tensor:
        """One term of the bound for each image (the notes' figures 6-8 and 12).

        At s >= 0 it is KL(q(x_s | x_t, x_0), p(x_s | x_t)). At s = -1 it is the decoder's cost,
        -log p(x_0 | x_t), by the exact mass of each 8-bit pixel's bin, or with fitted `levels` by
        the probability of each pixel's level.

        Args:
            model_output: the network's output at (x_t, t).
            x_0: the images, 8-bit levels k / 127.5 - 1 where s = -1.
            x_t: a sample of q(x_t | x_0), same shape.
            t, s: the pair, int or (B,), s < t.
            clip: as in `predict_original_sample`.
            per_pixel: not summed over dims.

        Returns:
            nats, summed over dims, (B,) float64, or per pixel, shape of x_0; differentiable in
            model_output.

        Raises:
            ValueError: shapes or timesteps that do not fit; an eta other than None and 1, as the
                bound belongs to Algorithm 2.
        """
        if self.eta not in (None, 1):
            raise ValueError(
                f"eta is {self.eta}; it must be None or 1 in the bound (a DDIM path has another one; take "
                "from_config(config, eta=None))"
            )
        _check_images(x_0=x_0, x_t=x_t)
        output, v = self._split_output(model_output, x_t)
        pair = self.chain.pair(t, s)
        guess = self._original_sample(output, x_t, pair)
        terms = self._posterior_kl(x_0, self._refined(guess, pair, clip), pair, v)
        if not pair.none_at_data:
            is_data = pair.s < 0
            if is_data.is_cpu:  # the decoder of those images alone that need it
                rows = to_device(is_data.expand(len(x_0)).nonzero().flatten(), x_0.device)
                at_data = self.chain.pair(pair.t.expand(len(x_0))[is_data.expand(len(x_0))], -1)
                cost = self._decoder_cost(x_0[rows], guess[rows], at_data, None if v is None else v[rows], clip)
                terms = terms.index_put((rows,), cost)
            else:
                terms = torch.where(_per_image(is_data, x_0), self._decoder_cost(x_0, guess, pair, v, clip), terms)
        return terms if per_pixel else terms.flatten(1).sum(1)

    def _posterior_kl(
        self, x_0: torch.Tensor, x_0_hat: torch.Tensor, pair: StepPair, v: torch.Tensor | None
    ) -> torch.Tensor:
        """KL(q(x_s | x_t, x_0), p(x_s | x_t)) in nats per pixel, float64. Meaningless at the data.

        The means of the two Gaussians are c_0 (x_0 - x0_hat) apart and their log variances
        `excess`: (excess + exp(-excess) - 1 + c_0^2 (x_0 - x0_hat)^2 / variance) / 2.
        """
        _, excess = self._log_variance(pair, v, x_0)
        gain = pair.snr_gain.masked_fill(pair.s < 0, 0)  # c_0^2 / posterior variance
        weight = _per_image(gain, x_0, excess.dtype) * torch.exp(-excess)  # c_0^2 / variance
        return 0.5 * (excess + torch.expm1(-excess) + weight.to(x_0_hat.dtype) * (x_0 - x_0_hat) ** 2)

    def _decoder_cost(
        self, x_0: torch.Tensor, guess: torch.Tensor, pair: StepPair, v: torch.Tensor | None, clip: bool | None
    ) -> torch.Tensor:
        """-log P(x_0 | x_t), nats per pixel, float64."""
        if self._tables.level_posterior is not None:
            return -self._tables.level_posterior.log_mass(x_0, guess, self._decoder_blur(pair, v, guess))
        floor, excess = self._log_variance(pair, v, guess)
        return -discretized_gaussian_log_likelihood(x_0, self._clip(guess, clip), floor + excess)


# ---------------------------------------------------------------------------------------- functions


def _signal_and_std(pair: StepPair, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to broadcast against x."""
    signal, std = pair.alpha_bar_t.sqrt(), pair.one_minus_alpha_bar_t.sqrt()
    return _per_image(signal, x, dtype), _per_image(std, x, dtype)


def _per_image(values: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One value an image (B,), or one for all (1,), on x's device, shaped to broadcast to x."""
    if values.numel() not in (1, x.shape[0]):
        raise ValueError(f"{values.numel()} timesteps for {x.shape[0]} images; there must be one, or one an image")
    return to_device(values, x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))


def _check_images(**images: torch.Tensor) -> torch.dtype:
    """The dtype to compute in; ValueError for images of an integer dtype or of several shapes."""
    dtype = torch.float32
    first_name, first = next(iter(images.items()))
    for name, x in images.items():
        if not x.is_floating_point():
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be floating point (8-bit images are k / 127.5 - 1, in [-1, 1])"
            )
        if x.ndim == 0 or x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and {first_name} {tuple(first.shape)}; "
                "both must be of one shape (B, ...)"
            )
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _check_config(config: Any) -> None:
    """The settings that stand alone."""
    choices = {
        "variance_type": VARIANCE_TYPES,
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
    }
    for name, choice in choices.items():
        if config[name] not in choice:
            raise ValueError(f"{name} is {config[name]!r}; it must be one of {', '.join(choice)}")
    T, offset, ratio = config.num_train_timesteps, config.steps_offset, config.dynamic_thresholding_ratio
    if not _is_whole(T) or T < 1 or isinstance(T, float):
        raise ValueError(f"num_train_timesteps is {T!r}; it must be a whole number of at least 1")
    if not _is_whole(offset) or offset < 0:
        raise ValueError(f"steps_offset is {offset!r}; it must be a whole number of at least 0")
    for name in ("clip_sample_range", "sample_max_value"):
        if not config[name] > 0:
            raise ValueError(f"{name} is {config[name]!r}; it must be above 0")
    if not 0 < ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio is {ratio!r}; it must be above 0 and at most 1")


def _check_eta(eta: float | None) -> float | None:
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; it must be None (Algorithm 2), or a number from 0 (DDIM) to 1")
    return eta


def _check_original_sample_mse(values: Any, variance_type: str, T: int) -> list[float] | None:
    if values is None:
        if variance_type == "optimal":
            raise ValueError(
                "variance_type is 'optimal' and original_sample_mse is None; it must be num_train_timesteps floats"
            )
        return None
    mse = [float(v) for v in values]
    if len(mse) != T or not all(math.isfinite(v) and v >= 0 for v in mse):
        raise ValueError(
            f"original_sample_mse has {len(mse)} values from {min(mse, default=None)} to {max(mse, default=None)}; "
            f"it must have {T} (num_train_timesteps), finite and at least 0"
        )
    return mse


def _check_decoder_variance(value: Any, T: int) -> dict[int, float] | None:
    if value is None:
        return None
    # JSON turns a dictionary's keys into strings
    variances = {int(t): float(v) for t, v in value.items()} if isinstance(value, dict) else {0: float(value)}
    for t, variance in variances.items():
        if not 0 <= t < T or not (math.isfinite(variance) and variance > 0):
            raise ValueError(
                f"decoder_variance has {variance!r} for last timestep {t}; it must have finite numbers above 0, "
                f"at timesteps 0..{T - 1}"
            )
    return variances


def _as_path(timesteps: Any, T: int) -> list[int]:
    """Timesteps of any kind as a list of ints, checked."""
    values = [t.item() if isinstance(t, (torch.Tensor, np.generic)) else t for t in timesteps]
    if not values:
        raise ValueError("timesteps is empty; it must have at least one timestep")
    outside = [t for t in values if not _is_whole(t) or not 0 <= t < T]
    if outside:
        raise ValueError(f"timesteps has {shorten(outside)}; they must be whole numbers from 0 to {T - 1}")
    path = [int(t) for t in values]
    if any(s >= t for t, s in itertools.pairwise(path)):
        raise ValueError(f"timesteps is {shorten(path)}; it must fall strictly (each below the one before)")
    return path


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and float(value).is_integer()


# ---------------------------------------------------------------- pipeline_ddpm_notes.py

"""The loops over a network: Algorithm 2 of DDPM, which makes images from noise, and the bound.

Sampling: x_T ~ N(0, I); for each (t, s) of the scheduler's path x_s ~ p(x_s | x_t); the last mean
is the image. The sample stays in float32 whatever the network's type: only what the network is
given is cast. The bound on -log2 P(image) is in core/likelihood.py.
"""




OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_ddpm(scheduler: Any) -> bool:
    """Whether the scheduler has a bound. Duck-typed: a reloaded pipeline.py redefines the class."""
    return hasattr(scheduler, "vlb_terms")


class DDPMNotesPipeline(DiffusionPipeline):
    """A DDPM: a UNet and the scheduler that is its math.

    Args:
        unet (`UNet2DModel`): predicts eps, x_0 or v, as the scheduler's `prediction_type` says. It
            has as many output channels as input channels, or twice as many for a learned variance.
            With class embeddings, the last may be that of "no label" (`null_label` below).
        scheduler: a `DDPMNotesScheduler`. A stock `DDPMScheduler` is converted into one, so that
            any DDPM checkpoint loads; any other diffusers scheduler (DDIM, DPM-Solver++, UniPC...)
            samples as it is.

    `save_pretrained` writes a folder that loads in three ways: with this package; with any
    diffusers as a plain `DDPMPipeline`; and, with `custom_pipeline=folder, trust_remote_code=True`,
    as this class from the pipeline.py in the folder.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    # The text of the pipeline.py that defined this class, set there; None for the installed class.
    hub_source: ClassVar[str | None] = None

    def __init__(self, unet: UNet2DModel | torch.nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMNotesScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False

    @property
    def null_label(self) -> int | None:
        """The class label for "no label", after the last class, from the UNet's config; or None."""
        return (self.unet.config.get(PRIVATE_ENTRY) or {}).get("null_label")

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null label not counted; None for an unconditional model."""
        embeddings = self.unet.config.get("num_class_embeds")
        return embeddings if embeddings is None or self.null_label is None else self.null_label

    @property
    def interrupt(self) -> bool:
        """Set it to True in a callback to end the sampling loop after that step."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def execution_device(self) -> torch.device:
        """Where the network runs, model offloading considered."""
        return self._execution_device

    @property
    def sample_dtype(self) -> torch.dtype:
        """What samples are kept in: the network's dtype, float32 at least."""
        return torch.promote_types(self.unet.dtype, torch.float32)

    # -------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make images by Algorithm 2 (Ho et al. 2020), or by another scheduler's steps.

        Args:
            batch_size: number of images.
            class_labels: for a class-conditional UNet: one label for all, or one an image; None is
                the null label.
            guidance_scale: w in null + w (conditional - null) (classifier-free guidance, arXiv
                2207.12598). 1 is off; any other value needs `class_labels` and a model trained with
                a null label, and evaluates the network twice a step.
            num_inference_steps: length of the path; None: every timestep for DDPM, 50 for another
                scheduler.
            timesteps: or the path itself, strictly falling.
            eta: None for the scheduler's own way (Algorithm 2); or DDIM's eta in [0, 1], for
                schedulers that have one.
            generator: one for the batch, or a list of one an image: then the image of a seed does
                not depend on the batch it is in.
            latents: x_T, standard normal, (batch_size, C, H, W), in the place of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (the sample in [-1, 1], not clamped).
            return_dict: an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": x_s}) after each
                step; may return new ones. Setting `pipeline.interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: which tensors it gets: ["latents"].

        Raises:
            ValueError: labels, guidance, timesteps, eta, generators or latents that do not fit the
                model; raised before the network runs.
        """
        names = callback_on_step_end_tensor_inputs or self._callback_tensor_inputs
        self._check_inputs(batch_size, class_labels, guidance_scale, output_type, names)
        device, dtype = self.execution_device, self.unet.dtype
        labels = self._labels(class_labels, batch_size, device)
        path, step_arguments = self._prepare_scheduler(num_inference_steps, timesteps, eta, generator, device)
        x_t = self._initial_noise(batch_size, generator, latents, device)

        self._interrupt = False
        # The scheduler gets each timestep where the path is, on the CPU for a DDPM: checking it
        # there forces no device sync. The network gets it on its own device.
        with self.progress_bar(total=len(path)) as bar:
            for i, (t, network_t) in enumerate(zip(path, to_device(path, device))):
                if self._interrupt:
                    break
                model_input = self.scheduler.scale_model_input(x_t, t)
                model_output = self.predict(model_input, network_t, labels, guidance_scale, dtype).to(x_t.dtype)
                x_t = self.scheduler.step(model_output, t, x_t, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x_t = (callback_on_step_end(self, i, t, {"latents": x_t}) or {}).get("latents", x_t)
                bar.update()

        images = self._as_output(x_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The network's output for x_t, in the network's dtype, as the scheduler takes it.

        Args:
            x_t: (B, C, H, W), on the network's device.
            t: timesteps, 0-d or (B,). class_labels: (B,) int64, checked, or None.
            guidance_scale: as of a call; guidance moves the mean and leaves a learned variance
                conditional.
            dtype: the network's, where it is known: diffusers searches the whole network for it.
        """
        x = x_t.to(dtype or self.unet.dtype)
        t = t.to(x.device)
        labels = None if class_labels is None else class_labels.to(x.device)
        if guidance_scale == 1 or labels is None:
            output = self.unet(x, t, class_labels=labels, return_dict=False)[0]
        else:
            null = torch.full_like(labels, self.null_label or 0)
            t = t if t.ndim == 0 else torch.cat([t, t])
            both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null]), return_dict=False)[0]
            conditional, unconditional = both.chunk(2)
            C = x.shape[1]
            guided = unconditional[:, :C] + guidance_scale * (conditional[:, :C] - unconditional[:, :C])
            output = torch.cat([guided, conditional[:, C:]], dim=1)
        # Stock DDPM schedulers know a learned variance; all others get the mean's half.
        whole = is_ddpm(self.scheduler) or vars(self.scheduler).get("variance_type") in LEARNED_VARIANCES
        return output if whole else output[:, : x.shape[1]]

    def _check_inputs(
        self, batch_size: Any, class_labels: Any, guidance_scale: float, output_type: str, names: list[str]
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {names!r}; it must be among {self._callback_tensor_inputs}"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
        if guidance_scale != 1 and (class_labels is None or self.null_label is None):
            raise ValueError(
                f"guidance_scale is {guidance_scale} with class_labels {class_labels!r} and null label "
                f"{self.null_label!r}; it must be 1, unless class_labels are given and the model was trained with a "
                "null label"
            )

    def _labels(self, class_labels: Any, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """class_labels as an int64 tensor (B,) on the device, checked."""
        if getattr(self.unet, "class_embedding", None) is None:
            if class_labels is not None:
                raise ValueError(f"class_labels is {class_labels!r}; it must be None, as the model is unconditional")
            return None
        if class_labels is None:
            if self.null_label is None:
                raise ValueError(
                    f"class_labels is None and the model has no null label; it must be 0 to {(self.num_classes or 1) - 1}, "
                    "one for all or one an image"
                )
            class_labels = self.null_label
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.is_floating_point() or labels.numel() not in (1, batch_size):
            raise ValueError(
                f"class_labels is {class_labels!r}; it must be one integer, or {batch_size} (batch_size) of them"
            )
        embeddings = self.unet.config.get("num_class_embeds")
        if embeddings is not None and not 0 <= int(labels.min()) <= int(labels.max()) < embeddings:
            raise ValueError(
                f"class_labels has {int(labels.min())} to {int(labels.max())}; it must be 0 to {embeddings - 1}"
            )
        return to_device(labels.long(), device).expand(batch_size)

    def _prepare_scheduler(
        self, n: int | None, timesteps: list[int] | None, eta: float | None, generator: Any, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Set the scheduler's path; returns it and the arguments that its `step` takes."""
        scheduler, ours = self.scheduler, is_ddpm(self.scheduler)
        name = type(scheduler).__name__
        if n is not None and timesteps is not None:
            raise ValueError(f"num_inference_steps is {n} and timesteps is given too; only one of the two may be")
        if n is not None and n < 1:
            raise ValueError(f"num_inference_steps is {n}; it must be a whole number of at least 1")
        path: dict[str, Any] = {"timesteps": timesteps}
        if timesteps is None:
            path = {"num_inference_steps": n if n is not None else len(scheduler) if ours else 50}
        step_parameters = inspect.signature(scheduler.step).parameters
        arguments = {"generator": generator} if "generator" in step_parameters else {}
        if ours:
            scheduler.set_timesteps(**path, eta=eta)
            return scheduler.timesteps, arguments
        if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"timesteps is given and {name} takes none; it must be num_inference_steps")
        if eta is not None:
            if "eta" not in step_parameters:
                raise ValueError(f"eta is {eta} and {name} has none; it must be None")
            arguments["eta"] = eta
        scheduler.set_timesteps(**path, device=device)
        return scheduler.timesteps, arguments

    def _initial_noise(
        self, batch_size: int, generator: Any, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """x_T, in float32 at least, at the scheduler's scale."""
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}; it must have {batch_size} (batch_size), or be a single one"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.sample_dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be {shape}")
        return latents.to(device=device, dtype=self.sample_dtype) * self.scheduler.init_noise_sigma

    def _as_output(self, x_0: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x_0
        images = (x_0 / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.float().permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    # -------------------------------------------------------------------------------- likelihood

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        class_labels: Any = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        evaluations_per_image: int = EVALUATIONS_PER_IMAGE,
        full: bool = False,
        clip: bool | None = None,
        batch_size: int = 128,
        seed: int = 0,
        first_image: int = 0,
        pilot_images: Any = None,
        guidance_scale: float = 1.0,
        return_map: bool = False,
    ) -> BitsPerDimOutput:
        """The bound on -log2 P(x_0) / dims: the bits a dimension that encoding the images takes.

        Each image gets noise of its own, from (seed, its number): how images are batched does not
        matter, and calls with one seed compare models on the same noise. Without `full`, the
        decoder's term and `evaluations_per_image - 1` others are evaluated for each image, one in
        each of as many ranges of timesteps that contribute alike, found from a few pilot images
        first.

        Args:
            images: 8-bit images: uint8 tensor (N, C, H, W), uint8 array (N, H, W, C) or
                (N, C, H, W), PIL image(s), floats k / 127.5 - 1 (k = 0..255), or an iterable of
                batches of these (or of dicts with "pixel_values" and maybe "class_labels"), which
                is read once and never held whole.
            class_labels: for a class-conditional model: one for all, or one for each of `images`;
                None takes the batches' own, else the null label.
            num_inference_steps, timesteps: the path; a sampler of K steps has its own bound. None:
                every timestep.
            evaluations_per_image: network evaluations for each image; a dozen gives most for the
                cost if there are enough images. A path of no more steps is summed in full.
            full: evaluate every term of the path.
            clip: clip x0_hat; None as the scheduler's config says (improved-diffusion: in
                evaluation, not in training).
            batch_size: noisy images through the network at once.
            seed: of all noise. first_image: number of the first image, to split a set over
                processes.
            pilot_images: images to find the ranges with, where `images` is one part of a set; with
                labels of their own where `class_labels` has one for each of `images`. The first 16
                are used. Default: those of `images`.
            guidance_scale: must be 1, as guided sampling has no bound.
            return_map: also give the bits of each pixel (`maps`, held in memory, one an image) and
                of each class of levels at each timestep (`by_level`).

        Raises:
            ValueError: images off the 256-level grid, not finite, of another range or channels;
                none at all; a scheduler that is no DDPM, or has an eta other than 1; guidance;
                labels that do not fit.

        Warns of pixels whose level has the weight 0 in the scheduler's levels.
        """
        scheduler = self._bound_scheduler(num_inference_steps, timesteps, evaluations_per_image, guidance_scale)
        batches = self.image_batches(images, class_labels)
        device, dtype = self.execution_device, self.sample_dtype
        bound = Bound(scheduler, self.predict, device, dtype, clip, batch_size, seed, return_map)
        draws = not full and len(scheduler.timesteps) > evaluations_per_image
        # read ahead: how images are batched must not decide which of them the ranges are chosen on
        held, pilot = first_images(batches, PILOT_IMAGES if draws and pilot_images is None else 1)
        if not held:
            raise ValueError("images is empty; it must have at least one image")
        if draws:
            if pilot_images is not None:
                pilot = self._pilot(pilot_images, class_labels)
            bound.draw_terms(evaluations_per_image - 1, pilot)
        dims, batches = held[0][0][0].numel(), itertools.chain(held, batches)
        del held, pilot  # the last references to these images, once they are measured
        parts, number, unseen = [], first_image, 0
        settings = {"desc": "bits/dim", "unit": "image", "total": number_of_images(images)}
        with self.image_progress_bar(**settings) as bar:
            for pixels, labels in regrouped(batches, max(1, batch_size // bound.terms.per_image)):
                if pixels[0].numel() != dims:
                    raise ValueError(
                        f"images has {pixels[0].numel()} dims after {dims}; it must have images of one size"
                    )
                parts.append(bound(pixels, labels, number))
                number += len(pixels)
                unseen += num_unseen(pixels, scheduler.levels)
                bar.update(len(pixels))
        if unseen:
            warnings.warn(
                f"{unseen} of {(number - first_image) * dims} pixels have levels of weight 0, which do not occur in the "
                "images that the levels were fitted on: the decoder spends 24 bits on each",
                stacklevel=3,  # through torch.no_grad, to the caller
            )
        self.maybe_free_model_hooks()
        maps, by_level = (torch.stack(bound.maps), bound.by_level) if return_map else (None, None)
        return BitsPerDimOutput.from_parts(
            torch.cat(parts), bound.per_timestep, dims, bound.evaluations, maps, by_level
        )

    def image_batches(self, images: Any, class_labels: Any = None, need_labels: bool = False) -> Iterator[ImageBatch]:
        """(uint8 (B, C, H, W), labels (B,) int64 or None) for whatever `images` is, on the CPU.

        Args:
            images, class_labels: as of `bits_per_dim`.
            need_labels: refuse batches without labels.
        """
        cpu = torch.device("cpu")  # labels are checked here, and moved with the noisy images
        for pixels, labels in image_batches(images, self.unet.config.in_channels, class_labels, need_labels):
            yield pixels, self._labels(labels, len(pixels), cpu)

    def image_progress_bar(self, **settings: Any) -> tqdm:
        """A progress bar with these settings, and those of `set_progress_bar_config` over them."""
        return tqdm(**{**settings, **getattr(self, "_progress_bar_config", {})})

    def _bound_scheduler(
        self, n: int | None, timesteps: list[int] | None, evaluations_per_image: int, guidance_scale: float
    ) -> DDPMNotesScheduler:
        """A copy of the scheduler on the path, once it is clear that there is a bound."""
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; it must be 1 (guided sampling is no normalised reverse process: "
                "no bound)"
            )
        if not is_ddpm(self.scheduler):
            raise ValueError(
                f"the scheduler is {type(self.scheduler).__name__}, whose steps are no posteriors; it must be a DDPM, "
                "such as DDPMNotesScheduler.from_config(pipeline.scheduler.config)"
            )
        if evaluations_per_image < 2:
            raise ValueError(
                f"evaluations_per_image is {evaluations_per_image}; it must be at least 2 (the decoder's term and another)"
            )
        scheduler = DDPMNotesScheduler.from_config(self.scheduler.config)
        if timesteps is not None or n is not None:
            scheduler.set_timesteps(n, timesteps=timesteps)
        first = int(scheduler.timesteps[0])
        alpha_bar = float(scheduler.alphas_cumprod[first])
        if alpha_bar > 1e-3:
            warnings.warn(
                f"alpha_bar at the path's first timestep {first} is {alpha_bar:.3g}: the image shines through, samples "
                "start from the wrong distribution, and the prior's part of the bound is large",
                stacklevel=4,  # through bits_per_dim and torch.no_grad, to the caller
            )
        return scheduler

    def _pilot(self, pilot_images: Any, class_labels: Any) -> list[ImageBatch]:
        one = class_labels is not None and torch.as_tensor(class_labels).numel() == 1
        batches = self.image_batches(pilot_images, class_labels if one else None, class_labels is not None)
        _, pilot = first_images(batches, PILOT_IMAGES)
        if not pilot:
            raise ValueError("pilot_images is empty; it must have at least one image")
        return pilot

    # -------------------------------------------------------------------------------- saving

    def to_json_string(self) -> str:
        """model_index.json under the stock names: diffusers loads the folder without this code."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = "DDPMPipeline"
        index.pop("_name_or_path", None)  # where it was loaded from: often a path of the owner's machine
        if is_ddpm(self.scheduler):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """model_index.json and, beside it, this class as the one file pipeline.py."""
        super().save_config(save_directory, **kwargs)
        for path in Path(save_directory).glob("*/config.json"):  # diffusers writes where it was loaded from there, too
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (Path(save_directory) / "pipeline.py").write_text(pipeline_source(type(self)), encoding="utf-8")


def pipeline_source(pipeline_class: type[DDPMNotesPipeline] = DDPMNotesPipeline) -> str:
    """The text of the Hub's pipeline.py: the shipped files joined into one.

    A class that was itself loaded from such a file gives that file back, unchanged.
    """
    if pipeline_class.hub_source is not None:
        return pipeline_class.hub_source
    return importlib.import_module(".hub.code", __package__).joined_source()

# ---------------------------------------------------------------- a module of its own

if "__isolated__" not in globals():
    # diffusers runs the pipeline.py of every local folder as one and the same module, each over the
    # names of the last: functions of one version would find constants of another. So what this file
    # defines lives in a module named by its digest, and this one holds the same names.
    import hashlib
    import sys
    import types

    _source = Path(__file__).read_text(encoding="utf-8")
    _name = "ddpm_notes_pipeline_" + hashlib.sha256(_source.encode()).hexdigest()[:16]
    if _name not in sys.modules:
        _module = sys.modules[_name] = types.ModuleType(_name, __doc__)
        _module.__file__, _module.__isolated__ = __file__, True
        exec(compile(_source, __file__, "exec"), vars(_module))
        # what the class saves again: the file may be replaced while the class lives on
        _module.DDPMNotesPipeline.hub_source = _source
    globals().update({name: value for name, value in vars(sys.modules[_name]).items() if not name.startswith("__")})
