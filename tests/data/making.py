"""Images on disk, in the forms that users have them in."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet

Content = int | bytes | np.ndarray | PIL.Image.Image


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(content: Content, file_format: str = "PNG", side: int = 8) -> bytes:
    """An image file: of an image, its pixels, or a level that all its pixels have; bytes as is."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, int):
        content = PIL.Image.new("L", (side, side), content)
    elif isinstance(content, np.ndarray):
        content = PIL.Image.fromarray(content)
    file = io.BytesIO()
    content.save(file, file_format)
    return file.getvalue()


def write_images(root: Path, images: list[str] | dict[str, Content], side: int = 8) -> Path:
    """A folder of image files; of a list of names, the n-th is a grey image of level n."""
    if isinstance(images, list):
        images = {name: level for level, name in enumerate(images)}
    for name, content in images.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        suffix = PIL.Image.registered_extensions().get(file.suffix, "PNG")
        file.write_bytes(encoded(content, suffix, side))
    return root


def table_of(images: list[Content | dict | None], **columns: list) -> datasets.Dataset:
    """Rows of images and other columns; "animal" is a ClassLabel of cats and dogs."""
    features = {"image": datasets.Image()}
    for name, values in columns.items():
        dtype = datasets.Value("string" if isinstance(values[0], str) else "int32")
        features[name] = datasets.ClassLabel(names=["cat", "dog"]) if name == "animal" else dtype
    rows = [image if isinstance(image, dict | None) else {"bytes": encoded(image), "path": None} for image in images]
    return datasets.Dataset.from_dict({"image": rows, **columns}, features=datasets.Features(features))


def write_parquet(path: Path, table: datasets.Dataset, name: str = "train") -> Path:
    """A folder with the rows as they are: `save_to_disk` and `to_parquet` would read the files."""
    path.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.data.table, path / f"{name}.parquet")
    return path


def levels_of(images) -> list[int]:
    """The level of each image of a set of images that have one."""
    return images.take(range(len(images)))[:, 0, 0, 0].tolist()
