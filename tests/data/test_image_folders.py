"""Folders of image files: which splits and classes they have, and that no image is lost."""

import json
import os
import shutil
import sys

import numpy as np
import PIL.Image
import pytest

from ddpm_notes_pipeline.data import StreamedBatches, open_stream
from tests.data.making import levels_of, random_pixels, write_images

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("name", ["training_dummy.png", "test_spawner.png", "a/my-train/x.png", "dev-eval.png"])
@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_a_file_called_training_dummy_does_not_become_the_train_split(load, tmp_path, argument, name):
    folder = write_images(tmp_path / "tiles", ["mon/rat.png", "mon/bat.png", name, "item/deep/er/sword.png"])
    images = load(**{argument: str(folder)})
    assert len(images) == images.num_files == 4
    with pytest.raises(ValueError, match=r"split 'test' is not in .*\['train'\]"):
        load(**{argument: str(folder)}, split="test")


def test_folder_has_splits_where_all_its_sub_folders_are_named_as_splits(load, tmp_path):
    folder = write_images(tmp_path / "f", ["Training/a/0.png", "Training/b/1.png", "val/a/2.png", "test/c/3.png"])
    (folder / "notes").mkdir()  # holds no image
    (folder / "notes" / "read me.txt").write_text("made by hand")
    found = [load(folder, split=split, label_column="label") for split in SPLITS]
    assert [levels_of(images) for images in found] == [[0, 1], [2], [3]]
    assert all(images.class_names == ["a", "b", "c"] for images in found)
    assert [images.labels.tolist() for images in found] == [[0, 1], [0], [2]]
    assert [images.num_files for images in found] == [2, 1, 1]


def test_one_sub_folder_of_another_name_makes_all_of_them_classes(load, tmp_path):
    folder = write_images(tmp_path / "f", ["train/0.png", "test/1.png", "player/2.png"])
    images = load(folder, label_column="label")
    assert levels_of(images) == [2, 1, 0] and images.class_names == ["player", "test", "train"]


def test_folder_of_classes_gives_labels_from_sub_folders(load, tmp_path):
    pixels = random_pixels(3, 6, 5, 3)
    folder = write_images(tmp_path / "f", {f"{c}/{c}.png": p for c, p in zip("abc", pixels, strict=True)})
    images = load(folder, label_column="label")
    assert (images.channels, images.size, images.class_names) == (3, (6, 5), ["a", "b", "c"])
    assert images.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(images.take([2, 0]), pixels[[2, 0]].transpose(0, 3, 1, 2))


def test_classes_of_a_nested_folder_are_its_top_level_sub_folders(load, tmp_path):
    folder = write_images(tmp_path / "f", ["mon/undead/0.png", "mon/1.png", "item/armour/body/2.png"])
    images = load(folder, label_column="label")
    assert images.class_names == ["item", "mon"]
    assert dict(zip(levels_of(images), images.labels.tolist(), strict=True)) == {0: 1, 1: 1, 2: 0}


def test_images_in_no_class_are_counted_when_labels_are_asked_for(load, tmp_path):
    folder = write_images(tmp_path / "f", ["mon/0.png", "1.png", "2.png"])
    with pytest.raises(ValueError, match="every image is in a sub-folder, its class; 2 of 3 images are in none"):
        load(folder, label_column="label")
    assert len(load(folder)) == 3


def test_images_beside_split_folders_are_not_lost(load, tmp_path):
    folder = write_images(tmp_path / "f", ["train/0.png", "test/1.png", "2.png"])
    with pytest.raises(ValueError, match=r"splits test, train and 1 images beside them \(2\.png"):
        load(folder)


