"""training/train.py as users run it: what it leaves, what changes its result, what it refuses.

Two launches serve many tests (`launching.once`), since most of their time is imports. The other
runs are forked.
"""

import dataclasses
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.data.batches import StepBatches
from ddpm_notes_pipeline.evaluation.pictures import image_grid
from ddpm_notes_pipeline.objectives import TimestepSampler
from ddpm_notes_pipeline.training.images import check_validation
from ddpm_notes_pipeline.training.parser import parse_arguments
from tests.support.comparing import assert_close, assert_same, assert_same_checkpoint, losses, rows, weights
from tests.support.launching import (
    DATA,
    ROOT,
    SHORT,
    TINY,
    TRAIN,
    Trainer,
    describe,
    environment_of_runs,
    error_lines,
    free_port,
    once,
)

STEPS, WARMUP, PEAK, BATCH = 12, 4, 1e-4, 8  # of TINY


@pytest.fixture(scope="module")
def straight(launch):
    """Folder and output of 12 steps in one process, started by accelerate launch."""
    return once("straight", lambda folder: launch(*TINY, "--output_dir", folder, "--checkpointing_steps", 6))


@pytest.fixture(scope="module")
def two_processes():
    """The same in two real processes, started by the launch file for CPUs."""

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        file = ROOT / "training" / "launch" / "two_cpu_processes.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
        command += [
            "--main_process_port",
            free_port(),
            TRAIN,
            *TINY,
            "--output_dir",
            folder,
            "--checkpointing_steps",
            6,
        ]
        env = environment_of_runs(ACCELERATE_USE_CPU="true")
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return once("two_processes", run)


def unet_config(folder: Path) -> dict:
    return json.loads((folder / "unet" / "config.json").read_text())


