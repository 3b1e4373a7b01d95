"""Sets that are read while training, in every form: what a step holds, after any stop."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from ddpm_notes_pipeline.data import ImageStream, StreamedBatches, decoding, load_images, open_stream, step_seed
from ddpm_notes_pipeline.data.streaming import StreamReader
from tests.data.making import encoded, random_pixels, table_of, write_images, write_parquet
from tests.support.comparing import assert_same, weights
from tests.support.launching import TINY, TRAIN, error_lines

COUNT = 24  # images of 4x4; the value of every pixel of image n is n


def rows_of(numbers: list[int], bad: int | None = None) -> datasets.Dataset:
    files = [encoded(n, side=4) if n != bad else b"no image" for n in numbers]
    images = [{"bytes": file, "path": f"{n}.png"} for n, file in zip(numbers, files, strict=True)]
    return table_of(images, animal=[n % 2 for n in numbers], count=numbers)


def parquet(path: Path, shards: int, bad: int | None = None) -> Path:
    """Shard k holds the images k, k + shards, ..."""
    for k in range(shards):
        write_parquet(path, rows_of([*range(k, COUNT, shards)], bad), f"train-{k:05d}-of-{shards:05d}")
    return path


def folder(path: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    return write_images(path, [f"{classes[n % len(classes)]}/{n}.png" for n in range(COUNT)], side=4)


def webdataset(path: Path) -> Path:
    path.mkdir(parents=True)
    for k in range(2):
        with tarfile.open(path / f"train-{k}.tar", "w") as archive:
            for n in range(k, COUNT, 2):
                for suffix, content in (("png", encoded(n, side=4)), ("json", json.dumps({"n": n}).encode())):
                    info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def stream(tmp_path):
    """open_stream with a cache of the test's own and a buffer of 8 rows."""

    def call(source: Path, **arguments) -> ImageStream:
        settings = {
            "cache_dir": tmp_path / "cache",
            "show_progress": False,
            "buffer_size": 8,
            "dataset_name": str(source),
        }
        return open_stream(**{**settings, **arguments})

    return call


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return parquet(tmp_path_factory.mktemp("shards") / "set", 4)


def numbers(item: dict) -> list[int]:
    return item["pixel_values"].flatten(1)[:, 0].tolist()


def joined(items: list[dict]) -> dict:
    return {name: torch.cat([item[name] for item in items]) for name in items[0] if name != "bad_images"}


