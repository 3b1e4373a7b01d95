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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .gaussian_chain import Table, widest_float

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