def pngs(folder: Path, mode: str, count: int = 9, height: int = 16, width: int = 24) -> Path:
    """A folder of noise images in two classes."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (height, width) if mode == "L" else (height, width, 3)
        PIL.Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


# -------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_the_folder_of_a_model(straight):
    folder, _ = straight
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json",
        "pipeline.py",
        "unet",
        "scheduler",
        "samples.png",
        "trajectory.gif",
        "loss.png",
        "loss.jsonl",
        "training_config.yaml",
        "training_run.json",
        "README.md",
        "checkpoint-6",
        "checkpoint-12",
    }
    for step in (6, 12):
        manifest = json.loads((folder / f"checkpoint-{step}" / "manifest.json").read_text())
        assert manifest["step"] == step
        on_disk = {path.name: path.stat().st_size for path in (folder / f"checkpoint-{step}").iterdir()}
        del on_disk["manifest.json"]
        assert {name: listed["size"] for name, listed in manifest["files"].items()} == on_disk
    for name in ("samples.png", "loss.png"):
        assert min(PIL.Image.open(folder / name).size) > 200


def test_the_animation_ends_with_the_samples(straight):
    folder, _ = straight
    pipeline = DDPMNotesPipeline.from_pretrained(folder)
    generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
    made = pipeline(batch_size=3, num_inference_steps=2, generator=generator, output_type="np").images
    with PIL.Image.open(folder / "trajectory.gif") as animation:
        assert animation.n_frames == 2
        animation.seek(1)
        last = np.asarray(animation.convert("L"), int)
    expected = np.asarray(image_grid((made * 255).round().astype(np.uint8).transpose(0, 3, 1, 2), 3, side=64), int)
    assert last.shape == expected.shape and np.abs(last - expected).max() <= 1


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDPMNotesPipeline])
def test_the_saved_model_is_the_average_and_loads_here_and_in_stock_diffusers(straight, pipeline_class):
    folder, _ = straight
    pipeline = pipeline_class.from_pretrained(folder)
    assert len(pipeline.scheduler.betas) == 100
    averages = load_file(folder / "checkpoint-12" / "ema.safetensors")
    for parameter, name in zip(pipeline.unet.parameters(), sorted(averages), strict=True):
        assert torch.equal(parameter, averages[name])


def test_every_step_leaves_one_finite_row(straight):
    found = rows(straight[0])
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row in found:
        assert row.keys() == {"step", "loss", "grad_norm", "learning_rate"}
        assert all(map(math.isfinite, row.values())) and row["loss"] > 0 and row["grad_norm"] > 0


def test_training_config_reads_back_to_the_settings_of_the_run(straight):
    folder, _ = straight
    flags = [*TINY, "--output_dir", str(folder), "--checkpointing_steps", "6"]
    again = ["--config", str(folder / "training_config.yaml"), "--output_dir", str(folder)]
    read, given = parse_arguments(again), parse_arguments(flags)
    fingerprint = json.loads((folder / "training_run.json").read_text())["fingerprint"]
    assert read == (dataclasses.replace(given[0], data_fingerprint=fingerprint), *given[1:])


def test_summary_is_five_lines_that_a_user_can_act_on(straight, train, tmp_path):
    folder, result = straight
    lines = result.stdout.splitlines()[-5:]
    assert [line.split(":")[0] for line in lines] == ["Learned", "Where", "Load", "Longer", "Your own"]
    learned, where, load, *_ = lines
    mean = losses(folder)[-1]  # of the last twentieth: one step
    assert f"12 steps on 1438 images, simple loss {mean:.4f} over the last 1 steps" in learned
    for name in re.findall(r"[\w.-]+(?:\.png|\.jsonl|/)(?=[ ,.])", where.partition(" holds ")[2]):
        assert (folder / name).exists(), name
    program, _, code = shlex.split(load.removeprefix("Load:"))
    assert program == "python"
    train(code, script="-c", cwd=tmp_path)
    image = PIL.Image.open(tmp_path / "one.png")
    assert image.size == (8, 8) and image.mode == "L"


def run_as_printed(train: Trainer, result: object, name: str, *more: object, **replacements: str) -> object:
    """Run the command that the summary prints after `name`, as a user would paste it.

    `more` flags are appended.
    """
    line = next(line for line in result.stdout.splitlines() if line.startswith(name))
    for placeholder, value in replacements.items():
        line = line.replace(placeholder, value)
    program, script, *flags = shlex.split(line.removeprefix(f"{name}:"))
    assert program == "python" and (ROOT / script) == TRAIN
    return train(*flags, *more)


@pytest.mark.parametrize("given", ["flags", "a file and flags"])
def test_the_longer_line_continues_the_run_that_printed_it(train, tmp_path, given):
    flags = [*TINY, "--max_train_steps", 4, "--overwrite_output_dir"]
    if given == "a file and flags":  # the file holds all but the network
        config = {"dataset_name": "digits", "max_train_steps": 4, "train_batch_size": 8, "lr_warmup_steps": 4}
        config |= {"num_samples": 3, "ddpm_num_steps": 100, "ddpm_num_inference_steps": 2}
        (tmp_path / "file.yaml").write_text(json.dumps(config))
        flags = [f"--config={tmp_path / 'file.yaml'}", "--block_out_channels", 32, 32, "--layers_per_block", 1]
    longer = run_as_printed(train, train(*flags, "--output_dir", tmp_path / "a run"), "Longer")
    assert "steps 4 to 8 of 8 images" in longer.stdout
    assert [row["step"] for row in rows(tmp_path / "a run")] == list(range(1, 9))
    assert "8 steps" in longer.stdout.splitlines()[-5]


def test_the_first_line_gives_the_batch_overall_per_process_and_per_accumulation_step(straight, train, tmp_path):
    _, one = straight
    assert "1438 images of 1x8x8 from digits" in one.stdout
    assert "12 of 8 images in all, 8 per process in 1 accumulation step(s) of 8, on 1 process(es)" in one.stdout
    parts = train(*TINY, "--max_train_steps", 4, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "run")
    assert "4 of 8 images in all, 8 per process in 4 accumulation step(s) of 2, on 1 process(es)" in parts.stdout


def test_a_run_that_holds_nothing_out_says_so(straight):
    assert "nothing was held out (--validation_share 0.04 measures" in straight[1].stdout


def test_a_held_out_share_is_measured_and_never_trained_on(train, tmp_path):
    """evaluate.py finds the same images again, from the settings that training wrote."""
    done = train(*TINY, "--validation_share", 0.05, "--seed", 3, "--output_dir", tmp_path / "run")
    assert "1366 images of 1x8x8 from digits" in done.stdout  # 0.05 of 1438 are 72
    assert "1x8x8 from digits, bits/dim on 72 images of 'held_out', " in done.stdout
    assert re.search(r"^Learned: .* ± .* bits/dim on 72 images of 'held_out'", done.stdout, re.MULTILINE)
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (measured["split"], measured["images"]) == ("held_out", 72)
    run = json.loads((tmp_path / "run" / "training_run.json").read_text())
    assert run["images"] == 1366 and run["fingerprint"] != measured["fingerprint"]
    assert "72 images of digits, split held_out" in (tmp_path / "run" / "README.md").read_text()
    again = ["--config", tmp_path / "run" / "training_config.yaml", "--model", tmp_path / "run"]
    again += ["--split", "held_out", "--results_dir", tmp_path / "results"]
    train(*again, script=TRAIN.with_name("evaluate.py"))
    found = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert found["fingerprint"] == measured["fingerprint"]
    assert found["results"][0]["total"] == pytest.approx(measured["results"][0]["total"], rel=1e-9)


def test_a_shortened_recipe_reports_its_shortened_warm_up(train, tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: digits\nmax_train_steps: 500\nlr_warmup_steps: 100\n")
    flags = [flag for flag in TINY if flag not in ("--lr_warmup_steps", "4", "--dataset_name", "digits")]
    done = train("--config", tmp_path / "recipe.yaml", *flags, "--output_dir", tmp_path / "run")
    assert "warm-up: 1 steps instead of 100, since training ends after 12" in done.stdout


# -------------------------------------------------------------------- the same images again


def set_of_squares(path: Path, level: int) -> Path:
    """A folder that `datasets` reads: 40 grayscale 8x8 images in parquet."""
    rng = np.random.default_rng(level)
    images = [PIL.Image.fromarray(rng.integers(0, level, (8, 8), dtype=np.uint8)) for _ in range(40)]
    path.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(path / "train.parquet")
    return path


def test_a_local_set_called_mnist_does_not_come_back_as_the_embedded_one(train, tmp_path):
    flags = [flag for flag in TINY if flag not in ("--dataset_name", "digits")]
    folder = set_of_squares(tmp_path / "data" / "mnist", 200)
    train(*flags, "--dataset_name", folder, "--output_dir", tmp_path / "run")
    config = tmp_path / "run" / "training_config.yaml"
    assert "dataset_name: ./mnist\n" in config.read_text() and str(tmp_path) not in config.read_text()
    again = ["--config", config, "--max_train_steps", 2, "--output_dir", tmp_path / "again"]
    (line,) = error_lines(train(*again, cwd=tmp_path, expect=1))
    assert "data set './mnist' is not a folder" in line
    train(*again, cwd=folder.parent)  # where the folder is


def test_other_images_under_the_name_of_the_trained_ones_are_refused(train, tmp_path):
    flags = [flag for flag in TINY if flag not in ("--dataset_name", "digits")]
    train(*flags, "--dataset_name", set_of_squares(tmp_path / "a" / "mine", 200), "--output_dir", tmp_path / "run")
    set_of_squares(tmp_path / "b" / "mine", 100)
    again = ["--config", tmp_path / "run" / "training_config.yaml", "--output_dir", tmp_path / "again"]
    (line,) = error_lines(train(*again, cwd=tmp_path / "b", expect=1))
    trained_on = json.loads((tmp_path / "run" / "training_run.json").read_text())["fingerprint"]
    assert f"images of the fingerprint {trained_on} and mine (split train) has " in line
    # named on the command line, they are meant
    train(*again, "--dataset_name", "./mine", cwd=tmp_path / "b")


def test_classes_in_which_two_sets_differ_are_named(train, tmp_path):
    for split, classes in (("train", ("cat", "dog")), ("test", ("cat", "rat"))):
        for name in classes:
            pngs(tmp_path / "data" / split / name, "L")
    # One folder would have the classes of both splits; two folders are two sets.
    (tmp_path / "data" / "test").rename(tmp_path / "test")
    images, other = (
        load_images(train_data_dir=folder, label_column="label", cache_dir=tmp_path / "cache", show_progress=False)
        for folder in (tmp_path / "data" / "train", tmp_path / "test")
    )
    with pytest.raises(ValueError, match="must have the same classes; they differ in dog, rat"):
        check_validation(images, other, num_processes=1)


# -------------------------------------------------------------------- how a run ends


def test_a_non_finite_loss_in_the_last_steps_leaves_card_and_samples(train, tmp_path):
    """Only the last update is skipped; the run is worth as much as before."""
    poison = tmp_path / "poison.py"
    poison.write_text(
        "import runpy, sys\n"
        "import ddpm_notes_pipeline.objectives as objectives\n"
        "original, calls = objectives.Objective.__call__, []\n"
        "def call(self, *args, **kwargs):\n"
        "    calls.append(1)\n"
        "    loss = original(self, *args, **kwargs)\n"
        "    return loss * float('nan') if len(calls) == 12 else loss\n"
        "objectives.Objective.__call__ = call\n"
        f"sys.argv[0] = {str(TRAIN)!r}\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    done = train(*TINY, "--output_dir", tmp_path / "run", script=poison)
    assert json.loads((tmp_path / "run" / "training_run.json").read_text())["loss"] is None
    assert "no loss of the last steps is finite" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "samples.png").exists() and "skipped, not finite: 1" in done.stdout


@pytest.mark.parametrize("moment", ["save_evaluation", "write_card"])
def test_a_run_killed_after_its_last_checkpoint_writes_evaluation_json_when_resumed(train, tmp_path, moment):
    held_out = ["--validation_split", "test", "--max_validation_images", 8, "--output_dir"]
    straight = tmp_path / "straight"
    train(*TINY, *held_out, straight)
    train(
        *TINY,
        *held_out,
        tmp_path / "run",
        stop_at=(f"ddpm_notes_pipeline.training.run:{moment}", 1),
        expect=-signal.SIGKILL,
    )
    assert (tmp_path / "run" / "checkpoint-12").exists() and not (tmp_path / "run" / "samples.png").exists()
    train(*TINY, *held_out, tmp_path / "run", "--resume_from_checkpoint", "latest")
    found, expected = (json.loads((path / "evaluation.json").read_text()) for path in (tmp_path / "run", straight))
    assert found["results"] == expected["results"] and found["weights"] == expected["weights"]
    rows_of = [(path / "validation.jsonl").read_text() for path in (tmp_path / "run", straight)]
    assert rows_of[0] == rows_of[1]  # measured twice, written once


def test_the_your_own_line_trains_on_a_folder_of_images(train, tmp_path):
    first = train(*TINY, "--max_train_steps", 4, "--output_dir", tmp_path / "run")
    folder = pngs(tmp_path / "pngs", "RGB")
    own = run_as_printed(
        train,
        first,
        "Your own",
        *TINY[2:],
        "--max_train_steps",
        4,
        FOLDER_OF_IMAGES=str(folder),
        **{"outputs/mine": str(tmp_path / "mine")},
    )
    assert own.stdout.startswith("9 images of 9 files of 3x32x32")
    assert (tmp_path / "mine" / "model_index.json").exists()


def closed_form(n: int, peak: float = PEAK, warmup: int = WARMUP, steps: int = STEPS) -> float:
    """Linear warm-up to the peak at step `warmup`, then half a cosine to 0 at step `steps`.

    n counts from 0.
    """
    return peak * (n / warmup if n < warmup else (1 + math.cos(math.pi * (n - warmup) / (steps - warmup))) / 2)


def test_learning_rate_is_the_closed_form_at_every_step(straight):
    rates = [row["learning_rate"] for row in rows(straight[0])]
    assert rates == pytest.approx([closed_form(n) for n in range(STEPS)], rel=1e-12, abs=1e-18)


# -------------------------------------------------------------------- what changes nothing


@pytest.mark.slow
def test_two_processes_are_two_and_learn_what_one_does(straight, two_processes):
    (one, of_one), (two, of_two) = straight, two_processes
    assert "on 1 process(es) of cpu" in of_one.stdout
    assert "12 of 8 images in all, 4 per process in 1 accumulation step(s) of 4, on 2 process(es)" in of_two.stdout
    assert "on 2 process(es) of cpu" in of_two.stdout and of_two.stdout.count("Learned:") == 1
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for name in ("learning_rate", "step"):
        assert [row[name] for row in rows(two)] == [row[name] for row in rows(one)]
    assert [row["grad_norm"] for row in rows(two)] == pytest.approx([row["grad_norm"] for row in rows(one)], rel=1e-5)
    assert_close(weights(two), weights(one), atol=1e-5)
    for name in ("model.safetensors", "ema.safetensors"):
        assert_close(load_file(two / "checkpoint-12" / name), load_file(one / "checkpoint-12" / name), atol=1e-5)


@pytest.mark.slow
def test_three_samples_on_two_processes_are_those_of_one_in_their_order(straight, two_processes):
    one, two = (np.asarray(PIL.Image.open(folder / "samples.png"), float) for folder in (straight[0], two_processes[0]))
    assert np.abs(one - two).mean() < 0.5  # of 255; exchanged samples differ by tens


def test_accumulation_changes_no_result(straight, train, tmp_path):
    train(*TINY, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), rel=1e-5)
    assert [row["learning_rate"] for row in rows(tmp_path / "run")] == [r["learning_rate"] for r in rows(straight[0])]
    norms = [[row["grad_norm"] for row in rows(folder)] for folder in (tmp_path / "run", straight[0])]
    # clipping hides a wrong scale from the weights
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert_close(weights(tmp_path / "run"), weights(straight[0]), atol=1e-5)


def test_logging_and_sampling_change_nothing(straight, train, tmp_path):
    """Sample grids, rarer logs, more checkpoints, workers, a tracker: the same run bit for bit."""
    flags = "--sample_steps 5 --logging_steps 7 --checkpointing_steps 2 --checkpoints_total_limit 2"
    folder = tmp_path / "run"
    tracker = ["--dataloader_num_workers", 2, "--report_to", "tensorboard"]
    train(*TINY, *flags.split(), *tracker, "--eval_batch_size", 2, "--output_dir", folder)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (straight[0] / name).read_bytes()
    assert (folder / "loss.jsonl").read_bytes() == (straight[0] / "loss.jsonl").read_bytes()
    assert_same_checkpoint(folder / "checkpoint-12", straight[0] / "checkpoint-12")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    assert sorted(path.name for path in folder.glob("samples*")) == ["samples-10.png", "samples-5.png", "samples.png"]
    assert list(folder.rglob("events.out.tfevents.*"))


def test_another_seed_is_another_run(straight, train, tmp_path):
    train(*TINY, "--seed", 1, "--max_train_steps", 4, "--output_dir", tmp_path / "run")
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses(tmp_path / "run"), losses(straight[0]), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "flags"),
    [
        (2, "--timestep_sampling stratified --random_flip"),
        (1, "--timestep_sampling loss_second_moment --objective vlb --variance_type learned_range --ddpm_num_steps 4"),
    ],
)
def test_two_accumulating_processes_learn_what_one_does(train, launch, tmp_path, machines, flags):
    """On two machines too, and where t depends on the position in the batch or on all losses."""
    flags = [*TINY, *flags.split(), "--label_column", "label", "--output_dir"]
    train(*flags, tmp_path / "one")
    flags += [tmp_path / "two", "--gradient_accumulation_steps", 4]
    result = launch(*flags, processes=2, machines=2) if machines == 2 else train(*flags, processes=2)
    assert "on 2 process(es) of cpu" in result.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rates = [row["learning_rate"] for row in rows(tmp_path / "two")]
    assert rates == pytest.approx([closed_form(n) for n in range(STEPS)], rel=1e-12, abs=1e-18)
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), atol=1e-5)


SEEN = """
import runpy, sys
import torch
from ddpm_notes_pipeline.objectives import Objective
seen = []
def call(self, network, x_0, noise, t, labels=None, original=Objective.__call__):
    output = lambda *args, **kwargs: (seen[-1].append(result := network(*args, **kwargs)[0]), (result,))[1]
    seen.append([x_0, noise, t, self.scheduler.add_noise(x_0, noise, t), self._target(x_0, noise, t)])
    return original(self, output, x_0, noise, t, labels)
