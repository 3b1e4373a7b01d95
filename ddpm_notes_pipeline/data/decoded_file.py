"""The file of all decoded images of a set: written once, whole or not there, memory-mapped to read.

Its contents: the pixels (C, H, W) of image after image; an index, the bytes of an .npz file; the
index's length in 8 bytes, little-endian.
"""

import hashlib
import io
import json
import os
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .decoding import bad_image, check_size, crop, decode
from .sources import MODES, ImageSource
from .whole_file import replacing

FORMAT = 2  # of the file and of how images are decoded: raising it has every set decoded again


@dataclass(frozen=True, eq=False)
class DecodedFile:
    """N decoded images in one file. Cheap to pickle: the pixels stay in the file.

    Attributes:
        path: the file.
        num_images: N.
        sizes: (N, 2) int32, height and width of each image; (1, 2) if they are all the same.
        left_out: int64, the rows whose images are bad and so not in the file.
        mode: of all images.
        fingerprint: hex digest of pixels and sizes.
        skipped, bad: how many images were left out, and why, the most frequent reasons first.
        sixteen_bit, lossy, resized, hidden_colours: how many images had 16 bits, came from JPEG,
            were resized, had colours where their alpha is 0.
    """

    path: Path
    num_images: int
    sizes: np.ndarray
    left_out: np.ndarray
    mode: str
    fingerprint: str
    skipped: int
    bad: list[str]
    sixteen_bit: int
    lossy: int
    resized: int
    hidden_colours: int

    @property
    def channels(self) -> int:
        return MODES[self.mode]

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N+1,) int64: where each image begins in `pixels`, and the end."""
        lengths = np.broadcast_to(self.sizes.astype(np.int64).prod(axis=1) * self.channels, (self.num_images,))
        return np.concatenate([[0], np.cumsum(lengths)])

    @cached_property
    def pixels(self) -> np.ndarray:
        """The pixels of all images as one flat uint8 array, mapped from the file."""
        return np.memmap(self.path, np.uint8, mode="r", shape=(int(self.offsets[-1]),)).view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array pickles as its bytes: every DataLoader worker would be sent the whole set.
        return {key: value for key, value in self.__dict__.items() if key not in ("pixels", "offsets")}

    def take(self, index: np.ndarray, size: tuple[int, int], crop_at: np.ndarray | None) -> np.ndarray:
        """The images at `index` (n integers in [0, N)), cropped to H x W: uint8 (n, C, H, W).

        `crop_at`, (n, 2) in [0, 1), places the crops as in `decoding.crop`; None is the centre.
        """
        if len(self.sizes) == 1 and tuple(self.sizes[0]) == size:
            return self.pixels.reshape(-1, self.channels, *size).take(index, axis=0)
        out = np.empty((len(index), self.channels, *size), np.uint8)
        sizes = np.broadcast_to(self.sizes, (self.num_images, 2))
        for n, i in enumerate(index):
            image = self.pixels[self.offsets[i] : self.offsets[i + 1]].reshape(self.channels, *sizes[i])
            out[n] = crop(image, size, None if crop_at is None else crop_at[n])
        return out


def read_decoded(path: Path) -> DecodedFile | None:
    """The decoded file at `path`; None if there is none, or it is cut short."""
    try:
        with open(path, "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            file.seek(begin := end - int.from_bytes(file.read(8), "little"))
            with np.load(io.BytesIO(file.read(end - begin))) as index:
                meta, sizes, kept = json.loads(str(index["meta"])), index["stored"], index["kept"]
    except (OSError, ValueError, KeyError, EOFError, OverflowError, zipfile.BadZipFile):  # none, or cut short
        return None
    left_out = np.setdiff1d(np.arange(len(kept) + meta["skipped"]), kept)
    return DecodedFile(path, len(kept), sizes, left_out, **meta)


def write_decoded(path: Path, images: Iterable[tuple[str, Any]], source: ImageSource) -> DecodedFile:
    """Decode (name, encoded image) pairs into a file.

    Raises:
        ValueError: a bad image with `on_bad_image="error"`, no good image, or two sizes of images
            without a target.
        OSError: the file was not written whole.
    """
    with replacing(path) as partial, partial.open("xb") as out:
        _write(out, images, source)
    decoded = read_decoded(path)
    if decoded is None:
        raise OSError(f"{path} was written but does not read back: a full disk or a faulty file system?")
    return decoded


def _write(out: BinaryIO, images: Iterable[tuple[str, Any]], source: ImageSource) -> None:
    mode, digest = source.image_mode, hashlib.blake2b(digest_size=16)
    counts = Counter(sixteen_bit=0, lossy=0, resized=0, hidden_colours=0)
    bad: dict[str, list[str]] = {}  # reason -> names of images
    kept, stored = array("q"), array("i")
    for row, (name, raw) in enumerate(images):
        try:
            pixels, mode, done = decode(raw, source, mode)
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more
            if source.on_bad_image == "error":
                raise bad_image(name, error) from error
            bad.setdefault(str(error), []).append(name)
            continue
        if source.target is None and kept:
            check_size(name, pixels, (stored[0], stored[1]))
        out.write(data := pixels.tobytes())
        digest.update(data)
        kept.append(row)
        stored.extend(pixels.shape[1:])
        counts.update(done)
    skipped = sum(map(len, bad.values()))
    reasons = []
    for reason, names in sorted(bad.items(), key=lambda item: -len(item[1]))[:5]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reasons.append(f"{len(names)}: {reason}: {', '.join(names[:3])}{more}")
    if not kept:
        raise ValueError(f"no image could be read, of {skipped}; {'; '.join(reasons)}")
    sizes = np.array(stored, np.int32).reshape(-1, 2)
    sizes = sizes[:1] if (sizes == sizes[0]).all() else sizes
    digest.update(json.dumps([mode, len(kept), source.target]).encode() + sizes.tobytes())
    meta = {"mode": mode, "fingerprint": digest.hexdigest(), "skipped": skipped, "bad": reasons} | counts
    index = io.BytesIO()
    np.savez_compressed(index, meta=np.array(json.dumps(meta)), stored=sizes, kept=np.array(kept, np.int64))
    out.write(index.getvalue() + len(index.getvalue()).to_bytes(8, "little"))
