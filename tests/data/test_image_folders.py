"""Folders of image files: which splits and classes they have, and that no image is lost on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ddpm_notes_pipeline.data import HELD_OUT, hold_out, load_images
from ddpm_notes_pipeline.data.streaming import StreamedBatches, open_stream


def write_images(root: Path, *names: str) -> Path:
    """A folder of 8x8 grey images, each of one level of its own: the n-th has level n."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (8, 8), level).save(root / name)
    return root


@pytest.fixture
def load(tmp_path):
    return lambda **arguments: load_images(cache_dir=tmp_path / "cache", show_progress=False, **arguments)


def levels(images) -> list[int]:
    """The level of each image of a set whose images have one."""
    return images.take(range(len(images)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("name", ["training_dummy.png", "test_spawner.png", "a/my-train/x.png", "dev-eval.png"])
@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_a_file_called_training_dummy_does_not_become_the_train_split(load, tmp_path, argument, name):
    folder = write_images(tmp_path / "tiles", "mon/rat.png", "mon/bat.png", name, "item/deep/er/sword.png")
    images = load(**{argument: str(folder)})
    assert len(images) == images.num_files == 4
    with pytest.raises(ValueError, match=r"split 'test' is not in .*\['train'\]"):
        load(**{argument: str(folder)}, split="test")


def test_folder_has_splits_where_all_its_sub_folders_are_named_as_splits(load, tmp_path):
    folder = write_images(tmp_path / "f", "Training/a/0.png", "Training/b/1.png", "val/a/2.png", "test/c/3.png")
    (folder / "notes").mkdir()  # holds no image
    (folder / "notes" / "read me.txt").write_text("made by hand")
    found = {split: load(train_data_dir=folder, split=split, label_column="label") for split in SPLITS}
    assert {split: levels(images) for split, images in found.items()} == {
        "train": [0, 1],
        "validation": [2],
        "test": [3],
    }
    assert all(images.class_names == ["a", "b", "c"] for images in found.values())
    assert {split: images.labels.tolist() for split, images in found.items()} == {
        "train": [0, 1],
        "validation": [0],
        "test": [2],
    }
    assert [images.num_files for images in found.values()] == [2, 1, 1]


SPLITS = ("train", "validation", "test")


def test_one_sub_folder_of_another_name_makes_all_of_them_classes(load, tmp_path):
    folder = write_images(tmp_path / "f", "train/0.png", "test/1.png", "player/2.png")
    images = load(train_data_dir=folder, label_column="label")
    assert levels(images) == [2, 1, 0] and images.class_names == ["player", "test", "train"]


def test_classes_of_a_nested_folder_are_its_top_level_sub_folders(load, tmp_path):
    folder = write_images(tmp_path / "f", "mon/undead/0.png", "mon/1.png", "item/armour/body/2.png")
    images = load(train_data_dir=folder, label_column="label")
    assert images.class_names == ["item", "mon"]
    assert dict(zip(levels(images), images.labels.tolist(), strict=True)) == {0: 1, 1: 1, 2: 0}


def test_images_in_no_class_are_counted_when_labels_are_asked_for(load, tmp_path):
    folder = write_images(tmp_path / "f", "mon/0.png", "1.png", "2.png")
    with pytest.raises(ValueError, match="every image is in a sub-folder, its class; 2 of 3 images are in none"):
        load(train_data_dir=folder, label_column="label")
    assert len(load(train_data_dir=folder)) == 3


def test_images_beside_split_folders_are_not_lost(load, tmp_path):
    folder = write_images(tmp_path / "f", "train/0.png", "test/1.png", "2.png")
    with pytest.raises(ValueError, match=r"splits test, train and 1 images beside them \(2\.png"):
        load(train_data_dir=folder)


def test_slices_and_sums_of_splits_are_of_the_files(load, tmp_path):
    folder = write_images(tmp_path / "f", *(f"train/{n}.png" for n in range(10)), "test/a.png")
    part = load(train_data_dir=folder, split="train[:30%]")
    assert levels(part) == [0, 1, 2] and part.num_files == 10
    assert levels(load(train_data_dir=folder, split="train[8:]+test")) == [8, 9, 10]
    with pytest.raises(ValueError, match=r"0 images in split 'train\[:0\]'"):
        load(train_data_dir=folder, split="train[:0]")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_keeps_its_meaning(load, tmp_path, kind):
    folder = write_images(tmp_path / "f", "training_0.png", "1.png", "sub/2.png")
    rows = [{"file_name": "training_0.png", "kind": 5}, {"file_name": "1.png", "kind": 6}]
    rows.append({"file_name": "sub/2.png", "kind": 7})
    if kind == "csv":
        text = "file_name,kind\n" + "".join(f"{row['file_name']},{row['kind']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"metadata.{kind}").write_text(text)
    images = load(train_data_dir=folder, label_column="kind")
    assert dict(zip(levels(images), images.labels.tolist(), strict=True)) == {0: 5, 1: 6, 2: 7}
    assert images.num_files == 3


def test_metadata_above_split_folders_is_of_all_splits(load, tmp_path):
    folder = write_images(tmp_path / "f", "train/0.png", "test/1.png")
    (folder / "train" / "metadata.csv").write_text("file_name,kind\n0.png,5\n")
    (folder / "test" / "metadata.csv").write_text("file_name,kind\n1.png,6\n")
    assert load(train_data_dir=folder, label_column="kind").labels.tolist() == [5]
    assert load(train_data_dir=folder, label_column="kind", split="test").labels.tolist() == [6]


def test_images_in_an_archive_are_read_beside_the_others(load, tmp_path):
    folder = write_images(tmp_path / "f", "0.png", "1.png")
    write_images(tmp_path / "packed", "2.png", "training_3.png")
    shutil.make_archive(str(folder / "more"), "zip", tmp_path / "packed")
    images = load(train_data_dir=folder)
    assert sorted(levels(images)) == [0, 0, 1, 1] and images.num_files is None


def test_hidden_files_are_passed_over_and_linked_folders_followed_once(load, tmp_path):
    folder = write_images(tmp_path / "f", "a/0.png", ".cache/1.png", "__MACOSX/2.png", "a/._3.png")
    elsewhere = write_images(tmp_path / "elsewhere", "x.png")
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "up").symlink_to(folder)  # a circle
    assert len(load(train_data_dir=folder)) == 2


def test_fewer_images_than_files_is_an_error(load, tmp_path, monkeypatch):
    from ddpm_notes_pipeline.data.image_folders import ImageFolder

    folder = write_images(tmp_path / "f", "0.png", "1.png", "2.png")
    whole = ImageFolder.load
    monkeypatch.setattr(ImageFolder, "load", lambda self, *how: whole(self, *how).select([0]))
    with pytest.raises(ValueError, match="has 3 image files in split 'train', and 1 were found"):
        load(train_data_dir=folder)


def test_a_stream_reads_every_file_of_a_folder(tmp_path):
    names = [f"mon/{n}.png" for n in range(9)] + ["mon/training_dummy.png", "item/a/b/test_x.png"]
    folder = write_images(tmp_path / "f", *names)
    stream = open_stream(train_data_dir=folder, label_column="label", cache_dir=tmp_path / "cache", show_progress=False)
    assert stream.num_files == 11 and stream.class_names == ["item", "mon"]
    batches = StreamedBatches(stream, 11, seed=0)
    epoch = batches[0]
    assert sorted(epoch["pixel_values"][:, 0, 0, 0].tolist()) == list(range(11))
    assert sorted(epoch["class_labels"].tolist()) == [0] + [1] * 10


@pytest.mark.parametrize("share, count", [(0.3, 3), (0.04, 1)])
def test_held_out_images_are_none_of_those_trained_on(load, tmp_path, share, count):
    names = [f"{'ab'[n % 2]}/{n}.png" for n in range(20 if share == 0.04 else 10)]
    images = load(train_data_dir=write_images(tmp_path / "f", *names), label_column="label")
    training, held_out = hold_out(images, share, seed=0)
    assert len(held_out) == count and held_out.split == HELD_OUT
    assert sorted(levels(training) + levels(held_out)) == sorted(levels(images))
    for part in (training, held_out):
        assert part.labels.tolist() == [level % 2 for level in levels(part)]
    again = hold_out(images, share, seed=0)
    assert [part.fingerprint for part in again] == [training.fingerprint, held_out.fingerprint]
    others = [hold_out(images, share, seed=seed)[1] for seed in range(1, 9)]
    assert len({one.fingerprint for one in (held_out, *others)}) > 3


def test_a_part_of_images_of_many_sizes_holds_their_pixels(tmp_path, load):
    rng = np.random.default_rng(0)
    for n in range(12):
        pixels = rng.integers(0, 256, (16 + n, 40 - n), dtype=np.uint8)
        (tmp_path / "f").mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(tmp_path / "f" / f"{n:02d}.png")
    images = load(train_data_dir=tmp_path / "f", resolution=8)
    training, held_out = hold_out(images, 0.25, seed=3)
    for part in (training, held_out):
        assert (part.take(range(len(part))) == images.take(part.index)).all()
    half = hold_out(images, 0.5, seed=3)[1]
    few = half.at_most(2)
    assert len(few) == 2 and set(few.index) < set(half.index) and half.at_most(6) is half
    assert (few.take([0, 1]) == images.take(few.index)).all()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.001, 0.999, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(load, tmp_path, share):
    images = load(train_data_dir=write_images(tmp_path / "f", *(f"{n}.png" for n in range(10))))
    with pytest.raises(ValueError, match=r"validation_share is .* of 10 images"):
        hold_out(images, share, seed=0)
