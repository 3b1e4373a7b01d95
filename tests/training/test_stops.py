"""A signalled run leaves a checkpoint and the command that resumes; a killed run resumes too."""

import os
import random
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from ddpm_notes_pipeline.training.checkpoints import damage, list_checkpoints
from ddpm_notes_pipeline.training.commands import resume_command
from tests.support.comparing import assert_close, assert_same, assert_same_checkpoint, losses, rows, weights
from tests.support.launching import TINY, TRAIN, describe, error_lines, once

# All that has a history or may mishandle one. 20 steps of 8 of 100 images end in the second epoch.
HISTORY = (
    "--max_train_steps 20 --max_train_samples 100 --objective hybrid --variance_type learned_range --ddpm_num_steps 4 "
    "--timestep_sampling loss_second_moment --dropout 0.1 --random_flip --gradient_accumulation_steps 2 --label_column label"
).split()
BATCH = "ddpm_notes_pipeline.data.batches:StepBatches.__getitem__"


@pytest.fixture(scope="module")
def whole(train):
    """20 steps without a stop."""
    return once("whole_history", lambda folder: train(*TINY, *HISTORY, "--output_dir", folder))[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoint_names(folder: Path) -> list[str]:
    """Including half-written ones."""
    return sorted(path.name for path in folder.glob("*checkpoint*"))


def assert_ended_as(folder: Path, whole: Path, step: int) -> None:
    """Bit for bit: weights, average, optimizer, histories, all logged losses."""
    assert_same(weights(folder), weights(whole))
    assert_same_checkpoint(folder / f"checkpoint-{step}", whole / f"checkpoint-{step}")
    assert (folder / "loss.jsonl").read_bytes() == (whole / "loss.jsonl").read_bytes()


def resume_flags(result: object) -> list[str]:
    """Flags of the command at the end of the last line on stderr."""
    command = error_lines(result)[-1].partition(" Resume: ")[2]
    launcher, script, flags = command.partition(f" {result.args[0]} ")
    assert launcher in ("python", "accelerate launch") and script, describe(result)
    return shlex.split(flags)


# -------------------------------------------------------------------- told to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_its_step_and_the_printed_command_resumes_bit_for_bit(train, whole, tmp_path, number):
    folder = tmp_path / "a run"
    flags = [*TINY, *HISTORY, "--output_dir", folder, "--dataloader_num_workers", 2]
    result = train(*flags, stop_at=("torch.optim:AdamW.step", 10), by=number, expect=128 + number)
    assert checkpoint_names(folder) == ["checkpoint-10"] and damage(folder / "checkpoint-10") is None
    assert [row["step"] for row in rows(folder)] == list(range(1, 11))
    assert not (folder / "model_index.json").exists()
    assert f"train.py: stopped by {number.name} after step 10 of 20, which" in error_lines(result)[-1]
    assert "Traceback" not in result.stderr
    result = train(*resume_flags(result))
    assert "steps 10 to 20" in result.stdout
    assert_ended_as(folder, whole, 20)


def test_a_run_stopped_several_times_ends_bit_for_bit(train, whole, tmp_path):
    """The command does not grow."""
    flags = [*TINY, *HISTORY, "--output_dir", tmp_path / "run"]
    stopped = train(*flags, stop_at=("torch.optim:AdamW.step", 3), by=signal.SIGTERM, expect=143)
    for step in (4, 11):
        flags = resume_flags(stopped)
        stopped = train(
            *flags, stop_at=("torch.optim:AdamW.step", 1 if step == 4 else 7), by=signal.SIGTERM, expect=143
        )
        assert resume_flags(stopped) == flags and f"after step {step} of 20" in stopped.stderr
    train(*flags)
    assert_ended_as(tmp_path / "run", whole, 20)


def test_a_signal_during_a_checkpoint_leaves_it_whole_and_ends_the_run(train, tmp_path):
    flags = [*TINY, "--checkpointing_steps", 6, "--output_dir", tmp_path / "run"]
    result = train(
        *flags, stop_at=("ddpm_notes_pipeline.training.checkpoints:digest", 3), by=signal.SIGTERM, expect=143
    )
    assert names(tmp_path / "run") == ["checkpoint-6", "loss.jsonl"]
    assert damage(tmp_path / "run" / "checkpoint-6") is None and len(rows(tmp_path / "run")) == 6
    assert "after step 6 of 12" in error_lines(result)[-1]


SAMPLING = "ddpm_notes_pipeline.scheduling_ddpm_notes:DDPMNotesScheduler.step"


def test_a_signal_while_sampling_does_not_wait_for_the_samples(train, tmp_path):
    """Only two of a thousand sampling steps are taken.

    The raw weights are saved, not the average.
    """
    flags = [*TINY, "--max_train_steps", 20, "--sample_steps", 5, "--ddpm_num_steps", 1000, "--num_samples", 2]
    flags += ["--ddpm_num_inference_steps", 1000, "--output_dir"]
    result = train(*flags, tmp_path / "run", stop_at=(SAMPLING, 2), by=signal.SIGTERM, expect=143)
    assert names(tmp_path / "run") == ["checkpoint-6", "loss.jsonl"]
    assert "sample:   0%" in result.stderr and "sample: 100%" not in result.stderr
    plain = tmp_path / "plain"
    train(*flags, plain, "--sample_steps", 20, stop_at=("torch.optim:AdamW.step", 6), by=signal.SIGTERM, expect=143)
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-6", plain / "checkpoint-6")


def test_a_signal_during_the_last_samples_keeps_the_model_and_resuming_makes_them(train, tmp_path):
    flags = [*TINY, "--output_dir", tmp_path / "run"]
    result = train(*flags, stop_at=(SAMPLING, 1), by=signal.SIGTERM, expect=143)
    assert {"model_index.json", "unet", "checkpoint-12"} < set(names(tmp_path / "run"))
    assert not (tmp_path / "run" / "samples.png").exists()
    assert "with training done and the model in" in error_lines(result)[-1]
    before = weights(tmp_path / "run")
    train(*resume_flags(result))
    assert (tmp_path / "run" / "samples.png").exists()
    assert_same(weights(tmp_path / "run"), before)


@pytest.mark.parametrize(
    ("where", "call"), [("data.decoding:open_image", 100), ("data.batches:StepBatches.__init__", 1)]
)
def test_a_signal_before_training_starts_ends_the_run_at_once(train, tmp_path, where, call):
    """While images are decoded, too: no half of them is left for the next run to find."""
    cache = tmp_path / "cache"
    flags = [*TINY, "--cache_dir", cache, "--output_dir", tmp_path / "run"]
    result = train(*flags, stop_at=(f"ddpm_notes_pipeline.{where}", call), by=signal.SIGTERM, expect=143)
    assert names(tmp_path / "run") == []
    assert error_lines(result)[-1].startswith(
        "train.py: stopped by SIGTERM before training started; start it again by the same command"
    )
    assert "Traceback" not in result.stderr
    assert len(names(cache)) == (where != "data.decoding:open_image")
    train(*TINY, "--cache_dir", cache, "--max_train_steps", 4, "--output_dir", tmp_path / "run")


SECOND = """
import os, signal, sys, time
import ddpm_notes_pipeline.training.stops as stops
stops.REPEATED = 1.0
told = stops.Stops()
told.install()
told.where = None
for _ in range(3):  # as several senders of the same stop do
    os.kill(os.getpid(), signal.SIGTERM)
print("still here", told.agreed(), flush=True)
time.sleep(1.2)
os.kill(os.getpid(), signal.SIGINT)
print("too late", flush=True)
"""


def test_a_second_signal_stops_at_once_but_a_repetition_does_not(train):
    result = train(SECOND, script="-c", expect=130)
    assert result.stdout.splitlines() == ["still here 15"]
    assert error_lines(result) == ["SIGTERM: stopping after this step; a second one ends the run at once"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "python t.py --a 'b c' --resume_from_checkpoint latest"),
        (
            # set by `accelerate launch`
            {"ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate launch t.py --a 'b c' --resume_from_checkpoint latest",
        ),
        (
            {"WORLD_SIZE": "4"},
            "accelerate launch --multi_gpu --num_processes 4 t.py --a 'b c' --resume_from_checkpoint latest",
        ),
        (
            {"WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"},
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4 t.py --a 'b c' --resume_from_checkpoint latest",
        ),
        (
            {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
            "accelerate launch OPTIONS_AS_BEFORE t.py --a 'b c' --resume_from_checkpoint latest",
        ),
    ],
)
@pytest.mark.parametrize(
    "argv", ["--a|b c", "--resume_from_checkpoint|x|--a|b c", "--a|b c|--resume-from-checkpoint=checkpoint-6"]
)
def test_the_command_starts_as_many_processes_and_resumes_once(monkeypatch, environment, expected, argv):
    for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = ["t.py", *argv.split("|")]
    assert resume_command(command) == expected
    assert resume_command([*command, "--b", "1"], "--b") == expected


# -------------------------------------------------------------------- killed


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_bit_for_bit_the_same(train, tmp_path):
    """Five moments of wall-clock time, and five inside the write of a checkpoint."""
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"KILL_SEED={seed}")
    moments = random.Random(seed)
    flags = [*TINY, *HISTORY, "--max_train_steps", 150, "--checkpointing_steps", 3, "--checkpoints_total_limit", 2]
    started = time.monotonic()
    train(*flags, "--output_dir", tmp_path / "whole")
    seconds = time.monotonic() - started

    folder, killed, inside, steps = tmp_path / "run", 0, 0, []
    plan = ["time", "write"] * 5
    while plan or inside < 3:
        if (plan.pop() if plan else "write") == "time":
            kill_after = (moments.uniform(0, seconds / 10), "/")
        else:  # not the next write: each try gets further than the one before
            at = 3 * (max(steps, default=0) // 3 + moments.randint(2, 4))
            kill_after = (moments.uniform(0, 0.02), str(folder / f".checkpoint-{at}.partial" / "*"))
        go_on = ["--resume_from_checkpoint", "latest"] if list_checkpoints(folder) else ["--overwrite_output_dir"]
        train(*flags, "--output_dir", folder, *go_on, kill_after=kill_after, expect=-signal.SIGKILL)
        killed += 1
        inside += bool(list(folder.glob(".checkpoint-*.partial")))
        if found := list_checkpoints(folder):
            steps.append(int(found[0].name.removeprefix("checkpoint-")))
    print(f"{killed} kills, {inside} inside a write, at checkpoints {steps} of a run of {seconds:.1f} s")
    assert killed >= 10 and inside >= 3 and len(set(steps)) > 3
    train(*flags, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert_ended_as(folder, tmp_path / "whole", 150)
    assert checkpoint_names(folder) == ["checkpoint-147", "checkpoint-150"]


# -------------------------------------------------------------------- what fails on the way


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def short_path():
    """A folder with a short name: stderr is a file too, which must not reach the size limit."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize(("what", "stopped"), [("checkpoint-15", 10), ("loss.jsonl", 19)])
def test_a_full_disk_loses_nothing_that_was_written(train, whole, short_path, what, stopped):
    """The kernel refuses to let a file grow: a checkpoint's, or that of the losses before it."""
    folder = short_path / "run"
    flags = [*TINY, *HISTORY, "--output_dir", folder, "--checkpointing_steps", 5]
    train(*flags, stop_at=("torch.optim:AdamW.step", stopped), by=signal.SIGTERM, expect=143)
    left, names = folder / f"checkpoint-{stopped}", checkpoint_names(folder)
    before = contents(left)
    # one more row does not fit; of one step stderr, a file too, has fewer bytes
    file_size = 100_000 if what == "checkpoint-15" else (folder / "loss.jsonl").stat().st_size + 30
    result = train(*flags, "--resume_from_checkpoint", "latest", file_size=file_size, expect=1)
    line = error_lines(result)[-1]
    assert line.startswith("train.py: error: could not write ") and what in line.partition(": ")[2], describe(result)
    assert "File too large" in line or "PytorchStreamWriter" in line or "I/O error" in line
    assert f"{left} is left. Resume: " in line and "Traceback" not in result.stderr
    assert left.name in names and checkpoint_names(folder) == names
    assert contents(left) == before
    train(*resume_flags(result))
    assert_ended_as(folder, whole, 20)


def test_a_full_disk_under_the_finished_model_leaves_its_checkpoint(train, tmp_path):
    """/dev/full stands in for one of the model's files."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "training_config.yaml").symlink_to("/dev/full")
    result = train(*TINY, "--output_dir", folder, "--overwrite_output_dir", expect=1)
    line = error_lines(result)[-1]
    assert line.startswith(
        f"train.py: error: could not write the model to {folder}: [Errno 28] No space left on device"
    )
    assert f"{folder}/checkpoint-12 is left. Resume: " in line and "Traceback" not in result.stderr
    assert damage(folder / "checkpoint-12") is None
    (folder / "training_config.yaml").unlink()
    train(*resume_flags(result))
    assert (folder / "samples.png").exists()


# -------------------------------------------------------------------- by a launcher

DRIVER = """
import os, runpy, signal, sys, time
from torch.optim import AdamW
def step(self, *args, original=AdamW.step, calls=[0], **kwargs):
    calls[0] += 1
    if calls[0] == 7:
        open({pids!r}, "a").write(str(os.getpid()) + "\\n")
        if os.environ.get("RANK", "1") == "1":
            {send}
            time.sleep(2)
    return original(self, *args, **kwargs)
AdamW.step = step
runpy.run_path({train!r}, run_name="__main__")
"""


def launch_and_stop(launch: Callable, tmp_path: Path, send: str, *flags: object, **options: object) -> object:
    """A launch in which rank 1 runs `send` in its 7th step; waits for all processes to end."""
    driver, pids = tmp_path / "driver.py", tmp_path / "pids"
    driver.write_text(DRIVER.format(train=str(TRAIN), pids=str(pids), send=send))
    result = launch(*TINY, *HISTORY, "--output_dir", tmp_path / "run", *flags, script=driver, expect=None, **options)
    for pid in map(int, pids.read_text().split()):
        try:
            psutil.Process(pid).wait(timeout=60)
        except psutil.NoSuchProcess:
            pass
    return result


@pytest.fixture(scope="module")
def whole_by_two(train):
    """The same 20 steps on two processes, without a stop."""
    make = lambda folder: train(*TINY, *HISTORY, "--output_dir", folder, "--num_samples", 1, processes=2)  # noqa: E731
    return once("whole_history_by_two", make)


@pytest.mark.slow
def test_signalling_the_process_group_stops_a_run_whose_launcher_forwards_nothing(train, launch, whole, tmp_path):
    """As the README says. The launcher dies of it; the training process and its workers do not."""
    send = "os.killpg(0, signal.SIGTERM)"
    result = launch_and_stop(launch, tmp_path, send, "--dataloader_num_workers", 2)
    assert result.returncode == -signal.SIGTERM
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-7"] and damage(tmp_path / "run" / "checkpoint-7") is None
    train(*TINY, *HISTORY, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert_ended_as(tmp_path / "run", whole, 20)


SENDS = {
    "one of them": "os.kill(os.getpid(), signal.SIGTERM)",
    "their launcher": "os.kill(os.getppid(), signal.SIGTERM)",
    "everybody": "os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)",
}


@pytest.mark.slow
@pytest.mark.parametrize("told", SENDS)
def test_two_processes_stop_after_the_same_step_whoever_is_signalled(tmp_path, told, train, launch, request):
    # dropout differs between processes
    flags = ["--dropout", 0] if told == "one of them" else []
    result = launch_and_stop(train if told == "one of them" else launch, tmp_path, SENDS[told], *flags, processes=2)
    name = "SIGINT" if told == "everybody" else "SIGTERM"
    assert result.returncode != 0
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-7"], describe(result)
    assert damage(tmp_path / "run" / "checkpoint-7") is None and len(rows(tmp_path / "run")) == 7
    assert f"train.py: stopped by {name} after step 7 of 20" in result.stderr
    command = "Resume: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2"
    assert result.stderr.count(command) == 1
    if told == "their launcher":  # on two again: bit for bit
        whole, _ = request.getfixturevalue("whole_by_two")
        resume = ["--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "run"]
        assert "on 2 process(es) of cpu" in train(*TINY, *HISTORY, *resume, "--num_samples", 1, processes=2).stdout
        assert_ended_as(tmp_path / "run", whole, 20)
        one, two = (np.asarray(Image.open(path / "samples.png"), float) for path in (tmp_path / "run", whole))
        # a single sample, which one of the processes made alone
        assert np.array_equal(one, two)
    if told == "one of them":  # on one: the same curve, within rounding
        flags = [*TINY, *HISTORY, *flags, "--output_dir"]
        train(*flags, tmp_path / "whole")
        train(*flags, tmp_path / "run", "--resume_from_checkpoint", "latest")
        assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        rates = [[row["learning_rate"] for row in rows(tmp_path / name)] for name in ("run", "whole")]
        assert rates[0] == rates[1]
        assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), atol=1e-5)