Objective.__call__ = call
try:
    runpy.run_path({train!r}, run_name="__main__")
finally:
    torch.save([[value.detach() for value in call] for call in seen], {path!r})
"""


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_bf16_sees_the_noise_and_the_targets_of_float32_bit_for_bit(train, tmp_path, prediction_type):
    """bf16 could not resolve the noise at hundreds of timesteps. The network does compute in it."""
    seen = {}
    for precision in ("no", "bf16"):
        path, driver = tmp_path / f"{precision}.pt", tmp_path / f"{precision}.py"
        driver.write_text(SEEN.format(train=str(TRAIN), path=str(path)))
        flags = ["--max_train_steps", 5, "--mixed_precision", precision, "--prediction_type", prediction_type]
        train(*TINY, *flags, "--output_dir", tmp_path / precision, script=driver)
        seen[precision] = torch.load(path)
    assert len(seen["no"]) == len(seen["bf16"]) == 5
    for exact, half in zip(seen["no"], seen["bf16"], strict=True):
        assert_same(half[:5], exact[:5])
        assert {value.dtype for value in half[:5]} == {torch.float32, torch.int64}
        assert not torch.equal(half[4], half[4].bfloat16().float())
        assert 1e-4 < float((half[5] - exact[5]).abs().max()) < 0.2, "the network did not compute in bf16"


# -------------------------------------------------------------------- an independent loop


def stock_folder(
    path: Path, num_train_timesteps: int = 100, num_class_embeds: int | None = None, **scheduler: object
) -> UNet2DModel:
    """A DDPM as stock diffusers saves one."""
    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        num_class_embeds=num_class_embeds,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=num_train_timesteps, **scheduler)).save_pretrained(path)
    return unet


OTHER_SETTINGS = (
    "--loss_weighting min_snr --snr_gamma 2 --lr_scheduler constant_with_warmup --adam_beta1 0.9 --adam_beta2 0.99"
)


@pytest.mark.parametrize(
    ("sampling", "timesteps", "other"),
    [("uniform", 100, False), ("loss_second_moment", 3, False), ("stratified", 100, True)],
)
def test_fine_tuning_a_stock_ddpm_is_algorithm_1_written_out(train, tmp_path, sampling, timesteps, other):
    """The paper's loop in plain torch, with stock noise: same losses, weights and average.

    And the same with min-SNR weights, stratified timesteps, a constant rate, other betas of Adam.
    """
    unet = stock_folder(tmp_path / "stock", num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2")
    flags = f"--timestep_sampling {sampling} --max_train_steps 10 --learning_rate 1e-3 --lr_warmup_steps 2 --adam_weight_decay 0.1 --max_grad_norm 0.5 {OTHER_SETTINGS if other else ''}"
    flags += " --ema_inv_gamma 2 --ema_power 0.5 --ema_max_decay 0.6 --random_flip"
    source = ["--pretrained_model_name_or_path", tmp_path / "stock"]
    train(*DATA, *SHORT, *flags.split(), *source, "--output_dir", tmp_path / "run")

    scheduler = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2")
    sampler = TimestepSampler(timesteps, sampling)
    parameters = list(unet.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    betas = (0.9, 0.99) if other else (0.95, 0.999)
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=0.1, eps=1e-5, foreach=False)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    expected = []
    images = load_images("digits", cache_dir=tmp_path, show_progress=False)
    for n, batch in zip(range(10), StepBatches(images, BATCH, seed=0, random_flip=True), strict=False):
        x_0, noise = batch["pixel_values"] / 127.5 - 1, batch["noise"]
        if sampling == "uniform":
            t, weight = (batch["u"] * 100).long(), torch.ones(BATCH)
        elif sampling == "stratified":  # one in each eighth of the timesteps
            t, weight = ((torch.arange(BATCH) + batch["u"]) * timesteps / BATCH).long(), torch.ones(BATCH)
        else:
            t, weight = sampler.sample(batch["u"], torch.arange(BATCH), BATCH)
        errors = (unet(scheduler.add_noise(x_0, noise, t), t).sample - noise).square().mean((1, 2, 3))
        sampler.update(t, errors.detach())
        if other:  # gamma = 2, in terms of eps (Hang et al. 2023, eq. 8)
            errors = errors * (2 / snr[t]).clamp(max=1)
        loss = (errors * weight.float()).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        rate = closed_form(n, peak=1e-3, warmup=2, steps=10)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, n / 2) if other else rate
        optimizer.step()
        decay = min(0.6, 1 - (1 + n / 2) ** -0.5)
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, parameters, strict=True)]
        expected.append((loss.item(), norm.item()))

    assert (sampling != "loss_second_moment") == (weight == 1).all(), (
        "the test has no step at which t is drawn unevenly"
    )
    assert [(row["loss"], row["grad_norm"]) for row in rows(tmp_path / "run")] == [
        pytest.approx(pair, rel=1e-4) for pair in expected
    ]
    trained = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors")
    assert_close(trained, dict(unet.state_dict()), atol=1e-5)
    names = [name for name, _ in unet.named_parameters()]
    assert_close(weights(tmp_path / "run"), dict(zip(names, average, strict=True)), atol=1e-5)
    saved = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["beta_schedule"] == "squaredcos_cap_v2" and saved["num_train_timesteps"] == timesteps


def test_fine_tuning_with_a_tiny_learning_rate_keeps_the_given_weights(train, tmp_path):
    unet = stock_folder(tmp_path / "stock")
    source = ["--pretrained_model_name_or_path", tmp_path / "stock", "--learning_rate", 1e-9]
    train(*DATA, *SHORT, *source, "--max_train_steps", 4, "--output_dir", tmp_path / "run")
    assert_close(weights(tmp_path / "run"), dict(unet.state_dict()), atol=1e-7)


def test_fine_tuning_at_another_size_samples_at_that_size(train, tmp_path):
    stock_folder(tmp_path / "stock")
    source = ["--pretrained_model_name_or_path", tmp_path / "stock", "--train_data_dir", pngs(tmp_path / "pngs", "L")]
    train(*SHORT, *source, "--max_train_steps", 4, "--output_dir", tmp_path / "run")
    assert unet_config(tmp_path / "run")["sample_size"] == [16, 24]


@pytest.mark.slow
def test_two_processes_warn_once(train, tmp_path):
    """Of a bad image, and of variances that were measured on the given network."""
    unet = stock_folder(tmp_path / "stock")
    scheduler = DDPMNotesScheduler(num_train_timesteps=100, decoder_variance=0.01)
    DDPMNotesPipeline(unet, scheduler).save_pretrained(tmp_path / "measured")
    (pngs(tmp_path / "pngs", "L", height=8, width=8) / "cat" / "0.png").write_bytes(b"cut short")
    flags = ["--train_data_dir", tmp_path / "pngs", "--on_bad_image", "skip", "--validation_share", 0.3]
    flags += ["--pretrained_model_name_or_path", tmp_path / "measured", "--max_train_steps", 2, "--lr_warmup_steps", 0]
    result = train(*SHORT, *flags, "--output_dir", tmp_path / "run", processes=2)
    warned = [line.rpartition("\r")[2] for line in result.stderr.splitlines() if "warning: " in line]
    assert len(warned) == len(set(warned)) >= 2, warned
    for text in ("left out 1 of 9 images", "measured on the repository's network"):
        assert sum(text in line for line in warned) == 1, warned


def test_another_number_of_channels_than_the_given_model_is_refused(train, tmp_path):
    stock_folder(tmp_path / "stock")
    source = ["--pretrained_model_name_or_path", tmp_path / "stock", "--image_mode", "RGB"]
    result = train(*DATA, *SHORT, *source, "--output_dir", tmp_path / "run", expect=1)
    assert "1 channels and the images have 3" in error_lines(result)[-1]


@pytest.mark.parametrize("embeddings", [10, None, 5])
def test_labels_need_an_embedding_each_in_the_given_model(train, tmp_path, embeddings):
    """A stock class-conditional model has no embedding for "no label", which is fine.

    Too few embeddings, or none, are refused in one line.
    """
    stock_folder(tmp_path / "stock", num_class_embeds=embeddings)
    source = ["--pretrained_model_name_or_path", tmp_path / "stock", "--label_column", "label", "--max_train_steps", 4]
    result = train(*DATA, *SHORT, *source, "--output_dir", tmp_path / "run", expect=0 if embeddings == 10 else None)
    if embeddings == 10:
        assert unet_config(tmp_path / "run")["num_class_embeds"] == 10
        assert DDPMNotesPipeline.from_pretrained(tmp_path / "run").null_label is None
    else:
        assert result.returncode == 1
        assert error_lines(result)[-1].startswith("train.py: error: ") and "Traceback" not in result.stderr


def test_images_without_labels_are_refused_for_a_class_conditional_model(train, tmp_path):
    stock_folder(tmp_path / "stock", num_class_embeds=10)
    source = ["--pretrained_model_name_or_path", tmp_path / "stock"]
    result = train(*DATA, *SHORT, *source, "--output_dir", tmp_path / "run", expect=1)
    assert error_lines(result)[-1].startswith("train.py: error: ") and "Traceback" not in result.stderr


def test_the_smallest_network_depends_on_t(train, tmp_path):
    """One group per channel would normalize away the time embedding, one number per channel."""
    train(*TINY, "--learning_rate", 1e-9, "--max_train_steps", 4, "--output_dir", tmp_path / "run")
    unet = DDPMNotesPipeline.from_pretrained(tmp_path / "run").unet
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (unet(x, 10).sample - unet(x, 90).sample).abs().max() > 1e-3


# -------------------------------------------------------------------- resuming after a stop

# The second has all that has a history (timestep sampler, dropout) or may mishandle one.
RUNS = {
    "plain": [],
    "with_history": (
        "--objective vlb --variance_type learned_range --timestep_sampling loss_second_moment --ddpm_num_steps 4 "
        "--dropout 0.1 --random_flip --gradient_accumulation_steps 2 --label_column label"
    ).split(),
}


@pytest.fixture(scope="module", params=RUNS)
def stopped(request, train):
    """A run straight to step 12, and one killed and resumed from checkpoint-6.

    Losses are written every 10 steps: when the run is killed, those of step 6, or of 7 to 10,
    may not be written.
    """
    stop_at = 7 if request.param == "plain" else 11
    flags = [*TINY, *RUNS[request.param], "--checkpointing_steps", 6, "--output_dir"]

    def resume(folder: Path):
        train(*flags, folder, stop_at=stop_at, expect=-9)
        assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-6"]
        result = train(*flags, folder, "--resume_from_checkpoint", "latest")
        assert f"resuming from {folder}/checkpoint-6 at step 6" in result.stdout, describe(result)
        return result

    if request.param == "plain":
        whole = request.getfixturevalue("straight")[0]
    else:
        whole = once(f"whole_{request.param}", lambda folder: train(*flags, folder))[0]
    return whole, once(f"resumed_{request.param}", resume)[0]


def test_a_resumed_run_ends_bit_for_bit_where_the_straight_one_does(stopped):
    whole, resumed = stopped
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert_same_checkpoint(resumed / "checkpoint-12", whole / "checkpoint-12")
    assert rows(resumed)[-6:] == rows(whole)[-6:]


def test_a_resumed_run_keeps_the_losses_from_before_the_stop(stopped):
    """Those after the checkpoint, computed twice, are logged once."""
    whole, resumed = stopped
    assert (resumed / "loss.jsonl").read_bytes() == (whole / "loss.jsonl").read_bytes()
    assert (resumed / "loss.png").read_bytes() == (whole / "loss.png").read_bytes()


def test_a_resumed_run_leaves_the_settings_that_the_straight_one_leaves(stopped):
    """They are published with the model, to train it again, not to resume in a folder."""
    texts = [(folder / "training_config.yaml").read_text().replace(str(folder), "FOLDER") for folder in stopped]
    assert texts[1] == texts[0]


def test_a_log_line_cut_short_by_a_kill_does_not_prevent_resuming(train, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    with (tmp_path / "run" / "loss.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    train(*TINY, "--max_train_steps", 14, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 15))


def test_resuming_skips_a_damaged_checkpoint(train, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    with (tmp_path / "run" / "checkpoint-12" / "optimizer.bin").open("r+b") as file:
        file.truncate(1000)
    result = train(*TINY, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert "steps 6 to 12" in result.stdout and "skipping" in result.stderr and "optimizer.bin" in result.stderr
    assert weights(tmp_path / "run").keys() == weights(straight[0]).keys()
    assert_same(weights(tmp_path / "run"), weights(straight[0]))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--seed 5", "seed was 0 and is 5"),
        ("--train_batch_size 16", "train_batch_size was 8 and is 16"),
        ("--max_train_samples 100", "images"),
        ("--use_ema false", "use_ema was True and is False"),
        ("--prediction_type v_prediction", "prediction_type"),
        ("--ddpm_beta_schedule squaredcos_cap_v2", "beta_schedule"),
        ("--ddpm_num_steps 1000", "steps"),
        ("--variance_type learned_range --objective hybrid", "variance_type"),
        ("--block_out_channels 64 64", "block_out_channels"),
    ],
)
def test_resuming_with_other_settings_is_refused(train, straight, tmp_path, flags, named):
    checkpoint = ["--resume_from_checkpoint", straight[0] / "checkpoint-6"]
    result = train(*TINY, *flags.split(), *checkpoint, "--output_dir", tmp_path / "run", expect=None)
    assert result.returncode == 1, describe(result)
    (line,) = error_lines(result)
    assert line.startswith("train.py: error: ") and "belongs to another run" in line and named in line
    assert not (tmp_path / "run" / "loss.jsonl").exists()


def test_a_checkpoint_beyond_the_last_step_is_refused(train, straight, tmp_path):
    """Otherwise its weights would be saved as those of another step."""
    checkpoint = ["--resume_from_checkpoint", straight[0] / "checkpoint-12", "--max_train_steps", 9]
    result = train(*TINY, *checkpoint, "--output_dir", tmp_path / "run", expect=None)
    assert result.returncode == 1, describe(result)
    assert "12" in error_lines(result)[-1] and "9" in error_lines(result)[-1]
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_resuming_a_finished_run_changes_nothing(train, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    train(*TINY, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert_same(weights(tmp_path / "run"), weights(straight[0]))
    assert rows(tmp_path / "run") == rows(straight[0])
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-12", straight[0] / "checkpoint-12")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_two_processes_that_were_killed_resume(train, straight, two_processes, tmp_path, processes):
    """On two again, bit for bit the same run; on one, the same within rounding."""
    folder = tmp_path / "run"
    flags = [*TINY, "--checkpointing_steps", 6, "--output_dir", folder]
    train(*flags, processes=2, stop_at=7, expect=-signal.SIGKILL)
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-6"]
    flags += ["--resume_from_checkpoint", "latest"]
    if processes == 1:
        train(*flags)
        assert losses(folder)[-6:] == pytest.approx(losses(straight[0])[-6:], rel=1e-5)
        assert_close(weights(folder), weights(straight[0]), atol=1e-5)
        return
    train(*flags, processes=2)
    whole = two_processes[0]
    assert rows(folder)[-6:] == rows(whole)[-6:]
    assert_same(weights(folder), weights(whole))
    assert_same_checkpoint(folder / "checkpoint-12", whole / "checkpoint-12")


# -------------------------------------------------------------------- what is refused


def test_a_folder_with_files_is_refused_and_left_alone(train, straight):
    folder, _ = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = train(*TINY, "--output_dir", folder, expect=1)
    (line,) = error_lines(result)
    assert line.startswith(f"train.py: error: --output_dir {folder} is not empty")
    assert "--overwrite_output_dir" in line and "--resume_from_checkpoint latest" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_empty_folder_is_accepted(train, tmp_path):
    train(*TINY, "--max_train_steps", 4, "--output_dir", tmp_path)
    assert (tmp_path / "model_index.json").exists()


def test_one_command_starts_a_run_and_resumes_it(train, straight, tmp_path):
    """As a preemptible machine repeats it, also before there is a first checkpoint."""
    folder = tmp_path / "run"
    flags = [*TINY, "--checkpointing_steps", "6", "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    flags += ["--logging_steps", "2"]
    result = train(*flags, stop_at=4, expect=-signal.SIGKILL)
    assert "no checkpoint yet: starting at the beginning" in result.stdout and (folder / "loss.jsonl").exists()
    assert "no checkpoint yet" in train(*flags, stop_at=8, expect=-signal.SIGKILL).stdout
    assert f"resuming from {folder}/checkpoint-6" in train(*flags).stdout
    assert_same_checkpoint(folder / "checkpoint-12", straight[0] / "checkpoint-12")


def test_latest_in_a_folder_of_other_files_is_refused(train, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = train(*TINY, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest", expect=1)
    (line,) = error_lines(result)
    assert "is not empty" in line and "no checkpoint to resume from" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwriting_leaves_no_checkpoint_of_the_old_run_to_resume_from(train, straight, tmp_path):
    """An old checkpoint-12 would be the "latest" of a new run of 8 steps."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "notes.txt").write_text("mine")
    flags = [*TINY, "--max_train_steps", 8, "--learning_rate", 1e-3, "--output_dir", folder]
    train(*flags, "--overwrite_output_dir", "--checkpointing_steps", 4)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_mistake_costs_no_checkpoint_of_the_folder_to_overwrite(train, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    flags = [*TINY[2:], "--train_data_dir", tmp_path / "nowhere", "--output_dir", folder, "--overwrite_output_dir"]
    train(*flags, expect=1)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]


