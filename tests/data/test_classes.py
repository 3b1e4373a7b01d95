"""A choice of classes: the same images and labels from every kind of source."""

import datasets
import numpy as np
import pytest
import torch

from ddpm_notes_pipeline.data import ImageStream, StreamedBatches, load_images, open_stream
from ddpm_notes_pipeline.data.sources import embedded_arrays
from tests.data.making import levels_of, table_of, write_images, write_parquet

CLASSES = ["dngn", "item", "mon", "player"]
OF_EACH = 6  # image n of grey level n is of class n % 4


def table(count: int = len(CLASSES) * OF_EACH) -> datasets.Dataset:
    rows = table_of([*range(count)], kind=[n % 4 for n in range(count)], count=[n % 3 for n in range(count)])
    return rows.cast_column("kind", datasets.ClassLabel(names=CLASSES))


def source(form: str, path) -> dict:
    """The 24 images in one form, as arguments of load_images."""
    if form == "folder":
        names = [f"{CLASSES[n % 4]}/{n:02d}.png" for n in range(len(CLASSES) * OF_EACH)]
        write_images(path, {name: n for n, name in enumerate(names)})
        return {"train_data_dir": path, "label_column": "label"}
    if form == "saved":
        table().save_to_disk(path)
    else:
        write_parquet(path, table())
    return {"dataset_name": str(path), "label_column": "kind"}


FORMS = ["folder", "parquet", "saved"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [["player", "dngn"], ["item"], ["mon", "player", "item", "dngn"]])
def test_only_images_of_the_classes_are_kept_and_labels_follow_their_order(load, tmp_path, form, classes):
    arguments = source(form, tmp_path / "set")
    images = load(**arguments, classes=classes)
    expected = {n: classes.index(CLASSES[n % 4]) for n in range(24) if CLASSES[n % 4] in classes}
    assert dict(zip(levels_of(images), images.labels.tolist(), strict=True)) == expected
    assert images.labels.dtype == np.int64
    assert (images.class_names, images.num_classes) == (classes, len(classes))
    assert images.num_files == (24 if form == "folder" else None)
    every = load(**arguments)
    assert len(every) == 24 and every.class_names == CLASSES
    assert (every.fingerprint == images.fingerprint) == (len(classes) == 4)  # of pixels alone
    assert (every.file.path == images.file.path) == (len(classes) == 4)


