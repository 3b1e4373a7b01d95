"""Whatever a user calls images, as a stream of uint8 batches with their labels."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from .levels import as_pixels

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
