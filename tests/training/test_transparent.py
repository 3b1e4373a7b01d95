"""Transparent images of chosen classes, from files through training to card and figures."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import hold_out, load_images
from ddpm_notes_pipeline.evaluation.pictures import image_grid
from tests.evaluation.test_evaluate import EVALUATE, save_network
from tests.support.launching import TINY, error_lines, once

CLASSES = ["mon", "item", "player", "dngn"]  # not in the order of the alphabet
MODES = ("P", "RGBA", "RGB", "L", "LA")
PER_CLASS = 15
FLAGS = ["--train_data_dir", "tiles", "--label_column", "label", "--classes", *CLASSES, "--image_mode", "RGBA"]
HELD_OUT = ["--validation_share", 0.2]
pytestmark = pytest.mark.slow


def write_tiles(folder):
    """15 files of each class and of two more, of all modes, some with hidden colours."""
    random = np.random.default_rng(0)
    for n, kind in enumerate([*CLASSES, "misc", "gui"] * PER_CLASS):
        pixels = random.integers(1, 256, (8, 8, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * (pixels[..., 3] > 128)
        mode = MODES[n // 6 % 5]
        image = PIL.Image.fromarray(pixels).convert(mode)
        if mode == "P":
            image.info["transparency"] = image.getpixel((0, 0))
        path = folder / "tiles" / kind / "some" / f"training_{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


@pytest.fixture(scope="module")
def trained(train):
    """The run's folder, with the tiles beside it, and what the run printed."""

    def run(folder):
        write_tiles(folder)
        flags = [*TINY[2:], *FLAGS, *HELD_OUT, "--validation_steps", 12, "--num_samples", 10, "--sample_steps", 6]
        flags += "--objective hybrid --variance_type learned_range --ddpm_beta_schedule log_snr".split()
        return train(*flags, "--output_dir", "run", cwd=folder, timeout=300)

    folder, result = once("transparent", run)
    return folder, result


def held_out_images(folder):
    every = load_images(
        train_data_dir=folder / "tiles", label_column="label", classes=CLASSES, image_mode="RGBA", show_progress=False
    )
    return every, *hold_out(every, 0.2, seed=0)