def test_slices_and_sums_of_splits_are_of_the_files(load, tmp_path):
    folder = write_images(tmp_path / "f", [*(f"train/{n}.png" for n in range(10)), "test/a.png"])
    part = load(folder, split="train[:30%]")
    assert levels_of(part) == [0, 1, 2] and part.num_files == 10
    assert levels_of(load(folder, split="train[8:]+test")) == [8, 9, 10]
    with pytest.raises(ValueError, match=r"0 images in split 'train\[:0\]'"):
        load(folder, split="train[:0]")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_keeps_its_meaning(load, tmp_path, kind):
    names = ["training_0.png", "1.png", "sub/2.png"]
    folder = write_images(tmp_path / "f", names)
    rows = [{"file_name": name, "kind": n} for n, name in enumerate(names, start=5)]
    if kind == "csv":
        text = "file_name,kind\n" + "".join(f"{row['file_name']},{row['kind']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"metadata.{kind}").write_text(text)
    images = load(folder, label_column="kind")
    assert dict(zip(levels_of(images), images.labels.tolist(), strict=True)) == {0: 5, 1: 6, 2: 7}
    assert images.num_files == 3


def test_metadata_inside_split_folders_is_of_each_split(load, tmp_path):
    folder = write_images(tmp_path / "f", ["train/0.png", "test/1.png"])
    (folder / "train" / "metadata.csv").write_text("file_name,kind\n0.png,5\n")
    (folder / "test" / "metadata.csv").write_text("file_name,kind\n1.png,6\n")
    assert load(folder, label_column="kind").labels.tolist() == [5]
    assert load(folder, label_column="kind", split="test").labels.tolist() == [6]


def test_images_in_an_archive_are_read_beside_the_others(load, tmp_path):
    folder = write_images(tmp_path / "f", ["0.png", "1.png"])
    write_images(tmp_path / "packed", ["2.png", "training_3.png"])
    shutil.make_archive(str(folder / "more"), "zip", tmp_path / "packed")
    images = load(folder)
    assert sorted(levels_of(images)) == [0, 0, 1, 1] and images.num_files is None


def test_hidden_files_are_ignored_and_linked_folders_followed_once(load, tmp_path):
    folder = write_images(tmp_path / "f", ["a/0.png", ".cache/1.png", "__MACOSX/2.png", "a/._3.png"])
    (folder / "b").symlink_to(write_images(tmp_path / "elsewhere", ["x.png"]))
    (folder / "a" / "up").symlink_to(folder)  # a circle
    assert len(load(folder)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_utf8_is_named(load, tmp_path):
    folder = write_images(tmp_path / "f", ["ä ö/日本.png"])
    assert load(folder, label_column="label").class_names == ["ä ö"]
    write_images(folder, [os.fsdecode(b"b/caf\xe9.png")])
    with pytest.raises(ValueError, match=r"f holds 'b/caf\\udce9.png'; names must be UTF-8: rename the file"):
        load(folder)


def test_of_several_links_to_a_folder_the_first_by_name_is_its_class(load, tmp_path):
    """The system lists them in an order of its own."""
    (tmp_path / "f").mkdir()
    elsewhere = write_images(tmp_path / "elsewhere", ["x.png"])
    for name in ("dog", "bird", "fox", "cat", "elk", "ant", "gnu"):
        (tmp_path / "f" / name).symlink_to(elsewhere)
    assert load(tmp_path / "f", label_column="label").class_names == ["ant"]


def test_a_stream_reads_every_file_of_a_folder(tmp_path):
    names = [f"mon/{n}.png" for n in range(9)] + ["mon/training_dummy.png", "item/a/b/test_x.png"]
    folder = write_images(tmp_path / "f", names)
    stream = open_stream(train_data_dir=folder, label_column="label", cache_dir=tmp_path / "cache", show_progress=False)
    assert stream.num_files == 11 and stream.class_names == ["item", "mon"]
    epoch = StreamedBatches(stream, 11, seed=0)[0]
    assert sorted(epoch["pixel_values"][:, 0, 0, 0].tolist()) == list(range(11))
    assert sorted(epoch["class_labels"].tolist()) == [0] + [1] * 10


def test_files_that_pillow_does_not_read_are_counted_and_those_that_it_reads_are_used(load, tmp_path):
    newer = "avif" if ".avif" in PIL.Image.registered_extensions() else "bmp"  # Pillow 11.3 and newer read it
    write_images(tmp_path, ["0.png", f"1.{newer}"])
    for name in ("a.heic", "b.HEIC", "c.jxl", "d.txt"):
        (tmp_path / name).write_text("no image")
    with pytest.warns(UserWarning, match="left out 2 .heic, 1 .jxl: convert such files to PNG"):
        assert len(levels_of(load(train_data_dir=tmp_path))) == 2
    for path in tmp_path.glob("[01].*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no image or data file that can be read \(2 .heic, 1 .jxl\)"):
        load(train_data_dir=tmp_path)