@pytest.mark.parametrize("form", FORMS)
def test_max_samples_are_spread_over_the_images_of_the_classes(load, tmp_path, form):
    arguments = source(form, tmp_path / "set")
    whole = load(**arguments, classes=["mon", "item"])
    some = load(**arguments, classes=["mon", "item"], max_samples=5)
    at = [i * 12 // 5 for i in range(5)]
    assert levels_of(some) == [levels_of(whole)[i] for i in at]
    assert some.labels.tolist() == whole.labels[at].tolist()


def test_the_decoded_file_of_one_choice_is_not_taken_for_another_of_as_many_images(load, tmp_path):
    arguments = source("parquet", tmp_path / "set")
    first, second = (load(**arguments, classes=[name]) for name in ("mon", "item"))
    assert levels_of(first) == [*range(2, 24, 4)] and levels_of(second) == [*range(1, 24, 4)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_of_an_embedded_set(load, split):
    images = load(dataset_name="digits", split=split, label_column="label", classes=["7", "0"])
    pixels, labels = embedded_arrays("digits")
    of_split = (np.arange(len(labels)) % 5 == 4) == (split == "test")
    chosen = np.flatnonzero(of_split & np.isin(labels, [7, 0]))
    np.testing.assert_array_equal(images.take(range(len(chosen)))[:, 0], pixels[chosen])
    assert images.labels.tolist() == [{7: 0, 0: 1}[int(label)] for label in labels[chosen]]
    assert images.class_names == ["7", "0"]
    some = load(dataset_name="digits", split=split, label_column="label", classes=["7", "0"], max_samples=9)
    assert len(some) == 9 and set(some.labels) == {0, 1}


@pytest.mark.parametrize("form", FORMS)
def test_mistakes_in_classes_are_named_with_the_classes_that_there_are(load, tmp_path, form):
    arguments = source(form, tmp_path / "set")
    there = "dngn, item, mon, player"
    with pytest.raises(
        ValueError, match=rf"classes is \['mon', 'dog'\]; it must hold classes of .*set'?, each once: {there}"
    ):
        load(**arguments, classes=["mon", "dog"])
    with pytest.raises(ValueError, match=rf"classes is \['mon', 'item', 'mon'\]; .* each once: {there}"):
        load(**arguments, classes=["mon", "item", "mon"])
    with pytest.raises(ValueError, match="without label_column"):
        load(**(arguments | {"label_column": None}), classes=["mon"])
    for bad in ([], "mon", [2]):
        with pytest.raises(ValueError, match="must be a list of names, at least one"):
            load(**arguments, classes=bad)


def test_mistakes_in_classes_of_columns_without_names_and_of_embedded_sets(load, tmp_path):
    arguments = source("parquet", tmp_path / "set") | {"label_column": "count"}
    with pytest.raises(
        ValueError, match=r"classes is \['2'\], but label_column 'count' .* holds integers without names"
    ):
        load(**arguments, classes=["2"])
    with pytest.raises(
        ValueError, match=r"classes is \['ten'\]; .*data set 'digits', each once: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    ):
        load(dataset_name="digits", label_column="label", classes=["ten"])


def test_rows_without_a_label_are_of_no_class(load, tmp_path):
    rows = table_of([0, 1, 2, 3], animal=[1, None, 0, -1])
    arguments = {"dataset_name": str(write_parquet(tmp_path / "set", rows)), "label_column": "animal"}
    with pytest.raises(ValueError, match="rows without a label"):
        load(**arguments)
    images = load(**arguments, classes=["dog", "cat"])
    assert levels_of(images) == [0, 2] and images.labels.tolist() == [0, 1]
    empty = {"dataset_name": str(write_parquet(tmp_path / "cats", table_of([0], animal=[0]))), "label_column": "animal"}
    with pytest.raises(ValueError, match="has 0 images of the classes dog in split 'train'"):
        load(**empty, classes=["dog"])


def test_a_bad_image_of_another_class_is_not_read(load, tmp_path):
    folder = write_images(tmp_path / "f", {"a/0.png": 0, "b/1.png": b"no image", "b/2.png": 2, "c/3.png": 3})
    images = load(folder, label_column="label", classes=["c", "a"])
    assert (levels_of(images), images.labels.tolist(), images.skipped) == ([0, 3], [1, 0], 0)
    with pytest.warns(UserWarning, match="left out 1 of 3 images"):
        images = load(folder, label_column="label", classes=["c", "b"], on_bad_image="skip")
    assert (levels_of(images), images.labels.tolist(), images.skipped) == ([2, 3], [1, 0], 1)


# ------------------------------------------------------------ streams


def stream_of(arguments: dict, path, **more) -> ImageStream:
    return open_stream(**arguments, **more, cache_dir=path / "cache", show_progress=False, buffer_size=4)


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_holds_the_images_of_the_classes_with_their_new_labels(tmp_path, form):
    arguments = source(form, tmp_path / "set")
    stream = stream_of(arguments, tmp_path, classes=["player", "dngn"])
    assert (stream.class_names, stream.num_classes, len(stream.first)) == (["player", "dngn"], 2, 12)
    epoch = StreamedBatches(stream, 12, seed=0)[0]
    found = dict(zip(epoch["pixel_values"][:, 0, 0, 0].tolist(), epoch["class_labels"].tolist(), strict=True))
    assert found == {n: int(n % 4 == 0) for n in range(24) if n % 4 in (0, 3)}
    assert stream.fingerprint != stream_of(arguments, tmp_path).fingerprint
    assert stream.fingerprint != stream_of(arguments, tmp_path, classes=["dngn", "player"]).fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_max_samples_of_a_stream_are_the_first_of_the_classes(tmp_path, form):
    arguments = source(form, tmp_path / "set")
    stream = stream_of(arguments, tmp_path, classes=["mon"], max_samples=3)
    expected = [2, 6, 10]
    assert levels_of(stream.first) == expected
    epoch = StreamedBatches(stream, 3, seed=0)[0]
    assert sorted(epoch["pixel_values"][:, 0, 0, 0].tolist()) == expected
    few = load_images(
        **arguments, classes=["mon"], max_samples=3, streaming=True, cache_dir=tmp_path, show_progress=False
    )
    assert levels_of(few) == expected and few.labels.tolist() == [0, 0, 0]


def test_every_step_of_a_stream_of_classes_is_that_of_any_number_of_processes(tmp_path):
    for k in range(2):
        write_parquet(tmp_path / "set", table().shard(2, k), f"train-{k:05d}-of-00002")
    stream = stream_of(
        {"dataset_name": str(tmp_path / "set"), "label_column": "kind"}, tmp_path, classes=["mon", "item"]
    )
    whole = StreamedBatches(stream, 8, seed=0)
    parts = [StreamedBatches(stream, 8, 0, rank, 2) for rank in range(2)]
    for step in range(4):
        shares = [part[step] for part in parts]
        for name in ("pixel_values", "class_labels", "noise"):
            assert torch.equal(whole[step][name], torch.cat([share[name] for share in shares]))


def test_a_sorted_folder_may_be_streamed_of_one_class_alone(tmp_path):
    """Were its classes chosen row by row, most of its shards would have no image."""
    arguments = source("folder", tmp_path / "set")
    stream = stream_of(arguments, tmp_path, classes=["player"])
    assert stream.num_shards == OF_EACH
    assert sorted(StreamedBatches(stream, 6, seed=0)[0]["pixel_values"][:, 0, 0, 0].tolist()) == [*range(3, 24, 4)]


def test_a_stream_whose_shards_lack_the_classes_says_so(tmp_path):
    for k, some in enumerate((range(0, 24, 2), range(1, 24, 2))):  # the classes dngn and mon, item and player
        write_parquet(tmp_path / "set", table().select(list(some)).flatten_indices(), f"train-{k:05d}-of-00002")
    stream = stream_of({"dataset_name": str(tmp_path / "set"), "label_column": "kind"}, tmp_path, classes=["mon"])
    with pytest.raises(ValueError, match="no image of stream 1 could be read, as its shards hold none of --classes"):
        StreamedBatches(stream, 4, seed=0)[0]


def test_mistakes_in_classes_of_a_stream(tmp_path):
    arguments = source("parquet", tmp_path / "set")
    with pytest.raises(ValueError, match=r"classes is \['dog'\]; .*dngn, item, mon, player"):
        stream_of(arguments, tmp_path, classes=["dog"])
    only_mon = write_parquet(tmp_path / "mon", table().select([2, 6]).flatten_indices())
    with pytest.raises(ValueError, match="the stream has 0 rows of the classes item in split"):
        stream_of(arguments | {"dataset_name": str(only_mon)}, tmp_path, classes=["item"])
    folder = write_images(tmp_path / "f", ["train/mon/0.png", "test/item/1.png"])
    with pytest.raises(ValueError, match="has 0 images of the classes item in split 'train'"):
        stream_of({"train_data_dir": folder, "label_column": "label"}, tmp_path, classes=["item"])
