"""TrainingRun from Python: in this process, without signal handlers, in any thread, again and
again.
"""

import dataclasses
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.hub import push
from ddpm_notes_pipeline.training.arguments import DataArguments, ModelArguments, RunArguments
from ddpm_notes_pipeline.training.results import save_model
from ddpm_notes_pipeline.training.run import TrainingRun
from ddpm_notes_pipeline.training.stops import Stopped, Stops
from tests.support.comparing import assert_same, losses, weights

FOLDER = {"checkpoint-2", "loss.jsonl", "loss.png", "samples.png", "trajectory.gif", "README.md", "unet", "scheduler"}
FOLDER |= {"model_index.json", "pipeline.py", "training_config.yaml", "training_run.json"}


@pytest.fixture
def make(tmp_path) -> Callable[..., TrainingRun]:
    """A run of two steps on 8 digits by a network of 0.02 M weights; keywords change its
    RunArguments, `data` and `model` its other arguments.
    """

    def make(
        name: str = "run",
        stops: Stops | None = None,
        data: dict | None = None,
        model: dict | None = None,
        **changes: object,
    ) -> TrainingRun:
        images = DataArguments(dataset_name="digits", max_train_samples=8, cache_dir=str(tmp_path / "cache"))
        network = ModelArguments(block_out_channels=[8, 8], layers_per_block=1, ddpm_num_steps=10)
        run = RunArguments(output_dir=str(tmp_path / name), max_train_steps=2, train_batch_size=4, report_to="none")
        short = {"num_samples": 2, "ddpm_num_inference_steps": 2, **changes}
        parts = ((images, data), (network, model), (run, short))
        return TrainingRun(*(dataclasses.replace(part, **(changed or {})) for part, changed in parts), stops=stops)

    return make


