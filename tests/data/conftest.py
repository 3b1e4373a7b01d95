import numpy as np
import pytest

from ddpm_notes_pipeline.data import ImageSet, load_images
from tests.data.making import write_images


@pytest.fixture
def load(tmp_path):
    """load_images with a cache of the test's own; a first path is a folder of images."""

    def call(train_data_dir=None, **arguments) -> ImageSet:
        arguments = {"train_data_dir": train_data_dir, **arguments}
        return load_images(cache_dir=tmp_path / "cache", show_progress=False, **arguments)

    return call


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> ImageSet:
    return load_images("digits", label_column="label", cache_dir=tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> ImageSet:
    """16x30 and 24x16 images for batches of 16x16; a pixel holds its image, row and column."""
    path, images = tmp_path_factory.mktemp("large"), {}
    for n, (height, width) in enumerate([(16, 30), (24, 16)] * 3):
        pixels = np.stack(np.broadcast_arrays(n, *np.mgrid[:height, :width]), axis=-1)
        images[f"{n}.png"] = pixels.astype(np.uint8)
    write_images(path, images)
    return load_images(train_data_dir=path, resolution=16, cache_dir=path / "cache", show_progress=False)
