"""One encoded image -> pixels: 8 bits, upright, in one of three modes, resized and cropped."""

import io
from typing import Any, NamedTuple

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps

MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # image mode -> channels


class Transform(NamedTuple):
    """What is done to every image.

    Attributes:
        target: (H, W) in pixels that images are resized to cover; None keeps their size.
        center_crop: whether the central H x W is stored, rather than the whole resized image.
        image_mode: the mode that images are converted to; None keeps that of the first image.
        on_bad_image: "error" or "skip".
    """

    target: tuple[int, int] | None
    center_crop: bool
    image_mode: str | None
    on_bad_image: str


class DecodedImage(NamedTuple):
    """Pixels, uint8 of shape (C, H, W), their mode, and what was done to get them."""

    pixels: np.ndarray
    mode: str
    sixteen_bit: bool
    lossy: bool
    resized: bool


def decode(raw: Any, transform: Transform, mode: str | None) -> DecodedImage:
    """Decode one image.

    Args:
        raw: an array (H, W), or what `datasets.Image(decode=False)` gives, {"bytes", "path"}.
        transform: what is done to it.
        mode: the mode of the first image, which all must have; None for the first.

    Raises:
        Exception: whatever PIL raises for a broken file; ValueError for an image of another mode.
    """
    image, lossy = open_image(raw)
    image, sixteen_bit = _to_8_bits(image)
    image = _convert(image, transform.image_mode)
    if mode is not None and image.mode != mode:
        found = image.mode + (" (from 16 bits)" if sixteen_bit else "")
        raise ValueError(
            f"its mode is {found}, that of the first image is {mode}; image_mode (--image_mode) converts all to one"
        )
    image, resized = _resize(image, transform)
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return DecodedImage(pixels, image.mode, sixteen_bit, lossy, resized)


def open_image(raw: Any) -> tuple[PIL.Image.Image, bool]:
    """The image of a row, upright, and whether its format is lossy (JPEG)."""
    if raw is None:
        raise ValueError("the row holds no image")
    if isinstance(raw, np.ndarray):
        return PIL.Image.fromarray(raw), False
    raw = read_remote(raw)
    try:
        file = PIL.Image.open(raw["path"] if raw["bytes"] is None else io.BytesIO(raw["bytes"]))
    except PIL.UnidentifiedImageError as error:  # its own message names an object in memory
        raise ValueError("cannot identify its format as one of images") from error
    with file:
        # `open` reads only the header; transposing reads the pixels.
        return PIL.ImageOps.exif_transpose(file), file.format in ("JPEG", "MPO")


def read_remote(value: Any) -> Any:
    """An image that only names a file elsewhere or in an archive, with its bytes; others as is."""
    if isinstance(value, dict) and value.get("bytes", b"") is None and "://" in str(value.get("path")):
        with fsspec.open(value["path"], "rb") as file:
            return {"bytes": file.read(), "path": value["path"]}
    return value


def crop(pixels: np.ndarray, size: tuple[int, int], at: np.ndarray | None = None) -> np.ndarray:
    """The H x W part of `pixels` (C, h, w).

    `at`, two numbers in [0, 1), places it, as fractions of the room (down, right) that it has; None
    is the centre.
    """
    room = np.array(pixels.shape[1:]) - np.array(size)
    top, left = room // 2 if at is None else (at * (room + 1)).astype(np.int64)
    return pixels[:, top : top + size[0], left : left + size[1]]


def bad_image(name: str, error: Exception) -> ValueError:
    """The error for an image that cannot be decoded."""
    return ValueError(f"bad image, {name}: {error} (--on_bad_image skip leaves bad images out)")


def check_size(name: str, pixels: np.ndarray, size: tuple[int, int]) -> None:
    """Require the (H, W) of the first image. An image of another size is not a bad one."""
    _, height, width = pixels.shape
    if (height, width) != size:
        raise ValueError(
            f"{name} is {height}x{width} (height x width), the first one {size[0]}x{size[1]}; "
            "set a resolution (--resolution) to bring all images to one size"
        )


def _to_8_bits(image: PIL.Image.Image) -> tuple[PIL.Image.Image, bool]:
    """The image in 8 bits, and whether it had 16: PIL's own conversion clips these at 255."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point (mode F); they must have 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image, False
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are {values.min()}..{values.max()}; grey must have at most 16 bits")
    return PIL.Image.fromarray(np.rint(values / 257).astype(np.uint8)), True


def _convert(image: PIL.Image.Image, mode: str | None) -> PIL.Image.Image:
    """The image in `mode`, or for None in the one of MODES that keeps what it holds."""
    if mode is None and image.mode not in MODES:
        mode = "RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB"
    return image if mode in (None, image.mode) else image.convert(mode)


def _resize(image: PIL.Image.Image, transform: Transform) -> tuple[PIL.Image.Image, bool]:
    """The image resized to cover the target and cropped if asked to, and whether it was resized."""
    if transform.target is None:
        return image, False
    height, width = transform.target
    factor = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    resized = covering != image.size
    if resized:
        image = image.resize(covering, PIL.Image.Resampling.BILINEAR)  # antialiased: PIL widens its filter
    if transform.center_crop:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image, resized
