"""An image set larger than the disk: read row by row while training, and still a pure function of (seed, n).

1. The shards of the set are dealt to V streams, as many to each. V follows from the set and the batch size, never from the
   number of processes. Part v of the global batch, B/V images in a row, is what stream v gives next, so a process reads only the
   streams that its share of the batch comes from.
2. A stream is epochs in a row. In each, its shards come in a new order, and their rows go through a buffer that is left at random, both
   drawn from (seed, stream, epoch). A shorter stream comes round sooner.
3. Going on from step n reads again, without decoding, what was read before it: the first epoch, which tells the length of the others, and the
   epoch that step n is in. So n is reached exactly, whatever the number of processes was.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from .batches import StepBatches, step_seed
from .images import (
    MODES,
    ImageSet,
    _columns_of,
    _decode_as,
    _digest,
    _load_table,
    _optional,
    _pixels_of,
    _Transform,
    _transform,
    load_images,
)

MOST_STREAMS = 16  # read at once by a single process


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Images that are read while training. Made by `open_stream`; for `StreamedBatches`.

    Attributes:
        first: the first images, decoded; name, license, channels, size and mode are theirs.
        split: what is read.
        rows: the `datasets.IterableDataset`, images as they are stored.
        image_column, label_column: of `rows`.
        class_names: the classes' names; None without a label column.
        max_samples: only so many rows, the first, are read. None: all.
        buffer_size: rows that the shuffle buffers hold together, as they are stored.
        fingerprint: hex digest of where the images come from and what is made of them, not of the images themselves.
    """

    first: ImageSet
    split: str
    rows: Any
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    max_samples: int | None
    buffer_size: int
    fingerprint: str
    transform: _Transform
    skipped: int = 0  # bad images left out; as `first` knows them, the batches count on
    num_images: None = None  # nobody knows
    num_files: int | None = None  # image files in the folder's split; None where it is no folder of image files

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def license(self) -> str | None:
        return self.first.license

    @property
    def channels(self) -> int:
        return self.first.channels

    @property
    def size(self) -> tuple[int, int]:
        return self.first.size

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    @property
    def needs_crop(self) -> bool:
        return self.transform.target is not None and not self.transform.center_crop

    @property
    def num_shards(self) -> int:
        """Files, or parts of them, that are read apart; 1 where only the first rows are read."""
        return self.rows.num_shards if self.max_samples is None else 1

    def shard(self, index: int) -> Any:
        """An iterable of the rows of a shard."""
        if self.max_samples is not None:
            return self.rows.take(self.max_samples)
        return self.rows.shard(self.num_shards, index) if self.num_shards > 1 else self.rows

    def num_streams(self, batch_size: int) -> int:
        """V: the largest number, 16 at most, that divides both the batch and the shards."""
        common = math.gcd(batch_size, self.num_shards)
        return max(v for v in range(1, MOST_STREAMS + 1) if common % v == 0)


