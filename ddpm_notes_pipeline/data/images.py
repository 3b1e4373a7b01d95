"""`load_images`: any image set as 8-bit tensors.

1. Every image is decoded once, into one file that is memory-mapped from then on: memory does not
   grow with the set, a random batch is a gather, and a second run or process decodes nothing.
2. Pixels stay integers 0..255 until `to_model_range` maps them to [-1, 1]: a likelihood in bits is
   one of integers.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from .decoded_file import FORMAT, DecodedFile, read_decoded, write_decoded
from .image_set import ImageSet
from .sources import EMBEDDED, ImageSource, digest, read_embedded
from .tables import read_table


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    max_samples: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
    streaming: bool = False,
    **source: Any,
) -> ImageSet:
    """Load one split of an image set, decoding it if no earlier call did.

    Of several processes, let one go first: the others then find the decoded file.

    Args:
        dataset_name, dataset_config_name, source: which images, and what is done to each: the
            fields of `ImageSource`. `load_images("digits", split="test", label_column="label")`.
            Of RGBA images, pixels with alpha 0 get colour 0, with a warning: nobody sees these
            colours, and a likelihood would pay bits for them.
        max_samples: at most this many rows, evenly spaced over the split: many sets are sorted by
            class.
        cache_dir: where decoded files are kept, by default `$HF_HOME/ddpm_notes_pipeline`.
        show_progress: whether to show a progress bar while decoding.
        streaming: read only the first `max_samples` rows; nothing else is loaded or kept on disk.

    Raises:
        ValueError, FileNotFoundError: there are no such images, or the arguments do not fit them;
            the message says what there is.
        ImportError: a package is missing; the message names the extra that brings it.
    """
    asked = ImageSource(dataset_name, dataset_config_name, **source)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; it must be at least 1")
    if dataset_name in EMBEDDED and not streaming:
        rows = read_embedded(asked, max_samples)
    else:
        rows = read_table(asked, max_samples, streaming)
    folder = Path(cache_dir or Path(datasets.config.HF_CACHE_HOME, "ddpm_notes_pipeline")).expanduser()
    path = folder / f"{digest([FORMAT, rows.key, *asked.decoding])}.images"
    file = read_decoded(path)
    if file is None:
        bar = tqdm(rows.images, f"decoding {rows.name}", rows.count, unit=" images", disable=not show_progress)
        file = write_decoded(path, bar, asked)
    _warn_of_changes(rows.name, file)
    return ImageSet(
        name=rows.name,
        split=asked.split,
        source=asked,
        file=file,
        size=asked.target or tuple(file.sizes[0].tolist()),
        fingerprint=file.fingerprint,
        labels=None if rows.labels is None else np.delete(rows.labels, file.left_out),
        class_names=rows.class_names,
        license=rows.license,
        num_files=rows.num_files,
    )


def _warn_of_changes(name: str, file: DecodedFile) -> None:
    """Name the images that were left out or lost bits, whether they were decoded now or earlier."""
    if file.skipped:
        bad = "".join(f"\n  {reason}" for reason in file.bad)
        warnings.warn(f"{name}: left out {file.skipped} of {file.skipped + file.num_images} images{bad}", stacklevel=3)
    if file.sixteen_bit:
        warnings.warn(f"{name}: {file.sixteen_bit} 16-bit images scaled to 8 bits, v -> v/257", stacklevel=3)
    if file.hidden_colours:
        hidden = f"{file.hidden_colours} images had colours in fully transparent pixels (alpha 0), which were set to 0"
        warnings.warn(f"{name}: {hidden}", stacklevel=3)
