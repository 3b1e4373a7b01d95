"""A folder of image files as a table with splits and classes.

`datasets`' own imagefolder guesses splits from words anywhere in a path: one file called
training_dummy.png makes a "train" split of that file alone. Here the sub-folders decide:

1. If all top-level sub-folders that hold images are named as splits (train, test, validation, or a
   usual spelling of these), they are the splits. Else all images belong to "train".
2. The class of an image is the first sub-folder below its split, however deep the file lies.
3. A metadata.csv, .jsonl or .parquet keeps the meaning that `datasets` gives it.

As in `datasets`, names that begin with "." or "__" are ignored.
"""

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as DatasetsImageFolder

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Newer versions of Pillow read some formats that `datasets` does not list.
NEWER_SUFFIXES = frozenset((".avif", ".avifs", ".qoi"))
IMAGE_SUFFIXES = frozenset(DatasetsImageFolder.EXTENSIONS) | (NEWER_SUFFIXES & PIL.Image.registered_extensions().keys())
# Photographs and drawings that it does not read.
UNREAD_SUFFIXES = frozenset(".heic .heif .hif .jxl .svg .dng .nef .cr2 .cr3 .arw .raf .orf .rw2".split())
UNREAD_SUFFIXES |= NEWER_SUFFIXES - IMAGE_SUFFIXES
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", *ARCHIVE_SUFFIXES)
HIDDEN = (".", "__")
STREAM_SHARDS = 64


@dataclass(frozen=True)
class ImageFolder:
    """What a folder of images holds.

    Attributes:
        root: the folder.
        splits: the image files of each split, as sorted paths below `root`.
        split_folders: the sub-folders of each split; none where the folder itself is "train".
        metadata: paths below `root` of the files that list the rows.
        archives: whether it holds archives, which `datasets` unpacks.
        tables: the number of files that hold rows of data rather than one image.
        unread: the number of images of each format that cannot be read, by its suffix.
    """

    root: Path
    splits: dict[str, list[str]]
    split_folders: dict[str, list[str]]
    metadata: list[str]
    archives: bool
    tables: int
    unread: dict[str, int]

    @cached_property
    def classes(self) -> dict[str, Any]:
        """The class of each image, by its path; None for an image in no sub-folder."""
        paths = [path for paths in self.splits.values() for path in paths]
        return {path: next(iter(path.split("/")[bool(self.split_folders) : -1]), None) for path in paths}

    def load(self, split: str, streaming: bool = False) -> Any:
        """The rows of a split ("train", "train[:90%]", "train+test").

        Args:
            streaming: give an `IterableDataset` of what `datasets` itself has to read: metadata and
                archives.

        Returns:
            A `datasets.Dataset` or `IterableDataset` with the column "image" and, if every image is
            in a class, "label".

        Raises:
            ValueError: there is no such split.
        """
        if self.metadata or self.archives:
            above = [path for path in self.metadata if "/" not in path]
            files = {name: [*(f"{top}/**" for top in tops), *above] for name, tops in self.split_folders.items()}
            files = files or {"train": ["**"]}
            return datasets.load_dataset(
                "imagefolder", data_dir=str(self.root), data_files=files, split=split, streaming=streaming
            )
        sizes = {name: len(paths) for name, paths in self.splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        paths = [path for part in parts for path in self.splits[part.splitname][part.from_ : part.to]]
        columns = {"image": [str(self.root / path) for path in paths]}
        features = datasets.Features(image=datasets.Image())
        if None not in self.classes.values():
            columns["label"] = [self.classes[path] for path in paths]
            features["label"] = datasets.ClassLabel(names=sorted(set(self.classes.values())))
        return datasets.Dataset.from_dict(columns, features=features, split=parts[0].splitname)

    def files_in(self, split: str) -> int | None:
        """The number of image files in a split, or that it is a slice of; None with archives."""
        if self.archives:
            return None
        names = {part.strip().partition("[")[0] for part in split.split("+")}
        return sum(len(self.splits.get(name, ())) for name in names)


def read_image_folder(root: Path) -> ImageFolder:
    """Find the images in a folder and everything below it.

    Raises:
        ValueError: images lie beside the folders that are its splits, and so are in no split.
    """
    suffixes = {path: os.path.splitext(path)[1].lower() for path in _files_below(root)}
    images = sorted(path for path, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES)
    metadata = [path for path in suffixes if path.rpartition("/")[2] in METADATA]
    archives = any(suffix in ARCHIVE_SUFFIXES for suffix in suffixes.values())
    tables = sum(suffix in TABLE_SUFFIXES for suffix in suffixes.values()) - len(metadata)
    top = sorted({path.partition("/")[0] for path in images if "/" in path})
    split_folders: dict[str, list[str]] = {}
    if all(name.lower() in SPLIT_OF for name in top):
        for name in top:
            split_folders.setdefault(SPLIT_OF[name.lower()], []).append(name)
    beside = [path for path in images if "/" not in path]
    if split_folders and beside:
        raise ValueError(
            f"{root} has the splits {', '.join(top)} and {len(beside)} images beside them ({beside[0]}, ...), which are in no split; move them into one of its folders"
        )
    splits: dict[str, list[str]] = {}
    for path in images:
        if os.fsencode(path).decode(errors="replace") != path:
            raise ValueError(f"{root} holds {path!r}; names must be UTF-8: rename the file")
        splits.setdefault(SPLIT_OF[path.partition("/")[0].lower()] if split_folders else "train", []).append(path)
    unread = Counter(suffix for suffix in suffixes.values() if suffix in UNREAD_SUFFIXES)
    return ImageFolder(root, splits, split_folders, metadata, archives, tables, dict(unread))


def _files_below(root: Path) -> list[str]:
    """Paths below `root`, separated by "/". Links to folders are followed, each folder once."""
    found, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real, here = os.path.realpath(folder), Path(folder).relative_to(root)
        # In order, or which of several links to a folder is followed would differ between machines.
        below[:] = [name for name in sorted(below) if not name.startswith(HIDDEN) and real not in seen]
        found += [(here / name).as_posix() for name in names if not name.startswith(HIDDEN) and real not in seen]
        seen.add(real)
    return found
