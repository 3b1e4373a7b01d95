"""What a run shows while it trains: bits/dim, and a tracker that cannot stop or slow it."""

import importlib.util
import json
import socket
import sqlite3
from pathlib import Path

import pytest

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from tests.support.launching import TINY, error_lines, once

VALIDATED = "--validation_split test --validation_steps 5 --max_validation_images 21 --label_column label".split()
TRACKED = "--max_train_steps 4 --logging_steps 2 --sample_steps 2 --validation_split test --validation_steps 2 --max_validation_images 3"


SAID = ["1438", "Learned:", "Compare:", "Where:", "Load:", "Longer:", "Your"]


@pytest.fixture(scope="module")
def validated(train):
    """A class-conditional run of 12 steps, measured at 5, 10 and 12."""
    return once("validated", lambda folder: train(*TINY, *VALIDATED, "--output_dir", folder))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------- bits/dim


@pytest.mark.filterwarnings("ignore:alpha_bar at the path")
def test_the_last_bits_per_dim_are_those_of_the_saved_model(validated, tmp_path):
    """That is, of the averaged weights, on the images and labels of the split."""
    folder, result = validated
    found = read(folder / "validation.jsonl")
    assert [row["step"] for row in found] == [5, 10, 12]
    pipeline = DDPMNotesPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = load_images(
        "digits", split="test", label_column="label", max_samples=21, cache_dir=tmp_path, show_progress=False
    )
    pilot = {"pixel_values": images.at_most(16).take(range(16)), "class_labels": images.at_most(16).labels}
    truth = pipeline.bits_per_dim(images.take(range(21)), class_labels=images.labels, pilot_images=[pilot])
    row = found[-1]
    assert row["images"] == 21
    for name in ("prior", "diffusion", "decoder", "standard_error"):
        assert row[name] == pytest.approx(getattr(truth, name), rel=1e-5), name
    assert row["bits_per_dim"] == pytest.approx(truth.total, rel=1e-5)
    assert f"; {truth.total:.3f} ± {truth.standard_error:.3f} bits/dim on 21 images of 'test'; " in result.stdout


