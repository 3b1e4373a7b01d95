"""Levels in training: fitted at validation and at the end, saved, dropped when training goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.core.levels import to_uint8
from ddpm_notes_pipeline.data import load_images
from tests.support.launching import DATA, SHORT, TINY

VALIDATED = ["--validation_split", "test", "--max_validation_images", 16]
FITS = [*TINY[:-1], *VALIDATED]


def levels(folder):
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return config["_ddpm_notes"]["levels"]


@pytest.fixture(scope="module")
def fitted(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels") / "run"
    return folder, train(*FITS, "--output_dir", folder)


def test_a_run_saves_the_levels_of_its_data_and_its_number_is_measured_with_them(fitted):
    folder, _ = fitted
    digits = load_images("digits", split="train")
    occurring = digits.take(range(len(digits))).unique().tolist()
    weights = levels(folder)["weights"][0]
    assert [k for k, weight in enumerate(weights) if weight > 0] == occurring
    pipeline = DDPMNotesPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = load_images("digits", split="test").at_most(16)
    pixels = images.take(range(16))
    total = json.loads((folder / "evaluation.json").read_text())["results"][0]["total"]
    assert pipeline.bits_per_dim(pixels).total == pytest.approx(total, rel=1e-6)
    pipeline.scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config, levels=None)
    assert pipeline.bits_per_dim(pixels).total > total + 0.5


def test_samples_of_a_trained_model_have_only_levels_that_occur(fitted):
    folder, _ = fitted
    pipeline = DDPMNotesPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(4, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    weights = levels(folder)["weights"][0]
    assert all(weights[k] > 0 for k in to_uint8(images).unique().tolist())


def test_without_levels_the_weights_are_the_same_and_the_bits_are_not(fitted, train, tmp_path):
    folder, _ = fitted
    train(*FITS, "--no_fit_levels", "--output_dir", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert "_ddpm_notes" not in config
    name = "unet/diffusion_pytorch_model.safetensors"
    ours, plain = (load_file(path / name) for path in (folder, tmp_path / "run"))
    assert all(torch.equal(ours[key], plain[key]) for key in ours)
    rows = [(path / "validation.jsonl").read_text().splitlines()[-1] for path in (folder, tmp_path / "run")]
    bits = [json.loads(row)["bits_per_dim"] for row in rows]
    assert bits[0] < bits[1] - 0.5


def test_levels_of_a_validation_on_the_way_are_not_those_of_the_finished_weights(fitted, train, tmp_path):
    train(*FITS, "--validation_steps", 4, "--output_dir", tmp_path / "run")
    assert levels(tmp_path / "run") == levels(fitted[0])


def test_levels_are_fitted_anew_when_training_goes_on(fitted, train, tmp_path):
    """From the published folder: the levels of the old weights are dropped, silently."""
    folder, _ = fitted
    source = ["--pretrained_model_name_or_path", folder]
    done = train(*DATA, *SHORT[:-1], *VALIDATED, *source, "--output_dir", tmp_path / "run")
    assert "dropped" not in done.stderr
    assert levels(tmp_path / "run")["decoder_blur"] != levels(folder)["decoder_blur"]


@pytest.mark.launch
@pytest.mark.slow
def test_two_processes_fit_the_same_levels(fitted, train, tmp_path):
    folder, _ = fitted
    train(*FITS, "--output_dir", tmp_path / "run", processes=2)
    one, two = levels(folder), levels(tmp_path / "run")
    assert one["weights"][0] == pytest.approx(two["weights"][0], rel=1e-3)
    for name in ("decoder_blur", "guess_blur"):
        assert list(one[name]) == list(two[name])
        assert list(one[name].values()) == pytest.approx(list(two[name].values()), rel=1e-2)
