"""One encoded image -> pixels: 8 bits, upright, in one of three modes, resized and cropped."""

import io
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps

from .sources import MODES, ImageSource


def decode(raw: Any, source: ImageSource, mode: str | None) -> tuple[np.ndarray, str, dict[str, bool]]:
    """Decode one image.

    Args:
        raw: an array (H, W), or what `datasets.Image(decode=False)` gives, {"bytes", "path"}.
        source: what is done to it.
        mode: the mode of the first image, which all must have; None for the first.

    Returns:
        The pixels, uint8 (C, H, W); their mode; and whether the image had 16 bits ("sixteen_bit"),
        came from JPEG ("lossy"), was resized ("resized") and had colours where its alpha is 0
        ("hidden_colours").

    Raises:
        Exception: whatever PIL raises for a broken file; ValueError for an image of another mode.
    """
    image, lossy = open_image(raw)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point (mode F); they must have 8 or 16 bits")
    sixteen_bit = image.mode.startswith("I")
    if sixteen_bit:  # PIL's own conversion clips these at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values are {values.min()}..{values.max()}; grey must have at most 16 bits")
        image = PIL.Image.fromarray(np.rint(values / 257).astype(np.uint8))
    wanted = source.image_mode or image.mode
    if wanted not in MODES:  # the one that keeps what the image holds
        wanted = "RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB"
    if mode not in (None, wanted):
        found = wanted + (" (from 16 bits)" if sixteen_bit else "")
        raise ValueError(
            f"its mode is {found}, that of the first image is {mode}; set image_mode (--image_mode) to convert all to one"
        )
    size = image.size
    if source.target is not None:
        height, width = source.target
        factor = max(height / image.height, width / image.width)
        size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    done = {"sixteen_bit": sixteen_bit, "lossy": lossy, "resized": size != image.size}
    image, done["hidden_colours"] = without_hidden_colours(image.convert(wanted))
    # Antialiased: PIL widens its filter. Of RGBA it averages colours by their alpha.
    pixels = np.asarray(image.resize(size, PIL.Image.Resampling.BILINEAR))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if source.target is not None and source.center_crop:
        pixels = crop(pixels, source.target)
    return pixels, wanted, done


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
        raise ValueError("cannot identify its image format") from error
    with file:
        # `open` reads only the header; transposing reads the pixels.
        return PIL.ImageOps.exif_transpose(file), file.format in ("JPEG", "MPO")


def without_hidden_colours(image: PIL.Image.Image) -> tuple[PIL.Image.Image, bool]:
    """The image with colour 0 where its alpha is 0, and whether that changed it.

    Nobody sees these colours, and a likelihood would pay bits for them. Images of other modes than
    RGBA stay as they are.
    """
    if image.mode != "RGBA":
        return image, False
    pixels = np.array(image)
    transparent = pixels[..., 3] == 0
    if not pixels[transparent].any():
        return image, False
    pixels[transparent] = 0
    return PIL.Image.fromarray(pixels), True


def read_remote(value: Any) -> Any:
    """The image, with its bytes if it only names a file elsewhere or in an archive."""
    if isinstance(value, dict) and value.get("bytes", b"") is None and "://" in str(value.get("path")):
        with fsspec.open(value["path"], "rb") as file:
            return {"bytes": file.read(), "path": value["path"]}
    return value


def crop(pixels: np.ndarray, size: tuple[int, int], at: np.ndarray | None = None) -> np.ndarray:
    """The H x W part of `pixels` (C, h, w).

    `at`, two numbers in [0, 1), places it: fractions of the free space (down, right). None is the
    centre.
    """
    room = np.array(pixels.shape[1:]) - np.array(size)
    top, left = room // 2 if at is None else (at * (room + 1)).astype(np.int64)
    return pixels[:, top : top + size[0], left : left + size[1]]


def bad_image(name: str, error: Exception) -> ValueError:
    """The error for an image that cannot be decoded."""
    return ValueError(f"bad image, {name}: {error} (--on_bad_image skip leaves bad images out)")


def check_size(name: str, pixels: np.ndarray, size: tuple[int, int]) -> None:
    """Require the (H, W) of the first image. An image of another size is not a bad one."""
    height, width = pixels.shape[1:]
    if (height, width) != size:
        raise ValueError(
            f"{name} is {height}x{width} (height x width), the first one {size[0]}x{size[1]}; set a resolution (--resolution) to bring all images to one size"
        )
