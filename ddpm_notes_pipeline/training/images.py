"""The images of a run: those to train on, those held out, and a few to show beside samples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..data import ImageSet, hold_out, load_images
from ..data.sources import ImageSource, evenly_spaced
from ..data.streaming import ImageStream, open_stream
from .arguments import DataArguments


@dataclass
class TrainingImages:
    """The images of a run.

    Attributes:
        train: stored, or a stream.
        validation: images held out, to measure bits/dim on; None without.
        skipped: unreadable training images that were left out, as far as they have been read.
    """

    train: ImageSet | ImageStream
    validation: ImageSet | None
    skipped: int

    @property
    def stored(self) -> ImageSet:
        """The images of `train` that are stored: all, or the first of a stream."""
        return self.train.first if isinstance(self.train, ImageStream) else self.train

    def evenly_spaced(self, count: int) -> np.ndarray:
        """At most `count` training images, uint8 (N, C, H, W), spread over the set."""
        shown = self.stored.at_most(count)
        return shown.take(range(len(shown))).numpy()

    def of_classes(self, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """As many training images of each class as `labels` has, or all if there are fewer.

        Returns:
            Images, uint8 (N, C, H, W), evenly spaced over each class, and their labels, (N,).
        """
        known = self.stored.labels
        assert known is not None  # of a model with classes
        index = []
        for label, count in Counter(labels).items():
            members = np.flatnonzero(known == label)
            index.append(members[evenly_spaced(len(members), count)])
        shown = np.concatenate(index)
        return self.stored.take(shown).numpy(), known[shown]


def load_training_images(accelerator: Accelerator, data: DataArguments, seed: int) -> TrainingImages:
    """Load both sets, decoded by one process per machine. Collective.

    Raises:
        ValueError: not the images that a configuration was written for, or validation images that
            do not go with the training images.
    """
    validation = None
    with accelerator.local_main_process_first():
        train = load_split(accelerator, data, data.train_split, data.max_train_samples, training=True)
        if data.validation_split is not None:
            validation = load_split(accelerator, data, data.validation_split, data.max_validation_images)
        elif data.validation_share is not None:
            train, held_out = hold_out(train, data.validation_share, seed)
            validation = held_out.at_most(data.max_validation_images)
    if data.data_fingerprint not in (None, train.fingerprint):
        raise ValueError(
            f"the configuration was written for images of the fingerprint {data.data_fingerprint} and {train.name} "
            f"(split {train.split}) has {train.fingerprint}: they are not the same images. To train on these, remove "
            "the line data_fingerprint from the file"
        )
    if validation is not None:
        check_validation(train, validation, accelerator.num_processes)
    return TrainingImages(train, validation, train.skipped)


def load_split(
    accelerator: Accelerator, data: DataArguments, split: str, max_samples: int | None, training: bool = False
) -> Any:
    """Images of a split: an ImageSet, or an ImageStream to train on.

    Training images are kept larger than a batch holds, to be cropped anew each time.
    """
    settings = {f.name: getattr(data, f.name) for f in fields(ImageSource) if hasattr(data, f.name)}
    settings |= {"split": split, "center_crop": data.center_crop or not training, "max_samples": max_samples}
    settings |= {"cache_dir": data.cache_dir, "show_progress": accelerator.is_local_main_process}
    if data.streaming and training:
        return open_stream(**settings, buffer_size=data.shuffle_buffer_size)
    return load_images(**settings, streaming=data.streaming)


def check_validation(train: ImageSet | ImageStream, validation: ImageSet, num_processes: int) -> None:
    """Raise ValueError unless there is a validation image per process, and all fit the network."""
    split = f"--validation_split {validation.split}"
    expected, found = ((one.channels, *one.size) for one in (train, validation))
    if expected != found or (validation.num_classes or 0) > (train.num_classes or 0):
        raise ValueError(
            f"{split} has images of {dims(validation)} and {validation.num_classes or 0} classes; they must be those "
            f"of the training images, {dims(train)} and {train.num_classes or 0}"
        )
    if train.class_names != validation.class_names:
        differ = sorted(set(train.class_names or ()) ^ set(validation.class_names or ()))
        what = f"differ in {', '.join(differ)}" if differ else "are the same in another order"
        raise ValueError(f"{split} and the training images must have the same classes; they {what}")
    if len(validation) < num_processes:
        raise ValueError(f"{split} has {len(validation)} images; there must be at least one per process")


def dims(images: ImageSet | ImageStream) -> str:
    """Channels, height and width of an image, as in 3x32x32."""
    return "x".join(map(str, (images.channels, *images.size)))


def count_of(images: ImageSet | ImageStream) -> str:
    """How many images, from how many files, as far as that is known."""
    number = "a stream of images" if images.num_images is None else f"{images.num_images} images"
    return number if images.num_files is None else f"{number} of {images.num_files} files"
