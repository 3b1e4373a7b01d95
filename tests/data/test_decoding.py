"""What becomes of one image: mode, bits, orientation, size; bad images."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.making import encoded, random_pixels, table_of, write_images, write_parquet


def test_rgba_keeps_four_channels_unless_converted(load, tmp_path):
    pixels = random_pixels(4, 5, 4)
    folder = write_images(tmp_path / "f", {"a.png": pixels})
    np.testing.assert_array_equal(load(folder).take([0])[0], pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(load(folder, image_mode="RGB").take([0])[0], pixels[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("given", "mode"), [("P", "RGB"), ("P transparent", "RGBA"), ("1", "L"), ("CMYK", "RGB"), ("LA", "RGBA")]
)
def test_unusual_modes_become_the_nearest_usual_one(load, tmp_path, given, mode):
    image = PIL.Image.fromarray(random_pixels(8, 8, 3)).convert(given.split()[0])
    if given == "P transparent":
        image.info["transparency"] = 3
    name = "a.jpg" if given == "CMYK" else "a.png"
    folder = write_images(tmp_path / "f", {name: image})
    stored = PIL.Image.open(folder / name)
    assert stored.has_transparency_data == (mode == "RGBA")
    truth = np.asarray(stored.convert(mode)).reshape(8, 8, -1)
    np.testing.assert_array_equal(load(folder).take([0])[0], truth.transpose(2, 0, 1))


def palette_with_transparency(random: np.random.Generator) -> PIL.Image.Image:
    image = PIL.Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8), "P")
    image.putpalette(random.integers(1, 256, 768, dtype=np.uint8).tobytes())
    image.info["transparency"] = bytes([0] * 64 + [128] * 64 + [255] * 128)
    return image


def transparent_files(path: Path) -> dict[str, np.ndarray]:
    """Files of the modes of a folder of tiles; what RGBA images must hold of each, (4, 8, 8)."""
    random = np.random.default_rng(0)
    pixels = {mode: random.integers(1, 256, (8, 8, n), dtype=np.uint8) for mode, n in (("RGBA", 4), ("LA", 2))}
    for some in pixels.values():
        some[2:6, 1:4, -1] = 0  # with a colour below it
    clean = pixels["RGBA"].copy()
    clean[clean[..., 3] == 0] = 0
    opaque = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    palette = palette_with_transparency(random)
    files = {"P": palette, "LA": PIL.Image.fromarray(pixels["LA"], "LA"), "RGBA": pixels["RGBA"]}
    write_images(path, {f"{name}.png": image for name, image in {**files, "clean": clean, "RGB": opaque}.items()})
    colours = np.frombuffer(bytes(palette.getpalette()), np.uint8).reshape(256, 3)[np.asarray(palette)]
    alpha = np.frombuffer(palette.info["transparency"], np.uint8)[np.asarray(palette)]
    expected = {
        "P": np.dstack([colours, alpha]),
        "LA": pixels["LA"][..., [0, 0, 0, 1]],
        "RGBA": pixels["RGBA"],
        "clean": clean,
        "RGB": np.dstack([opaque, np.full((8, 8), 255, np.uint8)]),
    }
    return {name: np.where(rgba[..., 3:] > 0, rgba, 0).transpose(2, 0, 1) for name, rgba in expected.items()}


def test_colours_that_nobody_sees_become_zero_with_a_warning(load, tmp_path):
    expected = transparent_files(tmp_path / "f")
    for _ in range(2):  # decoding, and from the file
        with pytest.warns(UserWarning, match=r"f: 3 images had colours in fully transparent pixels \(alpha 0\)"):
            images = load(tmp_path / "f", image_mode="RGBA")
    assert (images.channels, images.hidden_colours) == (4, 3)
    for image, name in zip(images.take(range(5)).numpy(), sorted(expected), strict=True):
        np.testing.assert_array_equal(image, expected[name], err_msg=name)
    stored = np.asarray(PIL.Image.open(tmp_path / "f" / "RGBA.png"))
    assert stored[2:6, 1:4, :3].all() and not expected["RGBA"][:, 2:6, 1:4].any()  # of the file they are colours


def test_images_without_hidden_colours_are_not_counted_as_changed(load, tmp_path, recwarn):
    pixels = random_pixels(2, 8, 8, 4)
    pixels[0, :, :, 3] = 255
    pixels[1][pixels[1, ..., 3] < 9] = 0
    images = load(write_images(tmp_path / "f", {"a.png": pixels[0], "b.png": pixels[1]}))
    np.testing.assert_array_equal(images.take([0, 1]), pixels.transpose(0, 3, 1, 2))
    assert images.hidden_colours == 0 and not [w for w in recwarn if "transparent" in str(w.message)]


def test_hidden_colours_do_not_reach_pixels_beside_them_when_resized(load, tmp_path):
    """Half of it opaque and red, half of it transparent and green: between them, red alone."""
    pixels = np.zeros((24, 24, 4), np.uint8)
    pixels[:, :11], pixels[:, 11:] = (255, 0, 0, 255), (0, 255, 0, 0)
    with pytest.warns(UserWarning, match="1 images had colours"):
        (image,) = load(write_images(tmp_path / "f", {"a.png": pixels}), resolution=8).take([0]).numpy()
    assert image[1].max() == 0 and 0 < np.count_nonzero((image[3] > 0) & (image[3] < 255))
    assert not image[:3, image[3] == 0].any()


def test_sixteen_bit_grey_is_scaled_with_a_warning_not_clipped_at_255(load, tmp_path):
    values = np.arange(256).reshape(16, 16) * 257
    almost = np.minimum(values + 128, 65535)  # still nearest to the same 8-bit value
    folder = write_images(tmp_path / "f", {"a.png": values.astype(np.uint16), "b.png": almost.astype(np.uint16)})
    for _ in range(2):  # decoding, and from the file
        with pytest.warns(UserWarning, match="2 16-bit images scaled to 8 bits"):
            images = load(folder)
    assert images.channels == 1
    for image in images.take([0, 1]):
        np.testing.assert_array_equal(image.flatten(), np.arange(256))


def test_float_pixels_are_refused(load, tmp_path):
    with pytest.raises(ValueError, match=r"a\.tiff.*floating-point"):
        load(write_images(tmp_path / "f", {"a.tiff": np.ones((4, 4), np.float32)}))


def test_photograph_is_upright_as_its_exif_says(load, tmp_path):
    pixels = random_pixels(6, 4)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # shown turned by a quarter, clockwise
    (tmp_path / "f").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "f" / "a.png", exif=exif)
    np.testing.assert_array_equal(load(tmp_path / "f").take([0])[0, 0], np.rot90(pixels, -1))


def test_image_of_the_target_size_is_not_resampled(load, tmp_path):
    pixels = random_pixels(12, 7)
    folder = write_images(tmp_path / "f", {"a.png": pixels})
    for center_crop in (True, False):
        images = load(folder, resolution=(12, 7), center_crop=center_crop)
        np.testing.assert_array_equal(images.take([0])[0, 0], pixels)


@pytest.mark.parametrize("shape", [(50, 100), (100, 50), (7, 9), (33, 32)])
def test_resize_covers_the_target_and_keeps_the_aspect(load, tmp_path, shape):
    image = PIL.Image.fromarray(random_pixels(*shape, 3))
    folder = write_images(tmp_path / "f", {"a.png": image})
    factor = 32 / min(shape)
    covering = (round(shape[0] * factor), round(shape[1] * factor))
    resized = image.resize(covering[::-1], PIL.Image.Resampling.BILINEAR)
    whole = load(folder, resolution=32)
    assert whole.file.sizes.tolist() == [list(covering)] and whole.size == (32, 32)
    top, left = (covering[0] - 32) // 2, (covering[1] - 32) // 2
    truth = np.asarray(resized)[top : top + 32, left : left + 32].transpose(2, 0, 1)
    np.testing.assert_array_equal(whole.take([0])[0], truth)
    cropped = load(folder, resolution=[32, 32], center_crop=True)
    assert cropped.file.sizes.tolist() == [[32, 32]]
    np.testing.assert_array_equal(cropped.take([0])[0], truth)


def test_images_of_two_sizes_need_a_resolution(load, tmp_path):
    shapes = [(8, 8), (8, 12), (16, 8), (8, 8)]
    images = {f"i{n}.png": random_pixels(*shape, seed=n) for n, shape in enumerate(shapes)}
    folder = write_images(tmp_path / "f", images)
    for on_bad_image in ("error", "skip"):
        with pytest.raises(ValueError, match=r"i1\.png.* is 8x12 .*first one 8x8; set a resolution"):
            load(folder, on_bad_image=on_bad_image)
    images = load(folder, resolution=8)
    assert images.file.sizes.tolist() == [list(shape) for shape in shapes]
    for n, (height, width) in enumerate(shapes):  # in any order, whole images begin where they should
        top, left = (height - 8) // 2, (width - 8) // 2
        truth = random_pixels(height, width, seed=n)[top : top + 8, left : left + 8]
        np.testing.assert_array_equal(images.take([3 - n, n])[1, 0], truth)


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
    good = {f"{c}/{c}.png": p for c, p in zip("abde", pixels, strict=True)}
    folder = write_images(tmp_path / "f", {**good, "c/bad.png": content})
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
    for bad, message in [(None, "no image"), ({"bytes": None, "path": str(tmp_path / "gone.png")}, r"gone\.png")]:
        path = write_parquet(tmp_path / "t", table_of([0, 0, bad]))
        with pytest.raises(ValueError, match=f"row 2.*{message}"):
            load(dataset_name=str(path))
    with pytest.raises(ValueError, match="no image could be read, of 1; 1: cannot identify"):
        load(write_images(tmp_path / "f", {"a.png": b"nonsense"}), on_bad_image="skip")