def test_validation_changes_nothing_in_training(validated, train, tmp_path):
    train(*TINY, "--label_column", "label", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "validation.jsonl").exists()
    for name in ("loss.jsonl", "unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (validated[0] / name).read_bytes(), name


def test_a_resumed_run_measures_what_the_straight_one_does(validated, train, tmp_path):
    """Killed after the row of step 10, it resumes from step 6 and writes that row once."""
    flags = [*TINY, *VALIDATED, "--checkpointing_steps", 6, "--output_dir", tmp_path / "run"]
    train(*flags, stop_at=11, expect=-9)
    assert [row["step"] for row in read(tmp_path / "run" / "validation.jsonl")] == [5, 10]
    train(*flags, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "run" / "validation.jsonl").read_bytes() == (validated[0] / "validation.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(train, validated):
    """21 images: one process has 10 and the other 11; both have labels of their own."""
    folder, _ = once("validated-2", lambda folder: train(*TINY, *VALIDATED, "--output_dir", folder, processes=2))
    for two, one in zip(*(read(path / "validation.jsonl") for path in (folder, validated[0])), strict=True):
        assert two == pytest.approx(one, rel=2e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--validation_split validation", "'validation' is not in 'digits'; it has: train, test"),
        ("--validation_split test --max_validation_images 0", "--max_validation_images is 0"),
        ("--validation_split test --validation_steps 0", "--validation_steps is 0"),
    ],
)
def test_a_split_that_cannot_be_measured_is_one_line(train, tmp_path, flags, named):
    result = train(*TINY, *flags.split(), "--output_dir", tmp_path / "run", expect=None)
    assert result.returncode and named in error_lines(result)[0]


# -------------------------------------------------------------------- trackers


def tracked_rows(home: Path) -> tuple[list[tuple[int, dict]], dict]:
    """(step, values) of all rows in trackio's database, and the run's configuration."""
    with sqlite3.connect(home / "ddpm_notes_pipeline.db") as base:
        found = base.execute("select step, metrics from metrics where run_name = 'run' order by id").fetchall()
        (config,) = base.execute("select config from configs where run_name = 'run'").fetchone()
    return [(step, json.loads(values)) for step, values in found], json.loads(config)


def test_trackio_is_used_if_installed_and_has_the_figures_of_the_files(train, tmp_path):
    flags = [*TINY, *TRACKED.split(), "--report_to", "auto", "--output_dir", tmp_path / "run"]
    result = train(*flags, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    # and nothing of trackio's own
    assert [line.split()[0] for line in result.stdout.splitlines()] == SAID
    found, config = tracked_rows(tmp_path / "trackio")
    assert config["max_train_steps"] == "4" and config["dataset_name"] == "digits"
    for row in read(tmp_path / "run" / "loss.jsonl")[1::2]:
        (logged,) = [values for step, values in found if step == row["step"] and "loss" in values]
        assert logged.pop("images_per_second") > 0
        assert logged | {"step": row["step"]} == pytest.approx(row)
    for row in read(tmp_path / "run" / "validation.jsonl"):
        (logged,) = [v for step, v in found if step == row["step"] and "validation_bits_per_dim" in v]
        assert logged["validation_bits_per_dim"] == pytest.approx(row["bits_per_dim"])
        assert logged["validation_standard_error"] == pytest.approx(row["standard_error"])
    pictures = [(step, values["samples"]) for step, values in found if "samples" in values]
    assert [step for step, _ in pictures] == [2, 4]
    for _, picture in pictures:
        assert (tmp_path / "trackio" / "media" / picture["file_path"]).exists()


def test_a_resumed_run_continues_the_trackers_run(train, tmp_path):
    flags = [*TINY, "--report_to", "trackio", "--logging_steps", 2, "--output_dir", tmp_path / "run"]
    home = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    train(*flags, "--max_train_steps", 4, env=home)
    train(*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest", env=home)
    with sqlite3.connect(tmp_path / "trackio" / "ddpm_notes_pipeline.db") as base:
        found = base.execute("select run_id, step, metrics from metrics order by id").fetchall()
    assert len({run for run, *_ in found}) == 1
    assert [step for _, step, values in found if "loss" in json.loads(values)] == [2, 4, 6]


def test_a_tracker_that_fails_does_not_stop_the_run(train, tmp_path):
    flags = [*TINY, *TRACKED.split(), "--report_to", "trackio", "--output_dir", tmp_path / "run"]
    train(*flags, env={"TRACKIO_DIR": "/proc/nowhere"})
    assert len(read(tmp_path / "run" / "loss.jsonl")) == 4 and (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.slow
def test_a_hub_that_never_answers_does_not_delay_the_run(launch, tmp_path):
    """trackio asks the Hub who the user is, without a timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
        flags = [*TINY, "--report_to", "trackio", "--max_train_steps", 4, "--output_dir", tmp_path / "run"]
        result = launch(*flags, env=env | {"TRACKIO_DIR": str(tmp_path / "trackio")}, timeout=100)
    assert "trackio has not started after 10 s; training continues without waiting" in result.stderr
    assert (tmp_path / "run" / "model_index.json").exists()


def test_tensorboard_has_numbers_and_pictures(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*TINY, *TRACKED.split(), "--report_to", "tensorboard", "--output_dir", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "ddpm_notes_pipeline"))
    events.Reload()
    for name, file in (("loss", "loss"), ("learning_rate", "loss"), ("validation_bits_per_dim", "validation")):
        rows = [row for row in read(tmp_path / "run" / f"{file}.jsonl") if row["step"] % 2 == 0]
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        truth = [(row["step"], row[name.removeprefix("validation_")]) for row in rows]
        assert logged == [(step, pytest.approx(value)) for step, value in truth]
    assert [(image.step, image.height > 32) for image in events.Images("samples")] == [(2, True), (4, True)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_one_line_before_training(train, tmp_path):
    result = train(*TINY, "--report_to", "wandb", "--output_dir", tmp_path / "run", expect=1)
    (line,) = error_lines(result)
    assert line == "train.py: error: --report_to is wandb, which is not installed: pip install wandb, or 'none'"
    assert not (tmp_path / "run").exists()
