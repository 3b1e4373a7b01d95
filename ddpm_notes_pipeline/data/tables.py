"""Images in whatever `datasets` reads: the Hub, saved tables, folders of data or image files."""

import hashlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from .decoding import read_remote
from .image_folders import STREAM_SHARDS, ImageFolder, read_image_folder
from .sources import EMBEDDED, ImageSource, Rows, digest, evenly_spaced, labels_of_classes, renumbered


@dataclass(frozen=True)
class Table:
    """One split, and which of its columns are used.

    Attributes:
        rows: a `datasets.Dataset`, or an `IterableDataset` if it is streamed.
        image_column, label_column: of `rows`.
        folder: the folder of image files that the rows come from, or None.
        new_labels: of the classes that are kept, by their labels in `rows`; None: all are kept.
    """

    rows: Any
    image_column: str
    label_column: str | None
    folder: ImageFolder | None
    new_labels: dict[int, int] | None = None

    @property
    def class_names(self) -> list[str] | None:
        """The names of a ClassLabel column's classes; of the chosen ones, if some are chosen."""
        names = getattr(self.rows.features[self.label_column], "names", None) if self.label_column else None
        return names if names is None or self.new_labels is None else [names[i] for i in self.new_labels]

    @property
    def encoded(self) -> Any:
        """The rows with the used columns alone, and images as they are stored."""
        columns = [self.image_column, *([self.label_column] if self.label_column else [])]
        return self.rows.select_columns(columns).cast_column(self.image_column, datasets.Image(decode=False))

    def kept(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Of rows of a stream, those of the chosen classes, with their new labels."""
        column, new_labels = str(self.label_column), self.new_labels
        for row in rows:
            if new_labels is None:
                yield row
            elif row[column] in new_labels:
                yield row | {column: new_labels[row[column]]}


def open_table(source: ImageSource, streaming: bool = False) -> Table:
    """Find a split and its columns; of a stream, no row is read.

    Raises:
        ValueError: no such split or column, a split without rows, or one that cannot be streamed.
        FileNotFoundError: no such data set, or a folder without images.
    """
    rows, folder = _load(source, streaming)
    if rows.features is None:
        raise ValueError(f"{source} does not state its columns; to be streamed, it must")
    if not streaming and len(rows) == 0:
        raise ValueError(f"{source} has 0 images in split {source.split!r}")
    image_column = _find_image_column(rows.features, source.image_column)
    _check_label_column(rows.features, source.label_column, folder)
    table = Table(rows, image_column, source.label_column, folder)
    table = replace(table, new_labels=labels_of_classes(source, table.class_names))
    if streaming and isinstance(rows, datasets.Dataset):
        return replace(table, rows=_as_stream(table, source))
    return table


def read_table(source: ImageSource, max_samples: int | None, streaming: bool = False) -> Rows:
    """At most `max_samples` rows: evenly spaced over the split, or with `streaming` the first ones.

    Raises:
        ValueError, FileNotFoundError: as `open_table`; also rows without a label.
    """
    table = open_table(source, streaming)
    license, folder = table.rows.info.license, table.folder
    if streaming:
        table = _first_rows(table, source.split, max_samples)
    # The fingerprint of all rows, for which `datasets` has no public name.
    fingerprint = table.rows._fingerprint  # noqa: SLF001
    kept = _rows_of_classes(table, source)
    chosen = kept[evenly_spaced(len(kept), max_samples)]
    if len(chosen) < len(table.rows):
        table = replace(table, rows=table.rows.select(chosen, keep_in_memory=True))
    images = (row[table.image_column] for row in table.encoded)
    return Rows(
        name=source.path.resolve().name if source.path.is_dir() else str(source.dataset_name),
        key=digest([fingerprint, table.image_column, _digest_of(chosen), _digest_of_files(table)]),
        count=len(chosen),
        images=((image_name(f"row {n}", image), image) for n, image in zip(chosen, images, strict=True)),
        labels=_labels(table),
        class_names=table.class_names,
        license=license or None,
        num_files=folder.files_in(source.split) if folder else None,
    )


def _load(source: ImageSource, streaming: bool) -> tuple[Any, ImageFolder | None]:
    """One split as `datasets` has it, and the folder of image files that it comes from, if any.

    Even with `streaming`, a split of local files may be a `Dataset`.
    """
    if source.dataset_name in EMBEDDED:
        raise ValueError(f"{source} is embedded in a package and cannot be streamed: leave out --streaming")
    name, path = source.dataset_name, source.path
    if not path.is_dir() and (name is None or name.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"{source} is not a folder (looked for {path.absolute()})")
    if name is not None and any((path / state).is_file() for state in ("dataset_dict.json", "state.json")):
        return _load_saved(source), None
    folder = _find_image_folder(source) if path.is_dir() else None
    try:
        if folder is not None:
            return folder.load(source.split, streaming), folder
        place = str(path) if path.is_dir() else name
        return datasets.load_dataset(place, source.dataset_config_name, split=source.split, streaming=streaming), None
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} is neither a local folder nor found on the Hub: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source} holds no image or data file: {error}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source} has 0 images in split {source.split!r}: {error}") from error
        if "nknown split" in str(error) or "Bad split" in str(error):
            raise ValueError(f"split {source.split!r} is not in {source}: {error}") from error
        raise


def _load_saved(source: ImageSource) -> Any:
    """A split of what `save_to_disk` wrote."""
    try:
        saved = datasets.load_from_disk(str(source.path))
    except IndexError as error:  # what datasets 5 makes of a table without rows
        raise ValueError(f"{source} has 0 images in one split at least") from error
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if source.split not in splits:
        raise ValueError(f"split {source.split!r} is not in {source}; it has: {', '.join(splits)}")
    return splits[source.split]


def _find_image_folder(source: ImageSource) -> ImageFolder | None:
    """The folder, if it is one of image files: a train_data_dir always is."""
    folder = read_image_folder(source.path)
    unread = ", ".join(f"{count} {suffix}" for suffix, count in folder.unread.items())
    if source.dataset_name is None:
        if not folder.classes and not folder.archives:
            raise FileNotFoundError(
                f"{source} holds no image or data file" + (f" that can be read ({unread})" if unread else "")
            )
        if unread:
            warnings.warn(f"{source}: left out {unread}: convert such files to PNG, say, to use them", stacklevel=2)
        return folder
    readme = source.path / "README.md"
    configured = readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")
    return folder if len(folder.classes) > folder.tables and not configured else None


def _find_image_column(features: dict[str, Any], asked: str | None) -> str:
    """The asked column, or the only one of images."""
    of_images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked in of_images or (asked is None and len(of_images) == 1):
        return asked or of_images[0]
    problem = "image_column must be set" if asked is None else f"image_column {asked!r} has no images"
    raise ValueError(
        f"{problem}; columns: {', '.join(features)}; of these with images: {', '.join(of_images) or 'none'}"
    )


def _check_label_column(features: dict[str, Any], asked: str | None, folder: ImageFolder | None) -> None:
    of_labels = [name for name, f in features.items() if str(getattr(f, "dtype", "")).startswith(("int", "uint"))]
    if asked is None or asked in of_labels:
        return
    problem = f"is {features[asked]}" if asked in features else "is not a column"
    known = f"columns: {', '.join(features)}; of these ClassLabel or integer: {', '.join(of_labels) or 'none'}"
    if folder is not None and not folder.metadata and (outside := list(folder.classes.values()).count(None)):
        known += f". A folder has the column 'label' where every image is in a sub-folder, its class; {outside} of {len(folder.classes)} images are in none"
    raise ValueError(f"label_column {asked!r} {problem}; {known}")


def _first_rows(table: Table, split: str, count: int | None) -> Table:
    """The first rows of a stream as a table in memory."""
    if count is None:
        raise ValueError(
            f"split {split!r} is needed whole, which --streaming cannot do: it reads the first max_samples rows of a split. Leave out --streaming, or limit the split (--max_images and --max_validation_images limit theirs)"
        )
    stream, names = table.encoded, table.class_names
    taken = itertools.islice(table.kept(stream), count)
    rows = [{name: read_remote(value) for name, value in row.items()} for row in taken]
    if not rows:
        of_classes = "" if table.new_labels is None else f" of the classes {', '.join(names or ())}"
        raise ValueError(f"the stream has 0 rows{of_classes} in split {split!r}")
    features = stream.features.copy()
    if table.new_labels is not None:
        features[str(table.label_column)] = datasets.ClassLabel(names=names)
    first = datasets.Dataset.from_list(rows, features=features)
    return replace(table, rows=first.cast_column(table.image_column, datasets.Image()), new_labels=None)


def _as_stream(table: Table, source: ImageSource) -> datasets.IterableDataset:
    """The rows of a table as a stream, those of the chosen classes, so that no shard has none."""
    rows, shards = table.rows, STREAM_SHARDS if table.folder else len(table.rows.cache_files)
    if table.new_labels is not None:
        rows = rows.select(_rows_of_classes(table, source), keep_in_memory=True)
    return rows.to_iterable_dataset(num_shards=max(1, min(len(rows), shards)))


def _rows_of_classes(table: Table, source: ImageSource) -> np.ndarray:
    """The rows of the chosen classes, int64 (n,), at least one; all rows if none are chosen."""
    labels = None if table.new_labels is None else _labels(table)
    kept = np.arange(len(table.rows)) if labels is None else np.flatnonzero(labels >= 0)
    if not len(kept):
        names = ", ".join(source.classes or ())
        raise ValueError(f"{source} has 0 images of the classes {names} in split {source.split!r}")
    return kept


def _labels(table: Table) -> np.ndarray | None:
    """(N,) int64; where classes are chosen, the new labels, -1 for rows of no chosen class."""
    if table.label_column is None:
        return None
    column = table.rows.select_columns([table.label_column]).with_format("arrow")[:].column(0)
    labels = column.cast("int64").fill_null(-1).to_numpy()
    if table.new_labels is None and labels.min() < 0:
        raise ValueError(f"label_column {table.label_column!r} has rows without a label (null or below 0)")
    return renumbered(labels, table.new_labels)


def image_name(place: str, image: dict[str, Any] | None) -> str:
    """What errors call an image: its place in the set and, if it has one, its path."""
    return f"{place} ({image['path']})" if image and image["path"] else place


def _digest_of(rows: np.ndarray) -> str:
    return hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()


def _digest_of_files(table: Table) -> str:
    """Digest of paths, sizes and times of files that rows only name: these may change unseen."""
    files = hashlib.blake2b()
    for batch in table.encoded.with_format("arrow").iter(batch_size=1000):
        images = batch.column(table.image_column).combine_chunks()
        for path in images.field("path").filter(images.field("bytes").is_null()).drop_null().to_pylist():
            stat = os.stat(path) if os.path.exists(path) else None
            files.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return files.hexdigest()
