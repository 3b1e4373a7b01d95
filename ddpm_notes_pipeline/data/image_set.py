"""Images in memory-mapped files, with labels; parts of such a set."""

import hashlib
import zlib
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from .decoded_file import DecodedFile
from .sources import ImageSource, evenly_spaced

HELD_OUT = "held_out"  # the name of the split that `hold_out` makes


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N decoded images. Made by `load_images`; cheap to pickle: the pixels stay in the file.

    Attributes:
        name: of the data set; of a folder, only its last part.
        split: what was loaded, or `HELD_OUT`.
        source: what was asked for.
        file: the decoded file, which holds the images of this set and perhaps more.
        size: (H, W) in pixels of every image in a batch. Larger stored images are cropped.
        fingerprint: hex digest of the pixels and sizes, not of labels, file names or dates: the
            same images have the same fingerprint on every machine.
        labels: (N,) int64 in [0, num_classes); None without a label column.
        class_names: the names of the classes, where the data set states them; of `source.classes`
            alone, if some were chosen.
        license: of the images, where the data set states one.
        num_files: image files in the split, of all classes; None where the images are not from a
            folder of images.
        index: (N,) int64, which images of `file` are in this set; None for all of them.
        channels: C, 1 (grey), 3 (RGB) or 4 (RGBA).
        skipped, lossy, resized, hidden_colours: how many images of `file` were left out as bad,
            came from JPEG files, were resized, had colours where their alpha is 0. Distances
            between sets depend on the second and the third.
    """

    name: str
    split: str
    source: ImageSource
    file: DecodedFile
    size: tuple[int, int]
    fingerprint: str
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    license: str | None = None
    num_files: int | None = None
    index: np.ndarray | None = None

    channels = property(attrgetter("file.channels"))
    skipped = property(attrgetter("file.skipped"))
    lossy = property(attrgetter("file.lossy"))
    resized = property(attrgetter("file.resized"))
    hidden_colours = property(attrgetter("file.hidden_colours"))

    def __len__(self) -> int:
        return self.file.num_images if self.index is None else len(self.index)

    num_images = property(__len__)

    @property
    def dims(self) -> int:
        """C*H*W, which bits are divided by in bits/dim."""
        return self.channels * self.size[0] * self.size[1]

    @property
    def num_classes(self) -> int | None:
        """The number of `class_names`, or else the largest label + 1; None without labels."""
        if self.labels is None:
            return None
        return len(self.class_names) if self.class_names is not None else int(self.labels.max()) + 1

    def take(self, indices: Any, crop_at: np.ndarray | None = None) -> torch.Tensor:
        """The images at `indices` as uint8 (n, C, H, W).

        Args:
            indices: n integers in [0, N): a sequence, array or tensor.
            crop_at: (n, 2) in [0, 1), where larger images are cropped: fractions of the free space
                (down, right). None is the centre.

        Raises:
            IndexError: an index outside [0, N).
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"indices {index.min()}..{index.max()} must be in 0..{len(self) - 1}, one for each image")
        if self.index is not None:
            index = self.index[index]
        return torch.from_numpy(self.file.take(index, self.size, crop_at))

    def at_most(self, count: int | None) -> "ImageSet":
        """`count` images, evenly spaced over the set; all if it has no more, or for None."""
        return self if count is None or count >= len(self) else self.part(evenly_spaced(len(self), count), self.split)

    def part(self, indices: np.ndarray, split: str) -> "ImageSet":
        """The images at `indices` (strictly increasing) as a set of their own, called `split`."""
        index = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            split=split,
            labels=None if self.labels is None else self.labels[index],
            fingerprint=hashlib.blake2b(self.fingerprint.encode() + index.tobytes(), digest_size=16).hexdigest(),
            index=index if self.index is None else self.index[index],
        )


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a set at random, by the seed: images to train on, and round(share * N) held-out ones.

    Raises:
        ValueError: `share` is not above 0 and below 1, or leaves a part empty.
    """
    count = round(share * len(images)) if 0 < share < 1 else 0
    if not 0 < count < len(images):
        raise ValueError(f"validation_share is {share} of {len(images)} images; it must leave images in both parts")
    seeds = np.random.SeedSequence([seed, zlib.crc32(HELD_OUT.encode())])
    order = np.random.default_rng(seeds).permutation(len(images))
    return images.part(np.sort(order[count:]), images.split), images.part(np.sort(order[:count]), HELD_OUT)