def test_a_run_from_python_takes_two_steps_and_leaves_a_model(make, tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = make()
    run.train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == FOLDER
    assert len(losses(tmp_path / "run")) == 2
    saved = DDPMNotesPipeline.from_pretrained(tmp_path / "run").unet
    # it stays usable, averaged
    assert_same(dict(run.learner.unet.state_dict()), dict(saved.state_dict()))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 images of 1x8x8 from digits, 0.02 M weights")
    assert [line.split(":")[0] for line in lines[1:]] == ["Learned", "Where", "Load", "Longer", "Your own"]
    # not pytest's flags
    assert 'TrainingRun with resume_from_checkpoint="latest" and max_train_steps=4' in lines[4]


def test_a_thread_other_than_the_main_one_trains(make, tmp_path):
    """As a notebook's server or a web app may."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            make().train()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and {path.name for path in (tmp_path / "run").iterdir()} == FOLDER


def test_a_second_run_in_the_process_is_not_bound_to_the_settings_of_the_first(make, tmp_path):
    """accelerate keeps its state in the process and refuses another precision."""
    make("first").train()
    make("half", mixed_precision="bf16").train()
    make("again").train()
    assert losses(tmp_path / "again") == losses(tmp_path / "first") != losses(tmp_path / "half")
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "first"))


def test_a_run_that_failed_leaves_the_next_one_alone(make, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        make("full")
    with pytest.raises(ValueError, match="--train_batch_size is 4 with --gradient_accumulation_steps 3"):
        make(gradient_accumulation_steps=3)
    broken = make("broken")
    with pytest.raises(RuntimeError, match="in the middle"):
        for step, batch in broken.batches():
            broken.update(step, batch)
            raise RuntimeError("in the middle")
    make("next", mixed_precision="bf16").train()
    assert {path.name for path in (tmp_path / "next").iterdir()} == FOLDER


def test_a_run_that_fails_lets_go_of_its_tracker_and_its_progress_bar(make, monkeypatch):
    """A notebook goes on living, and its next run would find them."""
    run = make(report_to="tensorboard")
    trackers = [thread for thread in threading.enumerate() if thread.name == "tracker"]
    assert trackers

    def fail(step: int) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(run, "after", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run.train()
    for thread in trackers:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in trackers)
    assert run.progress.bar.disable  # as `tqdm.close` leaves it


def test_the_loop_written_out_is_that_of_train(make, tmp_path):
    make("train").train()
    run = make("loop")
    seen = []
    for step, batch in run.batches():
        seen.append((step, tuple(batch["pixel_values"].shape)))
        run.update(step, batch)
        run.after(step)
        assert not run.stopped
    run.finish()
    assert seen == [(0, (4, 1, 8, 8)), (1, (4, 1, 8, 8))]
    assert_same(weights(tmp_path / "loop"), weights(tmp_path / "train"))


def test_a_stop_from_python_saves_a_checkpoint_and_the_run_resumes_bit_for_bit(make, tmp_path):
    make("straight").train()
    stops = Stops()
    run = make("run", stops)
    with pytest.raises(
        Stopped, match=r'after step 1 of 2, .*Resume: the same TrainingRun with resume_from_checkpoint="l'
    ):
        for step, batch in run.batches():
            run.update(step, batch)
            stops.received = signal.SIGTERM  # what the handler would do
            run.after(step)
            if run.stopped:
                break
        run.finish()
    make("run", resume_from_checkpoint="latest").train()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_a_run_does_not_resume_with_its_classes_in_another_order(make, tmp_path):
    """The images are the same: nothing else would tell."""
    of_classes = {"label_column": "label", "max_train_samples": None}
    make(data=of_classes | {"classes": ["0", "1"]}).train()
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    with pytest.raises(ValueError, match=r"another run: classes was \['0', '1'\] and is \['1', '0'\]"):
        make(data=of_classes | {"classes": ["1", "0"]}, **again)
    make(data=of_classes | {"classes": ["0", "1"]}, **again).train()
    assert len(losses(tmp_path / "run")) == 3


def test_a_model_that_learns_other_classes_is_named_by_these(make, tmp_path):
    base = {"label_column": "label", "max_train_samples": None}
    make("base", data=base | {"classes": ["4", "7", "9"]}).train()
    model = {"pretrained_model_name_or_path": str(tmp_path / "base")}
    with pytest.warns(UserWarning, match=r"not those of .*base: label 0 was 4 and is 9, label 1 was 7 and is 4$"):
        make(data=base | {"classes": ["9", "4"]}, model=model).train()
    config = json.loads((tmp_path / "run" / "unet" / "config.json").read_text())
    assert config["_ddpm_notes"] == {"null_label": 3, "class_names": ["9", "4", "9"]}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "It takes class labels 0 to 2 (9, 4, 9)." in card
    assert ", classes 9, 4, split train" in card
    assert "| started from | ./base |" in card and " times each in this run: samples " in card
    assert "started from" not in (tmp_path / "base" / "README.md").read_text()


def test_settings_from_python_are_checked_like_flags(make, tmp_path):
    for changes, message in (
        ({"learning_rate": -1.0}, "--learning_rate is -1.0; it must be above 0"),
        ({"metric_interval": 1}, "--metric_interval is 1 with no --validation_split"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes)
    assert not (tmp_path / "run").exists()


def test_the_record_of_a_run_keeps_its_keys(make, tmp_path):
    """The card and what is published read them."""
    make().train()
    record = json.loads((tmp_path / "run" / "training_run.json").read_text())
    expected = """
        data split images images_skipped dims fingerprint data_license hub_dataset base_model
        objective loss loss_steps steps train_batch_size seed weights mixed_precision processes hardware seconds
        steps_of_launch images_per_second date versions command
    """
    assert list(record) == expected.split()
    assert (record["data"], record["images"], record["dims"], record["steps"]) == ("digits", 8, [1, 8, 8], 2)


def test_finishing_before_the_last_step_is_refused(make, tmp_path):
    """Its weights would be saved as those of the last step."""
    run = make()
    for step, batch in run.batches():
        run.update(step, batch)
        run.after(step)
        break
    with pytest.raises(RuntimeError, match="finish was called before step 2"):
        run.finish()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_run_from_an_earlier_checkpoint_sets_the_later_ones_aside(make, tmp_path, capsys):
    """Otherwise "latest" would go back to the weights that were given up."""
    folder = tmp_path / "run"
    make(checkpointing_steps=1, max_train_steps=4).train()
    given_up = (folder / "checkpoint-3" / "model.safetensors").read_bytes()
    capsys.readouterr()
    again = {"resume_from_checkpoint": "checkpoint-1", "learning_rate": 1e-2, "checkpointing_steps": 1}
    make(**again).train()
    said = (
        "training goes on from step 1: later checkpoints are now checkpoint-4.old, checkpoint-3.old, checkpoint-2.old"
    )
    assert said in capsys.readouterr().out.splitlines()
    old = ["checkpoint-2.old", "checkpoint-3.old", "checkpoint-4.old"]
    assert checkpoints(folder) == sorted(["checkpoint-1", "checkpoint-2", *old])
    assert (folder / "checkpoint-3.old" / "model.safetensors").read_bytes() == given_up
    make(**again | {"resume_from_checkpoint": "latest", "max_train_steps": 3}).train()
    assert f"resuming from {folder}/checkpoint-2 at step 2" in capsys.readouterr().out
    make(**again, max_train_steps=2).train()  # a second time: no name is taken twice
    assert {"checkpoint-2.old1", "checkpoint-3.old1"} < set(checkpoints(folder))


def test_a_run_that_goes_on_in_another_folder_counts_the_steps_of_both(make, tmp_path, capsys):
    make("one").train()
    capsys.readouterr()
    make("two", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"), max_train_steps=5).train()
    record = json.loads((tmp_path / "two" / "training_run.json").read_text())
    assert (record["steps"], record["steps_of_launch"]) == (5, 3) and record["images_per_second"] > 0
    said = capsys.readouterr().out
    assert "Learned:   5 steps on 8 images" in said and "and checkpoint-5/." in said and "max_train_steps=10" in said


def test_a_resumed_run_has_the_optimizer_that_it_asks_for(make, tmp_path):
    make().train()
    asked = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_weight_decay": 0.25, "adam_epsilon": 1e-3}
    make(resume_from_checkpoint="latest", max_train_steps=3, **asked).train()
    (group,) = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.75), 0.25, 1e-3)


def test_more_sampling_steps_than_the_model_has_are_refused_before_training(make, tmp_path):
    make("base").train()
    model = {"pretrained_model_name_or_path": str(tmp_path / "base")}
    with pytest.raises(ValueError, match="--ddpm_num_inference_steps is 11; it must be at most 10, the model's"):
        make(model=model, ddpm_num_inference_steps=11)
    assert not (tmp_path / "run" / "loss.jsonl").exists()


@pytest.mark.filterwarnings("ignore:alpha_bar at the path")
def test_levels_that_gain_too_little_are_not_fitted_twice_to_the_same_weights(make, monkeypatch):
    """At the end, once for the last bits/dim; the model is saved without levels."""
    calls = []

    def fit(*arguments, **settings) -> SimpleNamespace:
        calls.append(arguments)
        return SimpleNamespace(levels=None)

    monkeypatch.setattr("ddpm_notes_pipeline.training.measurements.fit_image_levels", fit)
    run = make(data={"validation_split": "test", "max_validation_images": 8}, validation_steps=1)
    run.train()
    assert len(calls) == 2  # after each of the two steps
    assert run.learner.scheduler.levels is None


@pytest.mark.filterwarnings("ignore:alpha_bar at the path")
def test_the_bits_per_dim_of_a_bf16_run_are_those_of_float32(make, tmp_path):
    """evaluate.py, which measures in float32, finds the number on the card."""
    data = {"validation_split": "test", "max_validation_images": 8}
    run = make(data=data, mixed_precision="bf16", fit_levels=False)
    run.train()
    row = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[-1])
    images = load_images("digits", split="test", max_samples=8, cache_dir=tmp_path, show_progress=False)
    pipeline = DDPMNotesPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    exact = pipeline.bits_per_dim(images.take(range(8))).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = pipeline.bits_per_dim(images.take(range(8))).total
    assert row["bits_per_dim"] == pytest.approx(exact, rel=1e-6) != pytest.approx(rounded, rel=1e-6)
    x, t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    with torch.no_grad():  # the network that is left computes in float32, too
        torch.testing.assert_close(run.learner.unet(x, t).sample, pipeline.unet(x, t).sample)


def test_a_snapshot_that_cannot_be_written_is_not_pushed_and_training_goes_on(make, tmp_path, monkeypatch, caplog):
    """A full disk, for instance: there is no room for the weights a second time."""
    run = make(checkpointing_steps=1)
    pushed = []
    run.pushes = SimpleNamespace(push=lambda folder, message: pushed.append((folder.name, message)))

    def full(folder: Path, *args: object) -> None:
        if folder.name == ".push-1":
            folder.mkdir()
            raise OSError("No space left on device")
        save_model(folder, *args)

    monkeypatch.setattr("ddpm_notes_pipeline.training.run.save_model", full)
    run.train()
    assert not pushed and not (tmp_path / "run" / ".push-1").exists()
    assert "No space left on device. Training continues; the next push has everything" in caplog.text
    assert (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.filterwarnings("ignore:alpha_bar at the path")
def test_numbers_of_older_weights_are_not_published(make, tmp_path):
    """A second, longer run without validation images leaves the evaluation of the first."""
    data = {"validation_split": "test", "max_validation_images": 8}
    make(data=data, fit_levels=False).train()
    names = {"evaluation.json", "bits_per_dim.png"}
    assert names < set(push.export_folder(tmp_path / "run", tmp_path / "first"))
    make(resume_from_checkpoint="latest", max_train_steps=3, fit_levels=False).train()
    assert not names & set(push.export_folder(tmp_path / "run", tmp_path / "second"))
    assert (tmp_path / "run" / "evaluation.json").exists()
