"""Checkpoints are whole or not there, whatever happens to the process, the disk or the files."""

import json
import logging
import os
import resource
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

import ddpm_notes_pipeline.training.checkpoints as checkpoints
from ddpm_notes_pipeline.objectives import TimestepSampler
from ddpm_notes_pipeline.oracles import CoinDenoiser
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from ddpm_notes_pipeline.training.arguments import RunArguments
from ddpm_notes_pipeline.training.checkpoints import (
    CheckpointState,
    damage,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from ddpm_notes_pipeline.training.learner import Learner
from ddpm_notes_pipeline.training.run import reset_accelerate
from ddpm_notes_pipeline.training.updates import UpdateGuard

IDENTITY = {"seed": 3, "train_batch_size": 8, "images": "abc"}


@pytest.fixture(autouse=True)
def own_accelerate():
    """Accelerate's state is the process's: take over none, and leave none behind."""
    reset_accelerate()
    yield
    reset_accelerate()


class Run:
    """A network of 12 weights with all that a checkpoint holds."""

    def __init__(self, folder, seed=0, use_ema=True):
        torch.manual_seed(seed)
        self.folder = folder
        self.accelerator = Accelerator(cpu=True)
        self.network, self.optimizer = self.accelerator.prepare(
            network := torch.nn.Linear(3, 3), torch.optim.AdamW(network.parameters(), lr=0.1)
        )
        self.ema = EMAModel(network.parameters(), use_ema_warmup=True) if use_ema else None
        self.sampler = TimestepSampler(4, "loss_second_moment", history=2)
        self.guard = UpdateGuard(self.accelerator, limit=10)
        self.steps = 0

    def step(self, count=1):
        for _ in range(count):
            self.steps += 1
            x = torch.linspace(-1, 1, 6).reshape(2, 3) * self.steps
            self.accelerator.backward(self.network(x).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.step(self.network.parameters())
            self.sampler.update(torch.tensor([self.steps % 4]), torch.tensor([float(self.steps)]))
            self.guard.skipped += self.steps % 2
            self.guard.in_a_row, self.guard.scale_skipped = self.steps % 2, self.steps
        return self

    def save(self, total_limit=None, identity=IDENTITY):
        return save_checkpoint(self.accelerator, self.folder, self.steps, self.held(identity), total_limit)

    def load(self, checkpoint, identity=IDENTITY):
        self.steps = load_checkpoint(self.accelerator, checkpoint, self.held(identity))
        return self

    def held(self, identity):
        return CheckpointState(self.ema, self.sampler, self.guard, identity)

    def state(self):
        """Everything, as flat copies."""
        optimizer = self.optimizer.state_dict()
        found = {f"network/{name}": value.clone() for name, value in self.network.state_dict().items()}
        for i, entry in optimizer["state"].items():
            found |= {f"optimizer/{i}/{name}": value.clone() for name, value in entry.items()}
        if self.ema is not None:
            found |= {f"ema/{i}": value.clone() for i, value in enumerate(self.ema.shadow_params)}
            found["ema/step"] = torch.tensor(self.ema.optimization_step)
        found |= {f"updates/{name}": torch.tensor(count) for name, count in self.guard.state_dict().items()}
        return found | self.sampler.state_dict() | {"steps": torch.tensor(self.steps)}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------- there and back


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_restored_run_continues_as_the_saved_one(tmp_path, use_ema):
    first = Run(tmp_path, use_ema=use_ema).step(5)
    checkpoint = first.save()
    saved = first.state()
    second = Run(tmp_path, seed=1, use_ema=use_ema).step(2)
    assert not torch.equal(second.network.weight, first.network.weight)
    second.load(checkpoint)
    assert_same(second.state(), saved)
    assert_same(second.step(3).state(), first.step(3).state())


def test_windows_syncs_no_folders_and_files_only_when_open_for_writing(tmp_path, monkeypatch):
    """os.open refuses folders there, and os.fsync what is open to read."""
    opened, original = [], os.open
    monkeypatch.setattr(os, "open", lambda path, flags: (opened.append((path, flags)), original(path, flags))[1])
    (tmp_path / "file").write_text("x")
    checkpoints.flush(tmp_path), checkpoints.flush(tmp_path / "file")
    monkeypatch.setattr(checkpoints, "WINDOWS", True)
    checkpoints.flush(tmp_path), checkpoints.flush(tmp_path / "file")
    assert opened == [(tmp_path, os.O_RDONLY), (tmp_path / "file", os.O_RDONLY), (tmp_path / "file", os.O_RDWR)]


def test_a_checkpoint_says_what_it_holds(run):
    checkpoint = run.step(5).save()
    assert checkpoint == run.folder / "checkpoint-5" and names(run.folder) == ["checkpoint-5"]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["ema_step"], manifest["run"]) == (5, 5, IDENTITY)
    assert sorted(manifest["files"]) == [name for name in names(checkpoint) if name != "manifest.json"]
    assert damage(checkpoint) is None


def test_saving_does_not_change_the_run(run, tmp_path):
    before = run.step(5).state()
    run.save()
    assert_same(run.state(), before)


@pytest.mark.parametrize("name", IDENTITY)
def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(run, name):
    checkpoint = run.step(5).save()
    run.step()
    before = run.state()
    with pytest.raises(ValueError, match=rf"belongs to another run: {name} was {IDENTITY[name]!r} and is 'other'"):
        run.load(checkpoint, IDENTITY | {name: "other"})
    assert_same(run.state(), before)


def test_a_checkpoint_of_an_earlier_version_that_recorded_less_is_resumed(run):
    checkpoint = run.step(5).save()
    again = Run(run.folder, seed=1).load(checkpoint, IDENTITY | {"classes": ["cat"]})
    assert_same(again.state(), run.state())


# -------------------------------------------------------------------- which one


@pytest.fixture
def three(run):
    for _ in range(3):
        run.step(5).save()
    return run


def test_latest_is_the_newest_by_number(run):
    for steps in (9, 1, 90):  # 9, 10, 100: not by name
        run.step(steps).save()
    assert [path.name for path in list_checkpoints(run.folder)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert find_checkpoint(run.folder, "latest").name == "checkpoint-100"


def test_a_checkpoint_may_be_named_by_path_or_by_name(three, tmp_path, monkeypatch):
    assert find_checkpoint(three.folder, "checkpoint-5") == three.folder / "checkpoint-5"
    assert find_checkpoint(tmp_path / "elsewhere", str(three.folder / "checkpoint-5")) == three.folder / "checkpoint-5"
    monkeypatch.chdir(three.folder)
    assert find_checkpoint(tmp_path / "elsewhere", "checkpoint-5").resolve() == three.folder / "checkpoint-5"


def test_other_folders_with_similar_names_are_no_checkpoints(three):
    for name in ("checkpoint-best", "checkpoint-20.old", "checkpoint-", ".checkpoint-25.partial", "my-checkpoint-30"):
        shutil.copytree(three.folder / "checkpoint-15", three.folder / name)
    assert find_checkpoint(three.folder, "latest") == three.folder / "checkpoint-15"
    assert len(list_checkpoints(three.folder)) == 3


def test_a_named_checkpoint_that_does_not_exist_is_refused(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint is checkpoint-5.*manifest\.json"):
        find_checkpoint(tmp_path, "checkpoint-5")


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_limit_keeps_the_newest(run, limit):
    for _ in range(4):
        run.step(5).save(limit)
    kept = [f"checkpoint-{step}" for step in (20, 15, 10, 5)][:limit]
    assert [path.name for path in list_checkpoints(run.folder)] == kept and len(names(run.folder)) == len(kept)


def test_a_limit_never_removes_the_checkpoint_just_written(three):
    """Older runs may have left checkpoints with higher numbers."""
    three.steps = 6
    assert three.save(total_limit=1).is_dir()
    assert damage(three.folder / "checkpoint-6") is None


# -------------------------------------------------------------------- damage


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_last(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


FILES = ["model.safetensors", "ema.safetensors", "optimizer.bin", "timestep_sampler.safetensors", "random_states_0.pkl"]


@pytest.mark.parametrize("harm", [truncate, empty, flip, flip_last, lengthen, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(three, name, harm):
    harm(three.folder / "checkpoint-15" / name)
    assert damage(three.folder / "checkpoint-15").startswith(f"{name} ")
    with pytest.raises(ValueError, match=rf"checkpoint-15 is not a whole checkpoint: {name} "):
        find_checkpoint(three.folder, "checkpoint-15")


def garble(path):
    path.write_text(json.dumps([1, 2]))


def forget_files(path):
    path.write_text(json.dumps({"step": 15}))


@pytest.mark.parametrize("harm", [truncate, empty, flip_last, remove, garble, forget_files])
def test_a_damaged_manifest_is_damage(three, harm):
    harm(three.folder / "checkpoint-15" / "manifest.json")
    assert "manifest.json" in damage(three.folder / "checkpoint-15")


def test_a_manifest_of_another_step_is_damage(three):
    path = three.folder / "checkpoint-15" / "manifest.json"
    path.write_text(path.read_text().replace('"step": 15', '"step": 17'))
    assert "manifest.json" in damage(three.folder / "checkpoint-15")


def test_latest_skips_damaged_checkpoints_and_reports_them(three, caplog):
    truncate(three.folder / "checkpoint-15" / "optimizer.bin")
    remove(three.folder / "checkpoint-10" / "manifest.json")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(three.folder, "latest") == three.folder / "checkpoint-5"
    first, second = (record.getMessage() for record in caplog.records)
    assert "skipping" in first and "checkpoint-15" in first and "optimizer.bin" in first
    assert "skipping" in second and "checkpoint-10" in second and "manifest.json" in second


def test_looking_for_checkpoints_needs_no_accelerator_and_rank_0_alone_reports(three, caplog, monkeypatch):
    remove(three.folder / "checkpoint-15" / "manifest.json")
    reset_accelerate()
    assert find_checkpoint(three.folder, "latest") == three.folder / "checkpoint-10" and len(caplog.records) == 1
    monkeypatch.setenv("RANK", "1")
    assert find_checkpoint(three.folder, "latest") == three.folder / "checkpoint-10" and len(caplog.records) == 1


def test_latest_without_a_whole_checkpoint_is_an_error(three):
    for step in (5, 10, 15):
        flip(three.folder / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        find_checkpoint(three.folder, "latest")


# -------------------------------------------------------------------- interruptions


class Interruption(BaseException):
    """As a signal would."""


STAGES = {
    "the weights": (Accelerator, "save_state"),
    "the average": (checkpoints, "save_file"),
    "the digests": (checkpoints, "digest"),
    "flushing": (checkpoints, "flush"),
    "the name": (os, "replace"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_write_is_ignored_and_overwritten(three, monkeypatch, stage):
    before = contents(three.folder)
    three.step(5)

    def interrupt(*args, **kwargs):
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], interrupt)
        with pytest.raises(Interruption):
            three.save()
    after = contents(three.folder)
    assert {name: after[name] for name in before} == before
    assert not (three.folder / "checkpoint-20").exists()
    assert find_checkpoint(three.folder, "latest") == three.folder / "checkpoint-15"

    (three.folder / ".checkpoint-20.partial").mkdir(exist_ok=True)
    (three.folder / ".checkpoint-20.partial" / "leftover").write_text("of the first try")
    checkpoint = three.save()
    assert damage(checkpoint) is None and "leftover" not in names(checkpoint)
    assert names(three.folder) == [f"checkpoint-{step}" for step in (10, 15, 20, 5)]


def fails(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_write_is_reported_and_leaves_older_checkpoints_alone(three, monkeypatch, stage):
    before = contents(three.folder)
    three.step(5)
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fails)
        with pytest.raises(RuntimeError, match=r"could not write .*checkpoint-20: .*No space left on device"):
            three.save(total_limit=1)
    assert contents(three.folder) == before
    assert find_checkpoint(three.folder, "latest") == three.folder / "checkpoint-15"
    assert damage(three.save(total_limit=1)) is None and names(three.folder) == ["checkpoint-20"]


@pytest.mark.parametrize("size", [0, 300, 1500])
def test_a_real_failure_to_write_is_reported_alike(three, size):
    """safetensors and torch.save raise their own exceptions for a full disk.

    Here the kernel refuses files of more than `size` bytes, so that one or the other fails
    first.
    """
    before = contents(three.folder)
    three.step(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(RuntimeError, match=r"could not write .*checkpoint-20"):
            three.save(total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(three.folder) == before


def test_a_failure_to_rewrite_a_step_keeps_its_first_checkpoint(three, monkeypatch):
    before = contents(three.folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(RuntimeError, match="could not write"):
            three.save()
    assert contents(three.folder) == before


def test_rewriting_a_step_replaces_its_first_checkpoint(three):
    (three.folder / "checkpoint-15" / "leftover").write_text("of the first try")
    checkpoint = three.save()
    assert damage(checkpoint) is None and "leftover" not in names(checkpoint)
    assert len(names(three.folder)) == 3


@pytest.mark.parametrize("schedule", ["laplace", "sigmoid", "linear"])
def test_a_run_resumes_by_the_name_of_its_schedule_as_checkpoints_of_earlier_versions_have_it(schedule):
    """And not by what stands in its place for stock schedulers."""
    scheduler = DDPMNotesScheduler(10, beta_schedule=schedule)
    learner = Learner(Accelerator(cpu=True), CoinDenoiser.from_scheduler(scheduler), scheduler, RunArguments("run"))
    identity = learner.checkpoint_state("images", ["a", "b"]).identity
    assert (identity["images"], identity["classes"]) == ("images", ["a", "b"])
    assert (identity["scheduler.beta_schedule"], identity["scheduler.trained_betas"]) == (schedule, None)