def test_a_run_trains_on_the_classes_and_says_so(trained):
    folder, result = trained
    first = result.stdout.splitlines()[0]
    assert first.startswith(
        "48 images of 90 files of 4x8x8 from tiles, classes mon, item, player, dngn, bits/dim on 12 images"
    )
    every, *_ = held_out_images(folder)
    assert every.hidden_colours == 4 * 3 * 3  # of P, RGBA and LA files
    assert result.stderr.count("images had colours in fully transparent pixels (alpha 0), which were set to 0") == 1
    config = json.loads((folder / "run" / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"], config["num_class_embeds"]) == (4, 8, 5)
    assert config["_ddpm_notes"] == {"null_label": 4, "class_names": CLASSES}
    record = json.loads((folder / "run" / "training_run.json").read_text())
    assert (record["classes"], record["hidden_colours"], record["dims"]) == (CLASSES, 36, [4, 8, 8])
    assert record["images"] == 48


def test_the_settings_of_a_run_choose_its_classes_again(trained, train, tmp_path):
    folder, _ = trained
    settings = yaml.safe_load((folder / "run" / "training_config.yaml").read_text())
    assert settings["classes"] == CLASSES and settings["train_data_dir"] == "./tiles"
    again = ["--config", folder / "run" / "training_config.yaml", "--output_dir", tmp_path / "again"]
    train(*again, "--max_train_steps", 6, "--validation_steps", 9, cwd=folder)  # accepts the fingerprint
    steps = [(path / "loss.jsonl").read_text().splitlines() for path in (folder / "run", tmp_path / "again")]
    losses = [[json.loads(line)["loss"] for line in lines[:3]] for lines in steps]
    assert losses[0] == losses[1]


def test_its_card_names_the_classes_and_the_colours_that_became_zero(trained):
    card = (trained[0] / "run" / "README.md").read_text()
    assert "generates 8x8 RGBA images,\nclass-conditional" in card
    assert "It takes class labels 0 to 3 (mon, item, player, dngn)." in card
    assert "| data | 48 images of tiles, classes mon, item, player, dngn, split train, fingerprint `" in card
    assert "; colours of fully transparent pixels (alpha 0) were set to 0, in 36 images of the data set |" in card


def test_its_pictures_show_transparency_and_a_row_per_class(trained):
    folder, _ = trained
    pipeline = DDPMNotesPipeline.from_pretrained(folder / "run")
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % 4 for i in range(10)]
    generator = [torch.Generator().manual_seed(seed) for seed in range(10)]
    made = pipeline(10, class_labels=labels, num_inference_steps=2, generator=generator, output_type="np").images
    samples = (made * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    with PIL.Image.open(folder / "run" / "trajectory.gif") as animation:
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB"), int)
    grid = np.asarray(image_grid(samples[:8], 4, side=64), int)
    assert last.shape == grid.shape and np.abs(last - grid).mean() < 20  # a frame of a GIF has 256 colours
    for name in ("samples.png", "samples-6.png"):
        with PIL.Image.open(folder / "run" / name) as picture:
            pixels = np.asarray(picture.convert("RGB"), int)
        # 4 rows, of 3 columns at most, of images of 32 pixels with a gap of 4
        right = pixels[40:, pixels.shape[1] // 2 :]
        coloured = np.ptp(right, axis=2) > 30
        lines = np.flatnonzero(coloured.sum(1) > 60)
        assert (np.diff(lines) > 2).sum() == 3, name
        checks = [(pixels == level).all(-1).sum() for level in (204, 153)]
        assert min(checks) > 200, name  # squares below what is transparent in real images


def test_each_image_that_it_makes_is_a_file_with_alpha(trained, tmp_path):
    pipeline = DDPMNotesPipeline.from_pretrained(trained[0] / "run")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(class_labels=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    image.save(tmp_path / "one.png")
    with PIL.Image.open(tmp_path / "one.png") as stored:
        assert stored.mode == "RGBA" and stored.size == (8, 8)
        measured = pipeline.bits_per_dim(stored, class_labels=1, evaluations_per_image=4)
    assert measured.dims == 4 * 8 * 8 and np.isfinite(measured.total)


def test_an_evaluation_measures_the_held_out_images_of_the_classes(trained, train, tmp_path):
    folder, _ = trained
    network = save_network(tmp_path / "small-vit")
    flags = ["--model", "run", *FLAGS, *HELD_OUT, "--split", "held_out", "--evaluations_per_image", 4]
    flags += ["--metrics", "--metric_images", 12, "--num_inference_steps", 5, "--metric_network", network]
    result = train(*flags, script=EVALUATE, cwd=folder, timeout=300)
    written = json.loads((folder / "run" / "evaluation.json").read_text())
    _, _, held_out = held_out_images(folder)
    assert (written["images"], written["dims"], written["classes"]) == (12, 256, CLASSES)
    assert written["fingerprint"] == held_out.fingerprint
    assert "12 images of tiles, classes mon, item, player, dngn, split held_out, 256 dims" in result.stdout
    protocol = written["metrics"][-1]["protocol"]
    assert protocol["preprocessing"].startswith("RGBA composited on grey 128; whole image resized to 16x16")
    assert (protocol["classes"], protocol["image_shape"]) == (CLASSES, [4, 8, 8])
    with PIL.Image.open(folder / "run" / "bits_map.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    assert min((pixels == level).all(-1).sum() for level in (204, 153)) > 200
    card = (folder / "run" / "README.md").read_text()
    assert "12 images of tiles, classes mon, item, player, dngn, split held_out" in card and "bits_map.png" in card


@pytest.mark.parametrize("classes", [[], ["--classes", *sorted(CLASSES)]])
def test_an_evaluation_of_other_classes_is_refused_for_held_out_images(trained, train, classes):
    folder, _ = trained
    flags = ["--model", "run", *FLAGS[:4], *classes, "--image_mode", "RGBA", *HELD_OUT, "--split", "held_out"]
    result = train(*flags, script=EVALUATE, cwd=folder, expect=1)
    assert "and was ['mon', 'item', 'player', 'dngn'] in training; they must be equal" in error_lines(result)[-1]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_class_that_is_not_there_is_one_line(trained, train, tmp_path, streaming):
    flags = [*TINY[2:], *FLAGS[:4], "--classes", "mon", "dragon", *streaming, "--output_dir", tmp_path / "run"]
    line = error_lines(train(*flags, cwd=trained[0], expect=1))[-1]
    assert line.startswith("train.py: error: classes is ['mon', 'dragon']; it must hold classes of train_data_dir")
    assert line.endswith(": dngn, gui, item, misc, mon, player")


def test_a_stream_of_the_classes_trains(trained, train, tmp_path):
    flags = [*TINY[2:], *FLAGS, "--streaming", "--max_train_steps", 3, "--lr_warmup_steps", 0]
    result = train(*flags, "--output_dir", tmp_path / "run", cwd=trained[0])
    says = "a stream of images of 90 files of 4x8x8 from tiles, classes mon, item, player, dngn, "
    assert result.stdout.startswith(says)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "a stream of images of tiles, classes mon, item, player, dngn, split train" in card
    assert "colours of fully transparent pixels (alpha 0) were set to 0 |" in card
