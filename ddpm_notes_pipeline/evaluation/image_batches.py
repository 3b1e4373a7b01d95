"""Image sets of any form as batches of uint8 pixels, checked on the way."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..data import ImageSet

ONE_SHAPE = "must be one shape for all sets, loaded the same way (load_images has resolution and image_mode)"


def agreed_shape(sets: dict[str, Any]) -> tuple[int, ...] | None:
    """(C, H, W) of the sets that can be checked without reading them; None if there are none.

    Raises:
        ValueError: sets of several shapes, or a tensor of another range or type.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, images in sets.items():
        if isinstance(images, ImageSet):
            shapes[name] = (images.channels, *images.size)
        elif isinstance(images, (torch.Tensor, np.ndarray)):
            shapes[name] = tuple(_as_uint8(name, images[:1]).shape[1:])
            _check_range(name, torch.as_tensor(images))
    if len(set(shapes.values())) > 1:
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"images are (C, H, W): {seen}; {ONE_SHAPE}")
    return next(iter(shapes.values()), None)


def number_of(images: Any) -> int | None:
    """How many images a set has, where that is known before it is read."""
    return len(images) if isinstance(images, (ImageSet, torch.Tensor, np.ndarray)) else None


def uint8_batches(name: str, images: Any, size: int) -> Iterator[torch.Tensor]:
    """uint8 (size, C, H, W) each, the last one smaller, whatever batches the images come in.

    Args:
        name: of the set, for messages.
        images: an `ImageSet`; uint8, or floats in [0, 1], (N, C, H, W); or batches of such, also as
            {"pixel_values": ...}.
        size: of the batches.
    """
    rest: torch.Tensor | None = None
    for batch in _batches(name, images, size):
        if rest is not None and len(rest) and rest.shape[1:] == batch.shape[1:]:
            batch = torch.cat([rest, batch])
        elif rest is not None and len(rest):
            yield rest  # of another shape: the reader refuses it
        whole = len(batch) // size * size
        yield from batch[:whole].split(size) if whole else ()
        rest = batch[whole:]
    if rest is not None and len(rest):
        yield rest


def _batches(name: str, images: Any, size: int) -> Iterator[torch.Tensor]:
    if isinstance(images, ImageSet):
        for i in range(0, len(images), size):
            yield images.take(range(i, min(i + size, len(images))))
    elif isinstance(images, (torch.Tensor, np.ndarray)):
        for i in range(0, len(images), size):
            yield _as_uint8(name, images[i : i + size])
    elif isinstance(images, Iterable) and not isinstance(images, (str, dict)):
        for batch in images:
            yield _as_uint8(name, batch["pixel_values"] if isinstance(batch, dict) else batch)
    else:
        raise ValueError(f"{name} is {type(images).__name__}; must be an ImageSet, a tensor (N, C, H, W), or batches")


def _as_uint8(name: str, images: Any) -> torch.Tensor:
    x = torch.as_tensor(images) if isinstance(images, np.ndarray) else images
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        seen = f"of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"of type {type(x).__name__}"
        raise ValueError(f"{name} has a batch {seen}; must be a tensor (N, C, H, W)")
    if x.shape[1] > 4:
        raise ValueError(f"{name} has a batch of shape {tuple(x.shape)}; must be (N, C, H, W) with 1 to 4 channels")
    if x.dtype == torch.uint8:
        return x.cpu()
    _check_range(name, x)
    return (x.cpu().double() * 255).round().to(torch.uint8)


def _check_range(name: str, x: torch.Tensor) -> None:
    if x.dtype == torch.uint8 or not x.numel():
        return
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; must be uint8, or floats in [0, 1]")
    lowest, highest = float(x.min()), float(x.max())
    if not 0 <= lowest <= highest <= 1:
        hint = " (a model's [-1, 1]? data.to_uint8 turns it into uint8)" if -1.5 <= lowest < 0 else ""
        raise ValueError(f"{name} has floats from {lowest:.4g} to {highest:.4g}; must be in [0, 1], or uint8{hint}")
