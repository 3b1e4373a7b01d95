"""A training run: images -> batches -> objective -> scheduler -> network -> step -> results.

    run = TrainingRun(DataArguments("digits"), ModelArguments(), RunArguments(max_train_steps=500))
    run.train()

It works from a script, a notebook or pytest: it takes no signals and never ends the process.
"""

import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.batches import StepBatches
from ..data.streaming import StreamedBatches
from ..evaluation.pictures import Trajectory, image_grid, save_losses, save_samples
from ..evaluation.records import of_classes
from ..evaluation.validation import Row, save_evaluation
from ..hub.card import weights_digest, write_card
from ..hub.push import BackgroundPushes
from ..names import EVALUATIONS_PER_IMAGE
from ..pipeline_ddpm_notes import BitsPerDimOutput, DDPMNotesPipeline
from .arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    check_arguments,
    is_local,
    warmup_steps,
)
from .checkpoints import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint, set_aside_later
from .commands import num_processes, resume_command
from .held_out import seen_in_training
from .images import count_of, dims, load_training_images
from .learner import Learner
from .logs import LOGS, RunLogs, warning_once
from .measurements import Measurements
from .networks import check_sampling_steps, make_model
from .results import open_repo, publish, save_model, summary
from .stops import Stopped, Stops, failing_together
from .trackers import find_tracker

logger = logging.getLogger(__name__)