def test_half_written_folders_of_a_stopped_run_are_removed(train, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / ".checkpoint-9.partial").mkdir()
    train(*TINY, "--output_dir", folder, "--resume_from_checkpoint", "checkpoint-6")
    assert not (folder / ".checkpoint-9.partial").exists() and (folder / "checkpoint-6").exists()


EPOCHS = "--dataset_name digits --block_out_channels 32 32 --max_train_samples 16 --train_batch_size 8".split()


def test_a_warm_up_longer_than_the_epochs_is_refused(train, tmp_path):
    flags = [*EPOCHS, "--num_epochs", 3, "--lr_warmup_steps", 7]
    result = train(*flags, "--output_dir", tmp_path / "run", expect=1)
    assert "--lr_warmup_steps is 7 and training ends after 6 steps" in error_lines(result)[-1]


def test_the_warm_up_is_a_tenth_of_a_short_run(train, tmp_path):
    short = ["--num_samples", 2, "--ddpm_num_inference_steps", 2, "--layers_per_block", 1]
    train(*EPOCHS, *short, "--num_epochs", 15, "--output_dir", tmp_path / "run")
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([closed_form(n, peak=1e-4, warmup=3, steps=30) for n in range(30)], rel=1e-12)


def test_a_launch_that_only_looks_distributed_is_refused(train, tmp_path):
    result = train(*TINY, "--output_dir", tmp_path / "run", env={"WORLD_SIZE": "2"}, expect=1)
    (line,) = error_lines(result)
    assert "WORLD_SIZE is 2 and accelerate runs 1 process(es)" in line and "ACCELERATE_USE_CPU=true" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_ends_the_launch(launch, tmp_path):
    result = launch(*TINY, "--train_batch_size", 9, "--output_dir", tmp_path / "run", processes=2, expect=None)
    assert result.returncode != 0 and "a multiple of 2" in result.stderr
    assert not (tmp_path / "run" / "loss.jsonl").exists()


