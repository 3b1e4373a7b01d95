"""Image sets of any form as batches of uint8 pixels, checked on the way."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..core.image_batches import regrouped
from ..data import ImageSet

ONE_SHAPE = "must be one shape for all sets, loaded the same way (load_images has resolution and image_mode)"


def batches(
    images: ImageSet, first: int = 0, end: int | None = None, size: int = 256, labelled: bool = False
) -> Iterator[dict[str, Any]]:
    """Images first..end-1 in order, `size` at a time: "pixel_values", uint8 (B, C, H, W).

    And their "class_labels", (B,): None unless `labelled`, or if the set has none.
    """
    end = len(images) if end is None else end
    labels = torch.from_numpy(images.labels) if labelled and images.labels is not None else None
    for i in range(first, end, size):
        stop = min(i + size, end)
        yield {
            "pixel_values": images.take(range(i, stop)),
            "class_labels": None if labels is None else labels[i:stop],
        }


def agreed_shape(sets: dict[str, Any]) -> tuple[int, ...] | None:
    """(C, H, W) of the sets that have one before they are read; None if there are none.

    Raises:
        ValueError: sets of several shapes, or whose first image is of another range or type.
    """
    shapes = {
        name: tuple(next(uint8_batches(name, images, 1)).shape[1:])
        for name, images in sets.items()
        if isinstance(images, (ImageSet, torch.Tensor, np.ndarray)) and len(images)
    }
    if len(set(shapes.values())) > 1:
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"images are (C, H, W): {seen}; {ONE_SHAPE}")
    return next(iter(shapes.values()), None)


def uint8_batches(name: str, images: Any, size: int) -> Iterator[torch.Tensor]:
    """uint8 (size, C, H, W) each, the last one smaller, whatever batches the images come in.

    Args:
        name: of the set, for messages.
        images: an `ImageSet`; uint8, or floats in [0, 1], (N, C, H, W); or batches of such, also as
            {"pixel_values": ...}.
        size: of the batches.
    """
    parts: Iterable[Any] = images
    if isinstance(images, ImageSet):
        parts = batches(images, size=size)
    elif isinstance(images, (torch.Tensor, np.ndarray)):
        parts = (images[i : i + size] for i in range(0, len(images), size))
    elif not isinstance(images, Iterable) or isinstance(images, (str, dict)):
        raise ValueError(f"{name} is {type(images).__name__}; must be an ImageSet, a tensor (N, C, H, W), or batches")
    checked = ((_as_uint8(name, part["pixel_values"] if isinstance(part, dict) else part), None) for part in parts)
    for pixels, _ in regrouped(checked, size):
        yield pixels


def _as_uint8(name: str, images: Any) -> torch.Tensor:
    x = torch.as_tensor(images) if isinstance(images, np.ndarray) else images
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] > 4:
        seen = f"of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"of type {type(x).__name__}"
        raise ValueError(f"{name} has a batch {seen}; must be a tensor (N, C, H, W) with 1 to 4 channels")
    if x.dtype == torch.uint8 or not x.numel():
        return x.cpu().byte()
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; must be uint8, or floats in [0, 1]")
    lowest, highest = float(x.min()), float(x.max())
    if not 0 <= lowest <= highest <= 1:
        hint = " (a model's [-1, 1]? data.to_uint8 turns it into uint8)" if -1.5 <= lowest < 0 else ""
        raise ValueError(f"{name} has floats from {lowest:.4g} to {highest:.4g}; must be in [0, 1], or uint8{hint}")
    return (x.cpu().double() * 255).round().byte()
