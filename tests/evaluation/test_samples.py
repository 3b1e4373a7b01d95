"""Metrics of samples during a run are those of the saved model, and measuring changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.features import load_feature_network
from ddpm_notes_pipeline.evaluation.metrics import SampleComparison, measure_samples
from ddpm_notes_pipeline.evaluation.records import figures_of
from ddpm_notes_pipeline.evaluation.samples import mean_of
from tests.evaluation.test_evaluate import save_network
from tests.support.launching import TINY, error_lines, once

N = 12
VALIDATED = "--validation_split test --validation_steps 12 --max_validation_images 10".split()
# Not in the card's network once it is trained, so that measuring must turn it off, and on again.
DROPPING = ["--dropout", 0.1]


pytestmark = pytest.mark.filterwarnings("ignore:frechet_distance of")  # few images are enough here


def flags_of(folder: Path) -> list:
    network = save_network(folder.with_name(f"{folder.name}-small-vit"))
    return ["--metric_interval", 5, "--metric_images", N, "--metric_network", network, "--checkpointing_steps", 6]


@pytest.fixture(scope="module")
def measured(train):
    """A run of 12 steps whose samples are measured at 5, 10 and 12."""
    return once(
        "metrics",
        lambda folder: train(*TINY, *DROPPING, *VALIDATED, *flags_of(folder), "--seed", 3, "--output_dir", folder),
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_last_figures_are_those_of_the_saved_model(measured, tmp_path):
    """Samples of the averaged weights, image i from seed 3 + i, beside all training images."""
    folder, _ = measured
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 12]
    pipeline = DDPMNotesPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(N)]
    samples = pipeline(N, num_inference_steps=2, generator=generators, output_type="pt").images
    real, held_out = (load_images("digits", split=split, cache_dir=tmp_path) for split in ("train", "test"))
    held_out = held_out.take([i * len(held_out) // 10 for i in range(10)])
    network = str(folder.with_name(f"{folder.name}-small-vit"))
    images = (samples * 255).round().to(torch.uint8)
    truth = measure_samples(
        images, real, train=real, held_out=held_out, network=network, cache_dir=tmp_path, show_progress=False
    )
    assert set(rows[-1]) == {"step", *figures_of(truth)}
    for name, value in figures_of(truth).items():
        assert rows[-1][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_the_card_and_the_evaluation_have_them(measured):
    folder, _ = measured
    found = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert [row["images"] for row in found] == ["held-out test", "samples"]
    network = found[1]["protocol"]["network"]
    assert found[1][f"kernel_distance ({network})"] == read(folder / "metrics.jsonl")[-1]["kernel_distance"]
    assert found[1]["protocol"]["sampling"]["seeds"] == "3..14, one an image"
    assert f"{found[1][f'kernel_distance ({network})']:.5f} ±" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_measuring_changes_nothing_in_training_and_resumes(measured, train, tmp_path):
    """Killed after the row of step 10, the run goes on from step 6 and writes that row once."""
    flags = [*TINY, *DROPPING, *VALIDATED, *flags_of(tmp_path / "run"), "--seed", 3, "--output_dir", tmp_path / "run"]
    train(*flags, stop_at=11, expect=-9)
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [5, 10]
    train(*flags, "--resume_from_checkpoint", "latest")
    plain = tmp_path / "plain"
    train(*TINY, *DROPPING, "--seed", 3, "--output_dir", plain)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (measured[0] / "metrics.jsonl").read_bytes()
    for name in ("loss.jsonl", "unet/diffusion_pytorch_model.safetensors"):
        assert (plain / name).read_bytes() == (measured[0] / name).read_bytes(), name
    assert not (plain / "metrics.jsonl").exists()
    assert json.loads((plain / "unet" / "config.json").read_text())["dropout"] == 0.1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--metric_interval", 5], "--metric_interval is 5 with no --validation_split"),
        (["--metric_interval", 0, *VALIDATED], "--metric_interval is 0"),
        (["--metric_interval", 5, "--metric_images", 3, *VALIDATED], "--metric_images is 3; must be at least 8"),
        (["--metric_interval", 5, "--metric_network", "no/such", *VALIDATED], "no/such"),
    ],
)
def test_what_cannot_be_measured_is_said_before_training(train, tmp_path, flags, named):
    result = train(*TINY, *flags, "--output_dir", tmp_path / "run", expect=None)
    assert result.returncode != 0 and named in " ".join(error_lines(result))
    assert not (tmp_path / "run" / "loss.jsonl").exists()


def test_figures_of_several_sets_are_means_with_the_spread_of_the_sets():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    sets = [torch.randint(0, 200 + 10 * i, (20, 1, 8, 8), generator=generator, dtype=torch.uint8) for i in range(3)]
    network = load_feature_network(image_size=32)
    compared = SampleComparison(real, train=real, network=network, show_progress=False)
    results = [compared.measure(x) for x in sets]
    mean = mean_of(results)
    kernels = np.array([result.kernel_distance for result in results])
    assert mean.kernel_distance == pytest.approx(kernels.mean())
    assert mean.kernel_distance_standard_error == pytest.approx(kernels.std(ddof=1) / 3**0.5)
    assert mean.pixel_mean_error == pytest.approx(np.mean([result.pixel_mean_error for result in results]))
    assert mean.held_out_nearest_train_distance is None
    assert mean_of(results[:1]) is results[0]
