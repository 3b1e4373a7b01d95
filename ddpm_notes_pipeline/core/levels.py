"""8-bit pixels: the 256 levels k / 127.5 - 1, k = 0..255, and how likely each one is."""

import math
from typing import Any

import numpy as np
import torch

from .gaussian_chain import widest_float

HALF_PIXEL = 1 / 255  # half the distance between two neighbouring levels


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