CONFIGS = {
    "typo.yaml": "dataset_name: digits\nlearning_rat: 1e-3\n",
    "type.yaml": "dataset_name: digits\nlearning_rate: fast\n",
    "choice.yaml": "dataset_name: digits\nprediction_type: noise\n",
    "list.yaml": "- dataset_name\n- digits\n",
}
REFUSED = {
    "an empty folder": ("--train_data_dir empty", "holds no image"),
    "a missing folder": ("--train_data_dir nowhere", "'nowhere' is not a folder"),
    "a missing image column": (
        "--train_data_dir pngs --image_column picture",
        "'picture'.*of these with images: image",
    ),
    "a missing label column": ("--train_data_dir pngs --label_column kind", "'kind' is not a column"),
    "an unknown split": ("--dataset_name digits --train_split validation", "'validation'.*it has: train, test"),
    "a folder's unknown split": ("--train_data_dir pngs --train_split test", "'test'.*train"),
    "a typo in a flag": ("--dataset_name digits --learning_rat 1", "--learning_rat .*did you mean --learning_rate"),
    "a typo in a file": ("--config typo.yaml", "'learning_rat'.*did you mean 'learning_rate'"),
    "a wrong type in a file": ("--config type.yaml", "learning_rate.*'fast'"),
    "a wrong choice in a file": ("--config choice.yaml", "prediction_type.*'noise'.*epsilon"),
    "a file of no flags": ("--config list.yaml", "list.yaml holds list"),
    "a missing file": ("--config nothing.yaml", "nothing.yaml.*No such file"),
    "two sources": ("--dataset_name digits --train_data_dir pngs", "exactly one"),
    "no source": ("", "exactly one"),
    "too many levels": ("--dataset_name digits --block_out_channels 32 32 32 32 32", "8x8 .* 5 levels.*by 16"),
    "levels that do not divide": ("--train_data_dir pngs --resolution 15", "15x15 .*--resolution"),
    "attention at no level": ("--dataset_name digits --attention_levels 2", r"--attention_levels is \[2\].*0 to 1"),
    "hybrid, variance fixed": ("--dataset_name digits --objective hybrid", "'hybrid'.*'fixed_small'.*learned_range"),
    "simple, variance learned": ("--dataset_name digits --variance_type learned_range", "'simple'.*'learned_range'"),
    "zero SNR with epsilon": ("--dataset_name digits --rescale_betas_zero_snr", "'epsilon'.*v_prediction"),
    "the bound weighted": ("--dataset_name digits --objective vlb --loss_weighting min_snr", "'min_snr'.*'vlb'"),
    "nothing to resume": ("--dataset_name digits --resume_from_checkpoint checkpoint-5", "not a whole checkpoint"),
    "no model there": (
        "--dataset_name digits --pretrained_model_name_or_path ./nowhere",
        r"--pretrained_model_name_or_path is ./nowhere, and there is no such file or folder in .*$",
    ),
    "no network there": (
        "--dataset_name digits --model_config_name_or_path ./nowhere.json",
        r"--model_config_name_or_path is ./nowhere.json, and there is no such file or folder in .*$",
    ),
    "a file for a folder": ("--dataset_name digits --output_dir typo.yaml --overwrite_output_dir", "typo.yaml"),
    "a decay of zero time": ("--dataset_name digits --ema_inv_gamma 0", "--ema_inv_gamma is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_training_starts(train, tmp_path, case):
    flags, expected = REFUSED[case]
    (tmp_path / "empty").mkdir()
    pngs(tmp_path / "pngs", "RGB", count=2)
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    flags = shlex.split(flags)
    base = SHORT if any(flag.endswith("name_or_path") for flag in flags) else TINY[2:]
    base = base if "--output_dir" in flags else [*base, "--output_dir", "run"]
    result = train(*base, *flags, cwd=tmp_path, expect=None)
    assert result.returncode in (1, 2), describe(result)
    line, *others = error_lines(result)
    assert others in ([], ["train.py --help lists all flags"]), describe(result)
    assert line.startswith("train.py: error: ") and re.search(expected, line), line
    assert not list(tmp_path.glob("run/*")), "something was written"


# -------------------------------------------------------------------- images and networks


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_folder_of_images_takes_the_place_of_the_data_set_of_the_file(train, tmp_path, mode, channels):
    folder = pngs(tmp_path / "pngs", mode)
    flags = "--block_out_channels 32 32 --max_train_steps 3 --lr_warmup_steps 1 --train_batch_size 4 --num_samples 4"
    flags += " --ddpm_num_inference_steps 2 --label_column label"
    config = ["--config", ROOT / "training" / "configs" / "digits.yaml", "--train_data_dir", folder]
    result = train(*config, *flags.split(), "--output_dir", tmp_path / "run")
    assert result.stdout.startswith(f"9 images of 9 files of {channels}x16x24 from pngs,")
    config = unet_config(tmp_path / "run")
    assert (config["in_channels"], config["out_channels"], config["sample_size"]) == (channels, channels, [16, 24])
    assert config["num_class_embeds"] == 3
    assert config["_ddpm_notes"] == {"null_label": 2, "class_names": ["cat", "dog"]}
    images = DDPMNotesPipeline.from_pretrained(tmp_path / "run")(class_labels=1, num_inference_steps=2).images
    assert images[0].size == (24, 16) and images[0].mode == mode


@pytest.fixture(scope="module")
def conditional(train):
    flags = ["--label_column", "label", "--learning_rate", 1e-2]
    return once("conditional", lambda folder: train(*TINY, *flags, "--output_dir", folder))[0]


def test_a_class_conditional_network_has_an_embedding_for_no_label_and_records_it(conditional):
    config = unet_config(conditional)
    assert config["num_class_embeds"] == 11
    assert config["_ddpm_notes"] == {"null_label": 10, "class_names": [str(digit) for digit in range(10)]}
    pipeline = DDPMNotesPipeline.from_pretrained(conditional)
    assert (pipeline.null_label, pipeline.num_classes) == (10, 10)
    assert "class_name" not in (conditional / "model_index.json").read_text().replace("_class_name", "")


def test_every_embedding_is_trained_also_that_of_no_label(conditional):
    """Guidance subtracts the prediction without a label, so labels must be dropped now and then."""
    state = torch.load(conditional / "checkpoint-12" / "optimizer.bin")["state"]
    moments = [entry["exp_avg_sq"] for entry in state.values() if entry["exp_avg_sq"].shape == (11, 128)]
    (moment,) = moments
    assert [label for label in range(11) if not moment[label].any()] == []


OBJECTIVES = {
    "hybrid, learned range": "--objective hybrid --variance_type learned_range",
    "bound, second moment": "--objective vlb --timestep_sampling loss_second_moment --ddpm_num_steps 4",
    "min SNR, v, zero SNR": "--loss_weighting min_snr --prediction_type v_prediction --rescale_betas_zero_snr",
    "bf16, no average": "--mixed_precision bf16 --use_ema false",
}
MORE_OBJECTIVES = {
    "hybrid, learned": "--objective hybrid --variance_type learned --timestep_sampling stratified",
    "bound": "--objective vlb",
    "min SNR, x_0": "--loss_weighting min_snr --prediction_type sample",
    "gradient checkpointing": "--gradient_checkpointing",
}
CASES = [*OBJECTIVES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_OBJECTIVES)]


@pytest.mark.parametrize("case", CASES)
def test_every_objective_runs_and_saves_what_it_was_trained_as(train, tmp_path, case):
    flags = (OBJECTIVES | MORE_OBJECTIVES)[case].split()
    train(*TINY, *flags, "--output_dir", tmp_path / "run")
    assert all(map(math.isfinite, losses(tmp_path / "run"))) and len(losses(tmp_path / "run")) == STEPS
    pipeline = DDPMNotesPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(pipeline.scheduler, DDPMNotesScheduler) and pipeline.unet.dtype == torch.float32
    _, model, run = parse_arguments([*TINY, *flags])
    for name in ("prediction_type", "variance_type", "rescale_betas_zero_snr"):
        assert pipeline.scheduler.config[name] == getattr(model, name), name
    assert len(pipeline.scheduler) == model.ddpm_num_steps
    learned = "learned" in model.variance_type
    assert pipeline.unet.config.out_channels == (2 if learned else 1)
    state = torch.load(tmp_path / "run" / "checkpoint-12" / "optimizer.bin")["state"]
    # of the last bias, one per output channel: mean, then variance
    moment = state[max(state)]["exp_avg_sq"]
    assert moment.shape == (pipeline.unet.config.out_channels,) and moment.all()
    if run.timestep_sampling == "loss_second_moment":
        history = load_file(tmp_path / "run" / "checkpoint-12" / "timestep_sampler.safetensors")
        assert history["counts"].sum() == STEPS * BATCH and (history["counts"] > 0).all()
    assert (tmp_path / "run" / "checkpoint-12" / "ema.safetensors").exists() == run.use_ema
    if not run.use_ema:
        assert_same(weights(tmp_path / "run"), load_file(tmp_path / "run" / "checkpoint-12" / "model.safetensors"))


def test_a_network_from_a_file_gets_the_channels_and_size_of_the_images(train, tmp_path):
    stock_folder(tmp_path / "stock")
    file = tmp_path / "stock" / "unet" / "config.json"
    folder = pngs(tmp_path / "pngs", "RGB")
    flags = ["--model_config_name_or_path", file, "--train_data_dir", folder, "--max_train_steps", 4]
    train(*SHORT, *flags, "--output_dir", tmp_path / "run")
    config = unet_config(tmp_path / "run")
    assert (config["in_channels"], config["out_channels"], config["sample_size"]) == (3, 3, [16, 24])
    assert config["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]


def test_epochs_count_the_images_once_each(train, tmp_path):
    flags = [flag for flag in TINY if flag not in ("--max_train_steps", "12")]
    flags += ["--num_epochs", 2, "--max_train_samples", 10, "--lr_warmup_steps", 0]
    result = train(*flags, "--output_dir", tmp_path / "run")
    # 20 / 8
    assert result.stdout.startswith("10 images of 1x8x8") and "steps 0 to 3 of 8 images" in result.stdout


ACCELERATE = {"one_gpu": ("NO", 1, 1), "multi_gpu": ("MULTI_GPU", 4, 1), "two_nodes": ("MULTI_GPU", 8, 2)}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_the_launch_files_for_gpus(name):
    config = load_config_from_file(str(ROOT / "training" / "launch" / f"{name}.yaml"))
    assert (str(config.distributed_type.value), config.num_processes, config.num_machines) == ACCELERATE[name]
    assert config.mixed_precision == "bf16" and not config.use_cpu
