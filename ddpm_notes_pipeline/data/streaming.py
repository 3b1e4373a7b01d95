"""An image set larger than the disk, read while training, and still a pure function of (seed, n).

1. The shards of the set are dealt evenly to V streams; V follows from the set and the batch size,
   never from the number of processes. Part v of the global batch, B/V images, comes from stream v,
   so a process reads only the streams of its share of the batch.
2. A stream is a sequence of epochs. In each, its shards come in a new order and their rows go
   through a shuffle buffer, both drawn from (seed, stream, epoch). A shorter stream begins its next
   epoch sooner.
3. Resuming at step n reads again, without decoding, the first epoch, which has the length of the
   others, and the epoch that holds step n. So it is exact for any number of processes.
"""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

import numpy as np
import torch

from .batches import StepBatches, step_seed
from .decoding import bad_image, check_size, crop, decode
from .image_set import ImageSet
from .images import load_images
from .sources import digest
from .tables import Table, image_name, open_table

MAX_STREAMS = 16  # read at once by a single process
MAX_WARNINGS = 5  # about bad images of a stream


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Images that are read while training. Made by `open_stream`, for `StreamedBatches`.

    Attributes:
        first: the first images, decoded.
        name, split, license, num_files, channels, size, class_names, num_classes, source: those
            of `first`.
        table: the split as `datasets` streams it.
        max_samples: only the first `max_samples` rows are read; None for all.
        buffer_size: rows in all shuffle buffers together, as they are stored.
        fingerprint: hex digest of where the images come from and how they are decoded.
        skipped: bad images left out; those of `first`, until training has counted more.
        num_images: None, as it is unknown.
    """

    first: ImageSet
    table: Table
    max_samples: int | None
    buffer_size: int
    fingerprint: str
    skipped: int
    num_images: None = None

    name = property(attrgetter("first.name"))
    split = property(attrgetter("first.split"))
    license = property(attrgetter("first.license"))
    num_files = property(attrgetter("first.num_files"))
    channels = property(attrgetter("first.channels"))
    size = property(attrgetter("first.size"))
    class_names = property(attrgetter("first.class_names"))
    num_classes = property(attrgetter("first.num_classes"))
    source = property(attrgetter("first.source"))

    @property
    def num_shards(self) -> int:
        """Files, or parts of them, that can be read apart; 1 with `max_samples`."""
        return self.table.rows.num_shards if self.max_samples is None else 1

    def shard(self, index: int) -> Any:
        """An iterable of the rows of a shard, images as they are stored."""
        rows = self.table.encoded
        if self.max_samples is not None:
            return itertools.islice(self.table.kept(rows), self.max_samples)
        return self.table.kept(rows.shard(self.num_shards, index))

    def num_streams(self, batch_size: int) -> int:
        """V: the largest number up to MAX_STREAMS that divides the batch and the shards."""
        common = math.gcd(batch_size, self.num_shards)
        return max(v for v in range(1, MAX_STREAMS + 1) if common % v == 0)


def open_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    max_samples: int | None = None,
    buffer_size: int = 1000,
    first_images: int = 64,
    **arguments: Any,
) -> ImageStream:
    """Open a split that is read while training.

    Args:
        dataset_name, dataset_config_name, arguments: as for `load_images`. Embedded sets cannot be
            streamed, and a label_column must be a ClassLabel, whose classes are known before all
            rows are read.
        max_samples: read only the first rows.
        buffer_size: rows in the shuffle buffers, which stay encoded until they are used.
        first_images: images that are decoded now, into `cache_dir`: they show channels and size,
            and mistakes in the arguments.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `load_images`.
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size is {buffer_size}; it must be at least 1")
    number = min(first_images, max_samples or first_images)
    first = load_images(dataset_name, dataset_config_name, max_samples=number, streaming=True, **arguments)
    table = open_table(first.source, streaming=True)
    label = table.label_column
    if label is not None and table.class_names is None:
        raise ValueError(f"label_column {label!r} is {table.rows.features[label]}; a stream needs a ClassLabel")
    images = [dataset_config_name, first.name, first.fingerprint, first.split, table.image_column, label]
    # Up to the first bad image, leaving such out changes nothing: a run may go on so.
    decoding = replace(first.source, on_bad_image="error").decoding
    settings = [first.class_names, max_samples, buffer_size, table.rows.num_shards, *decoding]
    return ImageStream(first, table, max_samples, buffer_size, digest([*images, *settings]), first.skipped)