@pytest.mark.parametrize("form", ["parquet", "folder", "webdataset", "save_to_disk", "zip"])
def test_an_epoch_holds_every_image_once_in_an_order_of_its_own(stream, tmp_path, form):
    arguments = {}
    if form == "parquet":
        source = parquet(tmp_path / "set", 1)
    elif form == "webdataset":
        source = webdataset(tmp_path / "set")
    elif form == "save_to_disk":
        rows_of([*range(COUNT)]).save_to_disk(source := tmp_path / "set")
    elif form == "folder":
        source, arguments = folder(tmp_path / "set"), {"dataset_name": None, "train_data_dir": tmp_path / "set"}
    else:
        shutil.make_archive(str(tmp_path / "set" / "images"), "zip", folder(tmp_path / "images", classes=("all",)))
        source = tmp_path / "set"
    images = stream(source, **arguments)
    assert (images.channels, images.size, images.num_classes) == (1, (4, 4), None)
    batches = StreamedBatches(images, 6, seed=1)
    epochs = [[n for i in range(4) for n in numbers(batches[4 * e + i])] for e in range(3)]
    if images.num_streams(6) == 1:
        assert all(sorted(epoch) == [*range(COUNT)] for epoch in epochs)
    assert sorted(n for epoch in epochs for n in epoch) == sorted([*range(COUNT)] * 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [*range(COUNT)]
    assert numbers(StreamedBatches(images, 6, seed=2)[0]) != numbers(batches[0])


EVERYTHING = {"random_flip": True, "label_dropout": 0.3, "null_label": 2}


@pytest.mark.parametrize(("count", "streams"), [(1, 1), (4, 4), (3, 1)])
def test_any_number_of_processes_sees_the_same_batches(stream, tmp_path, count, streams):
    """Of images of many sizes, cropped and flipped at random."""
    source = tmp_path / "set"
    for k in range(count):
        table = table_of([random_pixels(8 + n, 13 - n, 3, seed=7 * k + n) for n in range(7)], animal=[0, 1] * 3 + [0])
        write_parquet(source, table, f"train-{k}-of-{count}")
    images = stream(source, label_column="animal", resolution=8)
    assert images.num_streams(8) == streams
    whole = StreamedBatches(images, 8, 5, **EVERYTHING)
    for processes in (2, 4, 8):
        shares = [StreamedBatches(images, 8, 5, rank, processes, **EVERYTHING) for rank in range(processes)]
        for step in (0, 3, 4, 9):
            assert_same(joined([share[step] for share in shares]), joined([whole[step]]))


def test_a_process_reads_the_shards_of_its_share_alone(stream, shards):
    images = stream(shards)
    for rank in (0, 1):
        batches = StreamedBatches(images, 8, 0, rank, 2)
        seen = {n for step in range(12) for n in numbers(batches[step])}
        assert {n % 4 for n in seen} == ({0, 1} if rank == 0 else {2, 3})
        assert len(seen) == COUNT / 2


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("bad", [None, 5])
def test_resuming_from_any_step_is_exact(stream, tmp_path, count, bad):
    """Of epochs of 23 or 24 images in batches of 8, up to the fifth one; with a bad image too."""
    images = stream(parquet(tmp_path / "set", count, bad), on_bad_image="skip", label_column="animal", resolution=4)
    straight = StreamedBatches(images, 8, 3, **EVERYTHING)
    items = [straight[step] for step in range(15)]
    for step in (1, 2, 3, 4, 8, 14):
        assert_same(StreamedBatches(images, 8, 3, **EVERYTHING)[step], items[step])
    assert_same(straight[2], items[2])  # backwards too


def test_what_was_read_before_is_not_decoded_again(stream, shards, monkeypatch):
    images, calls = stream(shards), []
    open_image = decoding.open_image
    monkeypatch.setattr(decoding, "open_image", lambda *given: calls.append(1) or open_image(*given))
    StreamedBatches(images, 8, 0)[50]
    assert len(calls) == 8


def test_epochs_that_are_passed_over_are_not_read(stream, shards, monkeypatch):
    images = stream(shards)
    straight = StreamedBatches(images, 8, 0)
    expected = [numbers(straight[step]) for step in range(40)][-1]
    found, epochs, shuffled_rows = [], [], StreamReader.shuffled_rows
    monkeypatch.setattr(
        StreamReader, "shuffled_rows", lambda self, epoch: epochs.append(epoch) or shuffled_rows(self, epoch)
    )
    for v in range(4):
        epochs.clear()
        reader = StreamReader(images, v, 4, seed=0)
        reader.go_to(39 * 2)  # 6 images an epoch
        # The start of the second epoch tells the length of the first; the next one is in the 14th.
        assert epochs == [0, 1, 13] and (reader.epoch, reader.position) == (13, 39 * 2)
        found += [int(reader.read()[0][0, 0, 0]) for _ in range(2)]
        assert epochs == [0, 1, 13]
    assert found == expected


def test_pixels_are_those_of_the_decoded_set(stream, tmp_path):
    source = write_images(tmp_path / "f", {f"{n}.jpg": random_pixels(20 + n, 15, 3, seed=n) for n in range(6)})
    arguments = {"train_data_dir": source, "resolution": (10, 8), "center_crop": True, "cache_dir": tmp_path / "c"}
    decoded = load_images(**arguments, show_progress=False).take(range(6))
    images = stream(source, dataset_name=None, **arguments)
    streamed = StreamedBatches(images, 6, 0)[0]["pixel_values"]
    key = lambda batch: sorted(image.flatten().tolist() for image in batch)  # noqa: E731
    assert key(streamed) == key(decoded)
    assert torch.equal(images.first.take(range(6)), decoded)


def test_order_of_a_stream_is_that_of_every_version(stream, shards):
    """Of the algorithm, written out: another version resumes a run with the same images."""
    images = stream(shards)
    batches = StreamedBatches(images, 4, seed=9)
    found = [numbers(batches[step]) for step in range(12)]  # two epochs, an image of each stream a step
    for v in range(4):  # stream v has shard v, and its 6 rows go through a buffer of 8/4 = 2
        for epoch in range(2):
            random = np.random.default_rng([step_seed(9, v, "stream"), epoch])
            random.permutation(1)
            rows = [*range(v, COUNT, 4)]
            buffer, order = rows[:2], []
            for row in rows[2:]:
                i = int(random.integers(2))
                order.append(buffer[i])
                buffer[i] = row
            random.shuffle(buffer)
            assert [item[v] for item in found[6 * epoch : 6 * epoch + 6]] == order + buffer


def test_max_samples_are_the_first(stream, shards):
    batches = StreamedBatches(stream(shards, max_samples=5), 5, 0)
    assert sorted(numbers(batches[0])) == [0, 4, 8, 12, 16] == sorted(numbers(batches[1]))


def test_a_worker_prepares_the_same_batches(stream, shards):
    batches = StreamedBatches(stream(shards, label_column="animal"), 8, 0, **EVERYTHING)
    straight = [batches[step] for step in range(5)]
    loader = DataLoader(
        StreamedBatches(stream(shards, label_column="animal"), 8, 0, **EVERYTHING),
        batch_size=None,
        sampler=range(2, 5),
        num_workers=1,
    )
    for ours, theirs in zip(loader, straight[2:], strict=True):
        assert_same(ours, theirs)


def test_a_bad_image_is_named(stream, tmp_path):
    images = stream(parquet(tmp_path / "set", 1, bad=20), first_images=4)
    with pytest.raises(
        ValueError, match=r"bad image, set, image \d+ of epoch 0 of stream 0 \(20\.png\): cannot identify"
    ):
        [StreamedBatches(images, 8, 0)[step] for step in range(3)]
    with pytest.raises(ValueError, match=r"bad image, row 20 \(20\.png\)"):  # among the first ones, before training
        stream(parquet(tmp_path / "again", 1, bad=20))


@pytest.mark.parametrize("count", [1, 2])
def test_skipped_images_are_counted_once_whatever_the_number_of_processes(stream, tmp_path, count):
    images = stream(parquet(tmp_path / "set", count, bad=20), first_images=4, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"image left out, set.*\(20\.png\)"):
        whole = StreamedBatches(images, 8, 0)
        items = [whole[step] for step in range(8)]
        assert [int(item["bad_images"]) for item in items][-1] == 1
        assert not any(20 in numbers(item) for item in items)
        shares = [StreamedBatches(images, 8, 0, rank, 4) for rank in range(4)]
        for step in range(8):
            parts = [share[step] for share in shares]
            assert_same(joined(parts), joined([items[step]]))
        assert sum(int(part["bad_images"]) for part in parts) == 1


def test_a_wrong_mode_label_or_size_is_refused_as_in_a_decoded_set(stream, tmp_path):
    def refused(name: str, image: PIL.Image.Image, label: int | None, message: str, **arguments) -> None:
        grey = PIL.Image.new("L", (4, 4))
        write_parquet(tmp_path / name, table_of([grey] * 6 + [image], animal=[0] * 6 + [label]))
        opened = stream(tmp_path / name, label_column="animal", first_images=3, **arguments)
        with pytest.raises(ValueError, match=message):
            StreamedBatches(opened, 7, 0)[0]

    refused("mode", PIL.Image.new("RGB", (4, 4)), 0, "its mode is RGB, that of the first image is L")
    refused("label", PIL.Image.new("L", (4, 4)), None, r"its label is None; it must be in 0\.\.1")
    refused("size", PIL.Image.new("L", (5, 4)), 0, "is 4x5 .* set a resolution", on_bad_image="skip")


def test_what_cannot_be_streamed_is_refused_by_name(stream, shards, tmp_path):
    for arguments, message in [
        ({"dataset_name": "digits"}, "'digits' is embedded"),
        ({"split": "test"}, "split 'test' is not in"),
        ({"image_column": "picture"}, "image_column 'picture' has no images.*columns: image, animal, count"),
        ({"label_column": "kind"}, "'kind' is not a column"),
        ({"label_column": "count"}, "'count' is .*a stream needs a ClassLabel"),
        ({"buffer_size": 0}, "buffer_size is 0"),
        ({"resolution": 0}, "resolution is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(shards, **arguments)
    with pytest.raises(FileNotFoundError, match="holds no image or data file"):
        (tmp_path / "empty").mkdir()
        stream(tmp_path / "empty")
    loader = DataLoader(StreamedBatches(stream(shards), 8, 0), batch_size=None, sampler=range(4), num_workers=2)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        next(iter(loader))


STREAMED = "--streaming --label_column animal --resolution 8 --shuffle_buffer_size 4 --checkpointing_steps 6".split()


@pytest.fixture(scope="module")
def streamed(train, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "run"
    validation = ["--validation_split", "train", "--max_validation_images", 4, "--validation_steps", 6]
    flags = [*TINY[2:], "--dataset_name", shards, *STREAMED, *validation]
    return folder, flags, train(*flags, "--output_dir", folder)


def test_a_run_on_a_stream_reports_no_number_of_images(streamed):
    folder, _, result = streamed
    assert result.stdout.startswith("a stream of images of 1x8x8 from set, ")
    assert (
        "Learned:   12 steps on a stream of images, " in result.stdout
        and "bits/dim on 4 images of 'train'" in result.stdout
    )
    card = (folder / "README.md").read_text()
    assert "a stream of images of set" in card and "saw a stream of images, 96 in all: samples" in card


def test_a_killed_run_on_a_stream_resumes_exactly(streamed, train, tmp_path):
    folder, flags, _ = streamed
    flags = [*flags, "--output_dir", tmp_path / "run"]
    train(*flags, stop_at=8, expect=-9)
    train(*flags, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", 1)
    for name in ("loss.jsonl", "validation.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()
    assert_same(weights(tmp_path / "run"), weights(folder))


def test_a_run_that_meets_a_bad_image_says_how_to_go_on_and_goes_on_without_it(train, tmp_path):
    files = parquet(tmp_path / "set", 1, bad=20)
    flags = [*TINY[2:], "--dataset_name", files, "--streaming", "--checkpointing_steps", 1, "--block_out_channels", 32]
    flags += ["--max_train_samples", COUNT, "--shuffle_buffer_size", 1, "--output_dir", tmp_path / "run"]
    monkey = (
        "from ddpm_notes_pipeline.data import streaming; streaming.open_stream.__kwdefaults__['first_images'] = 4; "
    )
    code = f"{monkey}import runpy, sys; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    result = train(code, *flags, script="-c", expect=1)
    (line,) = error_lines(result)
    assert "bad image, set, image" in line and "(--on_bad_image skip leaves bad images out)" in line
    assert re.search(r"checkpoint-\d+ is left\. Resume: .*--resume_from_checkpoint latest", line)
    again = train(code, *flags, "--resume_from_checkpoint", "latest", "--on_bad_image", "skip", script="-c")
    assert "resuming from" in again.stdout
    record = json.loads((tmp_path / "run" / "training_run.json").read_text())
    assert record["images_skipped"] == 1 and record["steps"] == 12


@pytest.mark.slow
def test_two_processes_learn_from_a_stream_what_one_does(streamed, train, tmp_path):
    folder, flags, _ = streamed
    train(*flags, "--output_dir", tmp_path / "run", processes=2)
    one, two = (
        [json.loads(line)["loss"] for line in (path / "loss.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path / "run")
    )
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--dataset_name digits --streaming", "'digits' is embedded"),
        ("--train_data_dir nowhere --streaming", "'nowhere' is not a folder"),
        (
            "--train_data_dir pngs --streaming --dataloader_num_workers 2",
            "--dataloader_num_workers is 2 with --streaming",
        ),
    ],
)
def test_bad_settings_of_a_stream_are_one_line(train, tmp_path, flags, named):
    result = train(*TINY[2:], *flags.split(), "--output_dir", tmp_path / "run", cwd=tmp_path, expect=None)
    line, *_ = error_lines(result)
    assert result.returncode in (1, 2) and line.startswith("train.py: error: ") and named in line


def test_a_stream_wants_a_number_of_steps(train, tmp_path):
    flags = ["--dataset_name", "some/set", "--streaming", "--output_dir", tmp_path / "run"]
    line, *_ = error_lines(train(*flags, expect=2))
    assert "--streaming needs --max_train_steps" in line