MOST_ROWS = 12  # of a picture of samples with a row per class
# Half-written folders that a stop may leave.
LEFTOVERS = (".checkpoint-*.partial", ".checkpoint-*.replaced", ".push-*")


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        first: steps done before this launch. steps: all of the run.
        signal: number of the signal that stops it; 0: none.
        bad_images: unreadable images that this rank's stream has met; None without a stream.
    """

    first: int
    steps: int
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))
    signal: int = 0
    bad_images: torch.Tensor | None = None


class TrainingRun:
    """Trains, saves and publishes a DDPM. One at a time in a process.

        for step, batch in run.batches():
            run.update(step, batch)
            run.after(step)
            if run.stopped:
                break
        run.finish()

    All methods are collective: every rank must call them.

    Args:
        stops: where to learn of signals. Default: nowhere; ctrl-C is a KeyboardInterrupt.

    Attributes:
        learner: what is trained; `learner.unet` has the averaged weights after `finish`.
        logs: what is written at each step.
        measurements: bits/dim, sample metrics and samples on the way.

    Raises:
        ValueError: settings that contradict each other, the images or the folder.
        PublishingError: with `push_to_hub`, a repository that cannot be written to.
    """

    def __init__(
        self, data: DataArguments, model: ModelArguments, run: RunArguments, stops: Stops | None = None
    ) -> None:
        check_arguments(data, model, run)
        self.settings = Arguments(data, model, run)
        self.stops = stops or Stops()
        self.accelerator = start_accelerate(run)
        self.output_dir = Path(run.output_dir)
        set_seed(run.seed)
        prepare_output_dir(self.accelerator, self.output_dir, run)
        self.repo_id = open_repo(self.accelerator, run)
        with warning_once(self.accelerator):
            self.images = load_training_images(self.accelerator, data, run.seed)
            unet, scheduler = make_model(model, self.images.train)
            self._check_held_out()
        check_sampling_steps(scheduler, run.ddpm_num_inference_steps)
        steps = run.max_train_steps or math.ceil(run.num_epochs * len(self.images.stored) / run.train_batch_size)
        warmup = warmup_steps(run, steps)
        if warmup < (run.lr_warmup_steps or 0):
            shortened = f"{warmup} steps instead of {run.lr_warmup_steps}"
            self.accelerator.print(f"warm-up: {shortened}, since training ends after {steps}")
        self.learner = Learner(self.accelerator, unet, scheduler, run)
        self.measurements = Measurements(self.learner, self.images, self.stops, data.cache_dir)
        self.progress = Progress(self._resume(steps), steps)
        self.learner.schedule(self.progress.first, steps, warmup)
        self.loader = self._make_loader()
        self.accelerator.print(self._description())
        clear_leftovers(self.accelerator, self.output_dir, self.progress.first, run)
        self.stops.hold(self.accelerator)
        self.logs = RunLogs(self.accelerator, self.settings, self.progress.first)
        self.pushes = None
        if self.repo_id is not None and run.hub_strategy == "every_save":
            self.pushes = BackgroundPushes(self.repo_id, run.license)
        unet.train()

    def train(self) -> None:
        """The whole run, to its end or to a signal.

        Raises:
            Stopped: a signal ended it; a checkpoint holds the last step.
            NotPublishedError: the last push failed; all is on disk.
            CheckpointError, OSError, FloatingPointError, FailedElsewhere: it cannot continue.
        """
        try:
            for step, batch in self.batches():
                self.update(step, batch)
                self.after(step)
                if self.stopped:
                    break
            self.finish()
        except (Exception, KeyboardInterrupt):
            self.close()
            raise

    def close(self) -> None:
        """Close progress bar and tracker, of a run that fails before `finish` has ended."""
        self.progress.bar.close()
        self.logs.tracker.close()

    # ----------------------------------------------------------------- the loop

    def batches(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Each remaining step, counted from 0, with this rank's share of its batch."""
        first, steps = self.progress.first, self.progress.steps
        self.logs.loss.start()
        learned = first > 0 or self.settings.model.pretrained_model_name_or_path is not None
        if learned and first < steps:
            self._validate(first)
        disable = not self.accelerator.is_main_process
        self.progress.bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=disable)
        yield from enumerate(self.loader, start=first)

    def update(self, step: int, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step."""
        self.logs.loss.waiting.append(self.learner.update(step, batch))
        self.progress.bad_images = batch.get("bad_images")
        self.progress.bar.update()

    def after(self, step: int) -> None:
        """What is due after a step: log, checkpoint, push, validation, samples."""
        run, done, is_last = self.settings.run, step + 1, step + 1 == self.progress.steps
        self.progress.signal = self.stops.agreed()
        checkpoint_due = self.stopped or done % run.checkpointing_steps == 0
        if checkpoint_due or is_last or done % run.logging_steps == 0:
            self.logs.loss.write(self.progress.bar)
            self.learner.guard.check()
        if checkpoint_due and not is_last:
            with self.logs.loss.paused():
                self._save_checkpoint(done)
            self.progress.signal = self.stops.agreed()  # one may have come meanwhile
            if not self.stopped:
                self._push_snapshot(done)
        if self.stopped or is_last:
            return
        self._validate(done)
        if run.metric_interval and done % run.metric_interval == 0 and not self.logs.metrics.has(done):
            self.measurements.measure_samples(done, self.logs)
        if run.sample_steps and done % run.sample_steps == 0:
            self._save_samples(done)

    @property
    def stopped(self) -> bool:
        """Whether a signal asks the run to stop; the same on every rank."""
        return self.progress.signal != 0

    def finish(self) -> None:
        """Save model, samples and card, print a summary, publish; free the process group."""
        progress, logs, run = self.progress, self.logs, self.settings.run
        progress.bar.close()
        if logs.loss.step < progress.steps:
            self._stop()
        if progress.bad_images is not None:
            self.images.skipped = int(self.accelerator.reduce(progress.bad_images.to(self.accelerator.device), "sum"))
        self._save_checkpoint(progress.steps)
        bits_per_dim = self._validate(progress.steps)
        self.measurements.fit_levels(progress.steps, logs)
        self.measurements.measure_samples(progress.steps, logs)
        self.learner.keep_average()
        with failing_together(self.accelerator, f"could not write the model to {self.output_dir}"):
            if self.accelerator.is_main_process:
                self._write_model(bits_per_dim)
        self._write_samples()
        try:
            skipped, yardsticks = self.learner.guard.skipped, self.measurements.yardsticks
            self.accelerator.print(summary(self.settings, self.images, logs, skipped, yardsticks), flush=True)
            if self.repo_id is not None:
                publish(self.output_dir, self.repo_id, run, self.pushes)
        finally:
            # DDP before the process group, or its destructor may hang.
            self.learner.unwrap()
            self.accelerator.free_memory()
            self.accelerator.end_training()

    # ----------------------------------------------------------------- its parts

    def _check_held_out(self) -> None:
        """Refuse to validate a given model on images that it was trained on.

        A warning for a folder, which may be another one of the same name.
        """
        data, model, run = self.settings
        base = model.pretrained_model_name_or_path
        if base is None or data.validation_share is None:
            return
        fault = seen_in_training(base, model.revision, data, run.seed, self.images.stored)
        if fault is not None and not is_local(data.train_data_dir or data.dataset_name):
            raise ValueError(fault)
        if fault is not None:
            warnings.warn(f"unless these are other images than those of {base}: {fault}", stacklevel=3)

    def _resume(self, steps: int) -> int:
        """Restore the checkpoint that was asked for; returns the number of steps done."""
        wanted = self.settings.run.resume_from_checkpoint
        checkpoint = find_checkpoint(self.output_dir, wanted) if wanted else None
        if checkpoint is None:
            if wanted:
                self.accelerator.print(f"{self.output_dir} has no checkpoint yet: starting at the beginning")
            return 0
        done = load_checkpoint(self.accelerator, checkpoint, self._checkpoint_state())
        if done > steps:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint} is from step {done}, and training ends at step {steps}; give more steps"
            )
        self.accelerator.print(f"resuming from {checkpoint} at step {done}")
        return done

    def _make_loader(self) -> DataLoader:
        data, _, run = self.settings
        null_label = DDPMNotesPipeline(self.learner.unet, self.learner.scheduler).null_label
        kind: Any = StreamedBatches if data.streaming else StepBatches
        batches = kind(
            self.images.train,
            run.train_batch_size,
            run.seed,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            random_flip=data.random_flip,
            label_dropout=0.0 if null_label is None else data.label_dropout,
            null_label=null_label,
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.progress.first, self.progress.steps),
            num_workers=data.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _checkpoint_state(self) -> Any:
        return self.learner.checkpoint_state(self.images.train.fingerprint, self.images.train.class_names)

    def _save_checkpoint(self, done: int) -> None:
        limit = self.settings.run.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, done, self._checkpoint_state(), limit)

    def _validate(self, done: int) -> BitsPerDimOutput | None:
        """bits/dim, if they are due.

        Those of the last step are measured even if they are logged: an earlier launch may have been
        killed before it wrote evaluation.json.
        """
        is_last = done == self.progress.steps
        due = done % self.settings.run.validation_steps == 0 and not self.logs.validation.has(done)
        return self.measurements.validate(done, self.logs) if is_last or due else None

    def _save_samples(self, done: int) -> None:
        """A grid of samples of the averaged weights, beside real images."""
        with self.logs.loss.paused():
            samples = self.measurements.sample_grid()
        with failing_together(self.accelerator, f"could not write {self.output_dir}/samples-{done}.png"):
            if self.accelerator.is_main_process and samples is not None:
                self._draw(f"samples-{done}.png", samples, f"step {done}", done)

    def _push_snapshot(self, done: int) -> None:
        """Push the averaged weights in the background. A full disk skips the push alone."""
        if self.pushes is None:
            return
        with self.logs.loss.paused():
            snapshot = self.output_dir / f".push-{done}"  # removed after the push
            try:
                with self.learner.averaged():
                    save_model(snapshot, self.learner, self.images, self.settings, self.logs)
            except Exception as error:  # torch and safetensors raise their own types for a full disk
                shutil.rmtree(snapshot, ignore_errors=True)
                logger.warning(
                    "could not write %s: %s. Training continues; the next push has everything", snapshot, error
                )
                return
        self.pushes.push(snapshot, f"Step {done} of {self.progress.steps}")

    def _write_model(self, bits_per_dim: BitsPerDimOutput | None) -> None:
        """The finished model with its figures and its card; its samples will take a while."""
        run, scheduler, table = self.settings.run, self.learner.scheduler, self.measurements.table
        save_model(self.output_dir, self.learner, self.images, self.settings, self.logs)
        if bits_per_dim is not None and self.images.validation is not None:
            every_timestep = list(reversed(range(len(scheduler))))
            save_evaluation(
                self.output_dir,
                self.images.validation,
                [Row.of(scheduler, "even", every_timestep, bits_per_dim)],
                weights_digest(self.output_dir),
                evaluations_per_image=EVALUATIONS_PER_IMAGE,
                metrics=table.as_list(last=True) if table else None,
                yardsticks=self.measurements.yardsticks,
            )
        title = f"{run.objective} loss on {self.images.train.name}"
        save_losses(self.output_dir / "loss.png", *self.logs.loss.history(), title, self.logs.validation.rows)
        write_card(self.output_dir, self.repo_id, run.license)

    def _write_samples(self) -> None:
        """samples.png and trajectory.gif of the finished model, and a card that shows them."""
        run, scheduler, trajectory = self.settings.run, self.learner.scheduler, Trajectory()
        samples = self.measurements.sample_grid(watch=trajectory)
        where = f"with training done and the model in {self.output_dir}"
        if samples is None:
            self.close()
            raise Stopped(self.stops.agreed(), f"{where}, but no samples. Resume: {resume_command(run.command)}")
        with failing_together(self.accelerator, f"could not write {self.output_dir}/samples.png"):
            if self.accelerator.is_main_process:
                title = f"samples: {run.ddpm_num_inference_steps or len(scheduler)} steps, {scheduler.variance_type}"
                self._draw("samples.png", samples, title, self.progress.steps)
                trajectory.save(self.output_dir / "trajectory.gif")
                write_card(self.output_dir, self.repo_id, run.license)
        self.logs.tracker.close()
        self.stops.release(where)

    def _stop(self) -> None:
        """End a run before its last step."""
        if self.pushes is not None:
            self.pushes.abandon()
        self.close()
        done, steps = self.logs.loss.step, self.progress.steps
        if not self.stopped:
            raise RuntimeError(f"finish was called before step {steps}, and no signal stopped the run")
        where = f"after step {done} of {steps}, which {self.output_dir}/checkpoint-{done} holds"
        raise Stopped(self.progress.signal, f"{where}. Resume: {resume_command(self.settings.run.command)}")

    def _draw(self, name: str, samples: np.ndarray, title: str, step: int) -> None:
        """Samples beside real images, as a file of the folder; samples alone, in the tracker.

        A row per class, if there are a few classes.
        """
        images, of_samples, labels = self.images, self.measurements.grid_labels(), None
        if of_samples is None or len(set(of_samples)) > MOST_ROWS:
            real = images.evenly_spaced(self.settings.run.num_samples)
        else:
            real, of_real = images.of_classes(of_samples)
            labels = of_real, np.array(of_samples)
        save_samples(self.output_dir / name, real, samples, title, labels, images.train.class_names)
        self.logs.tracker.log_image(step, "samples", image_grid(samples))

    def _description(self) -> str:
        """The first line: images, network, steps, batch, processes."""
        run, unet, images, progress = self.settings.run, self.learner.unet, self.images.train, self.progress
        validation = self.images.validation
        held_out = "" if validation is None else f", bits/dim on {count_of(validation)} of {validation.split!r}"
        processes, parts = self.accelerator.num_processes, run.gradient_accumulation_steps
        share = run.train_batch_size // processes
        return (
            f"{count_of(images)} of {dims(images)} from {images.name}{of_classes(images.source.classes)}{held_out}, {unet.num_parameters() / 1e6:.2f} M weights in "
            f"levels of {'-'.join(map(str, unet.config.block_out_channels))} channels, steps {progress.first} to "
            f"{progress.steps} of {run.train_batch_size} images in all, {share} per process in {parts} accumulation "
            f"step(s) of {share // parts}, on {processes} process(es) of {self.accelerator.device.type}, "
            f"{run.mixed_precision} mixed precision"
        )


def reset_accelerate() -> None:
    """Forget accelerate's state, which is the process's and would bind the next accelerator."""
    if is_initialized():
        for state in (AcceleratorState(), GradientState(), PartialState()):
            vars(state).clear()


def start_accelerate(run: RunArguments) -> Accelerator:
    """An accelerator for this run, whatever an earlier one in this process used.

    Raises:
        ValueError: a launch that looks distributed and is not: each process would train alone.
    """
    tracker = find_tracker(run.report_to)
    reset_accelerate()
    accelerator = Accelerator(mixed_precision=run.mixed_precision, log_with=tracker, project_dir=run.output_dir)
    if num_processes() != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {num_processes()} and accelerate runs {accelerator.num_processes} process(es). On CPUs, start "
            "several processes by: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N "
            "training/train.py ..."
        )
    return accelerator


def prepare_output_dir(accelerator: Accelerator, output_dir: Path, run: RunArguments) -> None:
    """Make the folder, or raise ValueError rather than write over somebody's files. Collective."""
    present = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    checkpoints, wanted = list_checkpoints(output_dir), run.resume_from_checkpoint
    if wanted and not checkpoints:  # a run that was stopped before its first one
        ours = (".checkpoint-", ".push-", ".loss.", ".validation.", ".metrics.", "samples-")
        present = {name for name in present if name not in LOGS and not name.startswith(ours)}
    resuming = wanted and (checkpoints or wanted != "latest")
    accelerator.wait_for_everyone()  # before any rank writes
    if present and not (run.overwrite_output_dir or resuming):
        raise ValueError(
            f"--output_dir {output_dir} is not empty. Resume with --resume_from_checkpoint latest, write over it with "
            "--overwrite_output_dir, or name another" + (" (it holds no checkpoint to resume from)" if wanted else "")
        )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def clear_leftovers(accelerator: Accelerator, output_dir: Path, done: int, run: RunArguments) -> None:
    """Remove what a stop left half-written, and the old checkpoints of a folder to write over.

    Those would be the "latest" of the new run. So would those after step `done` of a run that goes
    on from there: they get another name. Called only once training is about to start, so that a
    mistake in the settings loses nothing. Collective.
    """
    if accelerator.is_main_process:
        old = [] if run.resume_from_checkpoint else list_checkpoints(output_dir)
        for folder in (*old, *(path for name in LEFTOVERS for path in output_dir.glob(name))):
            shutil.rmtree(folder)
        renamed = set_aside_later(output_dir, done)
        if renamed:
            accelerator.print(f"training goes on from step {done}: later checkpoints are now {', '.join(renamed)}")
    accelerator.wait_for_everyone()
