"""What `load_images` and `open_stream` are asked for, and the encoded images that answer it."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .decoding import Transform, make_transform


@dataclass(frozen=True)
class ImageSource:
    """One split of a data set, its columns, and what is done to each image.

    The fields are arguments of `load_images`, which documents them.

    Raises:
        ValueError: not exactly one of dataset_name and train_data_dir, or an impossible transform.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | os.PathLike[str] | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    resolution: int | Sequence[int] | None = None
    center_crop: bool = False
    image_mode: str | None = None
    on_bad_image: str = "error"

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"exactly one of dataset_name (got {self.dataset_name!r}) and train_data_dir "
                f"(got {self.train_data_dir!r}) must be given"
            )
        _ = self.transform  # checks the arguments that it is made of

    @cached_property
    def transform(self) -> Transform:
        return make_transform(self.resolution, self.center_crop, self.image_mode, self.on_bad_image)

    @property
    def path(self) -> Path:
        """Where the folder would be; for a data set on the Hub there is none."""
        return Path(str(self.train_data_dir if self.dataset_name is None else self.dataset_name)).expanduser()

    def __str__(self) -> str:
        if self.dataset_name is None:
            return f"train_data_dir {str(self.train_data_dir)!r}"
        return f"data set {self.dataset_name!r}"


@dataclass(frozen=True)
class Rows:
    """The encoded images of a split.

    Attributes:
        name: of the data set, for cards and pictures; of a folder, only its last part.
        key: hex digest that changes whenever the bytes of the rows may have changed.
        count: N, the number of rows.
        images: (name for errors, array or {"bytes", "path"} or None) of each row. Read once.
        labels: (N,) int64, or None.
        class_names, license, num_files: as in `ImageSet`.
    """

    name: str
    key: str
    count: int
    images: Iterator[tuple[str, Any]]
    labels: np.ndarray | None
    class_names: list[str] | None
    license: str | None = None
    num_files: int | None = None


def digest(parts: list[Any]) -> str:
    """Hex digest of a list that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