def open_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | Sequence[int] | None = None,
    center_crop: bool = False,
    image_mode: str | None = None,
    max_samples: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    on_bad_image: str = "error",
    show_progress: bool = True,
    buffer_size: int = 1000,
    first_images: int = 64,
) -> ImageStream:
    """A split to be read while training; the arguments are those of `load_images`, but for these.

    Args:
        dataset_name, train_data_dir: a data set on the Hub, a folder that `datasets` reads (parquet, webdataset, images...) or wrote; not
            the embedded ones.
        label_column: a ClassLabel column: its number of classes has to be known before all rows are.
        max_samples: the first so many rows.
        buffer_size: rows in the shuffle buffers, which stay as they are stored until they are used.
        first_images: decoded at once, into `cache_dir`: they tell channels and size, and what is wrong with the arguments.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `load_images`.
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size is {buffer_size}; allowed: at least 1")
    datasets = _optional("datasets", "train")
    rows, folder = _load_table(dataset_name, dataset_config_name, train_data_dir, split, streaming=True)
    if rows.features is None:
        raise ValueError(
            f"the columns of split {split!r} are not known before it is read; allowed: a set that states them"
        )
    image_column = _columns_of(rows.features, image_column, label_column, folder)
    class_names = None
    if label_column is not None:
        class_names = getattr(rows.features[label_column], "names", None)
        if class_names is None:
            raise ValueError(
                f"label_column {label_column!r} is {rows.features[label_column]}; allowed for streaming: a ClassLabel, "
                "whose classes are known before all rows are read"
            )
    first = load_images(
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        train_data_dir=train_data_dir,
        split=split,
        image_column=image_column,
        label_column=label_column,
        resolution=resolution,
        center_crop=center_crop,
        image_mode=image_mode,
        max_samples=min(first_images, max_samples or first_images),
        cache_dir=cache_dir,
        on_bad_image=on_bad_image,
        show_progress=show_progress,
        streaming=True,
    )
    rows = rows.select_columns([image_column, *([label_column] if label_column else [])])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    transform = _transform(resolution, center_crop, image_mode, on_bad_image)
    source = [dataset_config_name, first.name, first.fingerprint, split, image_column, label_column, class_names]
    fingerprint = _digest([*source, max_samples, buffer_size, rows.num_shards, *transform])
    return ImageStream(
        first=first,
        split=split,
        rows=rows,
        image_column=image_column,
        label_column=label_column,
        class_names=class_names,
        max_samples=max_samples,
        buffer_size=buffer_size,
        fingerprint=fingerprint,
        transform=transform,
        skipped=first.skipped,
        num_files=None if folder is None else folder.files_of(split),
    )


class StreamedBatches(StepBatches):
    """`StepBatches` of an `ImageStream`: items of the same form, and "bad_images", how many were left out so far (of this process's streams).

    Steps are cheap in their order only: asking for one before the last reads everything before it again. Not for several workers of a
    DataLoader: `datasets` would give each a part of the rows.
    """

    images: Any

    def __init__(self, images: ImageStream, batch_size: int, seed: int, *args: Any, **settings: Any) -> None:
        super().__init__(cast(Any, images), batch_size, seed, *args, **settings)
        parts = images.num_streams(batch_size)
        self.part = batch_size // parts  # images of a step that are of one stream
        self.numbers = range(self.share.start // self.part, (self.share.stop - 1) // self.part + 1)
        self._readers: dict[int, _Reader] = {}

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(step)
        # each stream is counted by the process that has the first of its images
        own = [reader for v, reader in self._readers.items() if v * self.part >= self.share.start]
        item["bad_images"] = torch.tensor(sum(reader.bad for reader in own))
        return item

    def _take(self, step: int, crop_at: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        info = torch.utils.data.get_worker_info()
        if info is not None and info.num_workers > 1:
            raise ValueError(
                f"a stream is read by {info.num_workers} workers (--dataloader_num_workers); allowed: 0 or 1"
            )
        images: list[np.ndarray] = []
        labels: list[int] = []
        for v in self.numbers:
            reader = self._readers.get(v)
            if reader is None or reader.position > step * self.part:
                reader = self._readers[v] = _Reader(self.images, v, self.batch_size // self.part, self.seed)
            reader.skip(step * self.part - reader.position)
            for position in range(v * self.part, (v + 1) * self.part):
                found = reader.next(self.share.start <= position < self.share.stop)
                if found is not None:
                    at = None if crop_at is None else crop_at[len(images)]
                    images.append(_crop(found[0], self.images.size, at))
                    labels.append(found[1])
        pixels = torch.from_numpy(np.stack(images))
        return pixels, None if self.images.label_column is None else torch.tensor(labels)


class _Reader:
    """The images of stream v of V, epoch after epoch."""

    def __init__(self, images: ImageStream, v: int, parts: int, seed: int) -> None:
        self.images, self.name = images, f"stream {v}"
        self.skips = images.transform.on_bad_image == "skip"
        self.shards = range(v, images.num_shards, parts)
        self.seed, self.buffer_size = step_seed(seed, v, "stream"), max(1, images.buffer_size // parts)
        self.rows: Iterator[Any] = iter(())
        self.epoch, self.within = -1, 0  # good images of this epoch so far
        self.position = 0  # ... and of all of them
        self.length: int | None = None  # good images of any epoch, once the first has been read
        self.bad = 0  # in the first epoch

    def skip(self, count: int) -> None:
        """Pass over so many images, whole epochs without reading them once the first has told their length."""
        while count and self.length is None:
            self.next(False)
            count -= 1
        if count and self.length is not None:
            epoch, within = divmod(self.epoch * self.length + self.within + count, self.length)
            if epoch > self.epoch:
                self.position += count - within
                self.epoch, self.within, self.rows, count = epoch - 1, self.length, iter(()), within
            for _ in range(count):
                self.next(False)

    def next(self, decode: bool) -> tuple[np.ndarray, int] | None:
        """The pixels (C, H, W) and label of the next image; None if it was not to be decoded."""
        # whether an image counts is known when it is decoded; after an epoch without bad ones, all do
        decode_all = self.skips and (self.length is None or self.bad > 0)
        while True:
            row = next(self.rows, None)
            if row is None:
                self._next_epoch()
                continue
            found = None
            if decode or decode_all:
                try:
                    found = self._decoded(row)
                except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more for a broken file
                    self._refuse(row, error)
                    continue
            self.within += 1
            self.position += 1
            return found if decode else None

    def _next_epoch(self) -> None:
        if self.epoch >= 0 and self.within == 0:
            raise ValueError(f"{self.images.name}: no image of {self.name} could be read, of {self.bad}")
        if self.epoch == 0:
            self.length = self.within
        self.epoch, self.within = self.epoch + 1, 0
        self.rows = self._shuffled(np.random.default_rng([self.seed, self.epoch]))

    def _shuffled(self, random: np.random.Generator) -> Iterator[dict[str, Any]]:
        """The rows of an epoch. Not by `datasets`: its order is one of its version, and its threads may wait for each other."""
        buffer: list[dict[str, Any]] = []
        for shard in random.permutation(self.shards):
            for row in self.images.shard(int(shard)):
                if len(buffer) < self.buffer_size:
                    buffer.append(row)
                else:
                    i = int(random.integers(len(buffer)))
                    buffer[i], row = row, buffer[i]
                    yield row
        random.shuffle(buffer)  # type: ignore[arg-type]
        yield from buffer

    def _decoded(self, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        images, label = self.images, 0
        if images.label_column is not None:
            label, classes = row[images.label_column], images.num_classes
            if label is None or not 0 <= label < (classes or 0):
                raise ValueError(f"its label is {label}; allowed: 0 to {(classes or 0) - 1}")
        mode = next(name for name, channels in MODES.items() if channels == images.channels)
        image = _decode_as(row[images.image_column], images.transform, mode).image
        if images.transform.target is None and (image.height, image.width) != images.size:
            raise WrongSize(
                f"it is {image.height}x{image.width} (height x width), the first one {images.size[0]}x{images.size[1]}; "
                "give a resolution (--resolution) to bring them to one size"
            )
        return _pixels_of(image), label

    def _refuse(self, row: dict[str, Any], error: Exception) -> None:
        path = (row[self.images.image_column] or {}).get("path")
        name = f"{self.images.name}, image {self.within} of epoch {self.epoch} of {self.name}" + (
            f" ({path})" if path else ""
        )
        if isinstance(error, WrongSize) or not self.skips:
            raise ValueError(f"bad image, {name}: {error} (--on_bad_image skip leaves such out)") from error
        if self.epoch == 0:
            self.bad += 1
            if self.bad <= 5:
                warnings.warn(f"image left out, {name}: {error}", stacklevel=2)


class WrongSize(ValueError):
    """An image of another size: no fault of the image's, and so no reason to leave it out."""


def _crop(image: np.ndarray, size: tuple[int, int], at: np.ndarray | None) -> np.ndarray:
    """The part of (C, h, w) that a batch holds, placed as `ImageSet.take` does."""
    room = np.array(image.shape[1:]) - np.array(size)
    top, left = room // 2 if at is None else (at * (room + 1)).astype(np.int64)
    return image[:, top : top + size[0], left : left + size[1]]