class StreamedBatches(StepBatches):
    """`StepBatches` of an `ImageStream`.

    Items also have "bad_images": how many were left out so far, of this process's streams. Ask for
    steps in increasing order: an earlier one reads everything before it again. A DataLoader may
    have at most one worker: `datasets` would give each of several a part of the rows.
    """

    images: Any

    def __init__(self, images: ImageStream, batch_size: int, seed: int, *args: Any, **settings: Any) -> None:
        super().__init__(cast(Any, images), batch_size, seed, *args, **settings)
        self.num_streams = images.num_streams(batch_size)
        self.part = batch_size // self.num_streams  # images of a step from one stream
        self._readers: dict[int, StreamReader] = {}

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(step)
        # Each stream is counted by the process that has the first of its images.
        counted = [reader.bad for v, reader in self._readers.items() if v * self.part >= self.share.start]
        item["bad_images"] = torch.tensor(sum(counted))
        return item

    def read(self, step: int, crop_at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This process's images and labels of a step."""
        info = torch.utils.data.get_worker_info()
        if info is not None and info.num_workers > 1:
            raise ValueError(f"{info.num_workers} workers read a stream; --dataloader_num_workers must be 0 or 1")
        images, part = [], self.part
        for v in range(self.share.start // part, (self.share.stop - 1) // part + 1):
            reader = self._readers.get(v)
            if reader is None or reader.position > step * part:
                reader = self._readers[v] = StreamReader(self.images, v, self.num_streams, self.seed)
            begin, end = max(self.share.start - v * part, 0), min(self.share.stop - v * part, part)
            reader.go_to(step * part + begin)
            images += [reader.read() for _ in range(begin, end)]
            reader.go_to(step * part + part)  # bad images are counted to the end of the part
        pixels = [crop(image, self.images.size, at) for (image, _), at in zip(images, crop_at, strict=True)]
        labels = None if self.images.class_names is None else torch.tensor([label for _, label in images])
        return torch.from_numpy(np.stack(pixels)), labels


class StreamReader:
    """The images of stream v of `num_streams`, epoch after epoch.

    Attributes:
        position: images read so far.
        epoch, start: the current epoch, and the position at which it began.
        length: images in every epoch, once the first has been read; else 0.
        bad: bad images in the first epoch.
    """

    def __init__(self, images: ImageStream, v: int, num_streams: int, seed: int) -> None:
        self.images, self.v = images, v
        self.shards = range(v, images.num_shards, num_streams)
        self.seed = step_seed(seed, v, "stream")
        self.buffer_size = max(1, images.buffer_size // num_streams)
        self.length = self.bad = 0
        self._begin(epoch=0, position=0)

    def go_to(self, position: int) -> None:
        """Pass over the images before `position`; once the length is known, whole epochs unread."""
        skips = self.images.source.on_bad_image == "skip"
        while self.position < position:
            epochs = (position - self.start) // self.length if self.length else 0
            if epochs:
                self._begin(self.epoch + epochs, self.start + epochs * self.length)
            else:
                # Bad images do not count, and only decoding finds them. All epochs have the same.
                self.read(decoded=skips and (not self.length or self.bad > 0))

    def read(self, decoded: bool = True) -> Any:
        """The pixels, uint8 (C, h, w), and label of the next image; not `decoded`, its row."""
        while True:
            for row in self.rows:
                image = self._decode(row) if decoded else row
                if image is not None:
                    self.position += 1
                    return image
            if self.position == self.start:
                no_class = self.images.source.classes and not self.bad
                why = "as its shards hold none of --classes: leave out --streaming" if no_class else f"of {self.bad}"
                raise ValueError(f"{self.images.name}: no image of stream {self.v} could be read, {why}")
            if self.epoch == 0:
                self.length = self.position
            self._begin(self.epoch + 1, self.position)

    def shuffled_rows(self, epoch: int) -> Iterator[dict[str, Any]]:
        """The rows of an epoch, shuffled.

        Not by `datasets`: its order may change with its version, and its threads can deadlock.
        """
        random = np.random.default_rng([self.seed, epoch])
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

    def _begin(self, epoch: int, position: int) -> None:
        self.epoch, self.start, self.position = epoch, position, position
        self.rows = self.shuffled_rows(epoch)

    def _decode(self, row: dict[str, Any]) -> tuple[np.ndarray, int] | None:
        """Pixels and label of a row; None for a bad image that is left out."""
        images, source, raw = self.images, self.images.source, row[self.images.table.image_column]
        place = f"image {self.position - self.start} of epoch {self.epoch} of stream {self.v}"
        name = image_name(f"{images.name}, {place}", raw)
        label = row.get(source.label_column, 0)
        try:
            if source.label_column and (label is None or not 0 <= label < images.num_classes):
                raise ValueError(f"its label is {label}; it must be in 0..{images.num_classes - 1}")
            pixels, *_ = decode(raw, source, images.first.file.mode)
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more
            if source.on_bad_image == "error":
                raise bad_image(name, error) from error
            if self.epoch == 0:
                self.bad += 1
                if self.bad <= MAX_WARNINGS:
                    warnings.warn(f"image left out, {name}: {error}", stacklevel=2)
            return None
        if source.target is None:
            check_size(name, pixels, images.size)
        return pixels, label
