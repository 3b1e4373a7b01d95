"""What a run leaves in its folder: the model as a Hub folder, and a record of the training.

Nothing here names the machine, its user or a path on it: the folder may be published as it is.
"""

import importlib.metadata
import math
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from .. import __version__
from ..data import EMBEDDED
from ..evaluation.records import TrainingRecord
from ..evaluation.yardsticks import Yardsticks
from ..hub.push import BackgroundPushes, PublishingError, prepare_repo, push_command, push_folder
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from .arguments import Arguments, RunArguments, as_config, is_local
from .commands import own_images_command, resume_command
from .images import TrainingImages, count_of
from .learner import Learner
from .logs import RunLogs
from .stops import failing_together

# Settings of one machine or one owner: whoever repeats the run has others.
OWN_SETTINGS = ("output_dir", "cache_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "license")
PATH_SETTINGS = ("dataset_name", "train_data_dir", "pretrained_model_name_or_path", "model_config_name_or_path")
PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "huggingface_hub")


class NotPublishedError(PublishingError):
    """The run is complete on disk, but its last push failed."""


def save_model(folder: Path, learner: Learner, images: TrainingImages, settings: Arguments, logs: RunLogs) -> None:
    """Write the weights that the network has as a pipeline with its code, and how it was trained.

    That is in training_config.yaml and training_run.json.
    """
    DDPMNotesPipeline(learner.unet, learner.scheduler).save_pretrained(folder)
    save_settings(folder / "training_config.yaml", settings, images.train.fingerprint)
    run_record(learner.accelerator, images, settings, logs).write(folder)


def save_settings(path: Path, settings: Arguments, fingerprint: str) -> None:
    """Write training_config.yaml: as --config, with an --output_dir, it repeats the run.

    On the same images: it holds their fingerprint. Of a local path only the last name is kept, as
    "./name", which is neither an embedded set nor a repository.
    """
    config = {name: value for name, value in as_config(*settings).items() if name not in OWN_SETTINGS}
    for name in config.keys() & set(PATH_SETTINGS):
        if name != "dataset_name" or config[name] not in EMBEDDED:
            config[name] = without_place(config[name])
    config["data_fingerprint"] = fingerprint
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def without_place(name: str | None) -> str | None:
    """A repository as it is, and "./name" of a local path."""
    return f"./{Path(name).expanduser().resolve().name}" if name is not None and is_local(name) else name


def run_record(accelerator: Accelerator, images: TrainingImages, settings: Arguments, logs: RunLogs) -> TrainingRecord:
    """What the card says of the training."""
    data, model, run = settings
    train, losses, seconds = images.train, logs.loss.history()[1], logs.loss.elapsed
    tail, done = last_finite(losses), logs.loss.step - logs.loss.first
    hub_dataset = "/" in (data.dataset_name or "") and not is_local(data.dataset_name)
    folder = shlex.quote(f"outputs/{Path(run.output_dir).resolve().name}")
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return TrainingRecord(
        data=train.name,
        split=train.split,
        images=train.num_images,
        images_skipped=images.skipped,
        hidden_colours=images.stored.hidden_colours,
        classes=train.source.classes,
        dims=[train.channels, *train.size],
        fingerprint=train.fingerprint,
        data_license=train.license,
        hub_dataset=data.dataset_name if hub_dataset else None,
        base_model=None if is_local(model.pretrained_model_name_or_path) else model.pretrained_model_name_or_path,
        initial_weights=without_place(model.pretrained_model_name_or_path),
        objective=run.objective,
        loss=sum(tail) / len(tail) if tail else None,
        loss_steps=len(tail),
        steps=logs.loss.step,
        train_batch_size=run.train_batch_size,
        seed=run.seed,
        weights="averaged over steps (EMA)" if run.use_ema else "raw, as the last step left them",
        mixed_precision=run.mixed_precision,
        processes=accelerator.num_processes,
        hardware=hardware(accelerator.device),
        seconds=seconds,
        steps_of_launch=done,
        images_per_second=done * run.train_batch_size / seconds if seconds > 0 else 0.0,
        date=datetime.now(UTC).date().isoformat(),
        versions={"ddpm_notes_pipeline": __version__, "python": platform.python_version(), **versions},
        command=f"accelerate launch training/train.py --config training_config.yaml --output_dir {folder}",
    )


def last_finite(losses: Sequence[float]) -> list[float]:
    """The finite losses of the last twentieth of the steps, one step at least."""
    return [loss for loss in losses[-max(1, len(losses) // 20) :] if math.isfinite(loss)]


def hardware(device: torch.device) -> str:
    """What the run was computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} core{'s' * (cores != 1)} of {platform.machine()} {device.type.upper()}"


def summary(
    settings: Arguments, images: TrainingImages, logs: RunLogs, skipped: int, yardsticks: Yardsticks | None
) -> str:
    """What was learned, where it is, how to load it, train longer, use other images: a line each.

    And how its bits/dim compare with simple codes, if some were measured.
    """
    data, _, run = settings
    log, losses = logs.loss, logs.loss.history()[1]
    steps, tail = log.step, last_finite(losses) or [math.nan]
    rate = (steps - log.first) * run.train_batch_size / log.training if log.training > 0 else 0.0
    bad_images = f" ({images.skipped} left out)" if images.skipped else ""
    skipped_updates = f"updates skipped, not finite: {skipped}; " if skipped else ""
    weights = "averaged (EMA)" if run.use_ema else "raw"
    validated = "" if images.validation is None else ", validation.jsonl"
    folder, output_dir = ("ANOTHER_FOLDER", "another") if data.train_data_dir else ("FOLDER_OF_IMAGES", "mine")
    compared = ""
    if yardsticks is not None and logs.validation.rows and logs.validation.rows[-1]["bits_per_dim"] is not None:
        row = logs.validation.rows[-1]
        verdict = yardsticks.verdict(row["bits_per_dim"], row["standard_error"] or 0.0)
        compared = f"\nCompare:   {yardsticks}. {verdict}"
    longer = resume_command(run.command, "--max_train_steps", more=f"--max_train_steps {2 * steps}")
    return "\n".join(
        [
            f"Learned:   {steps} steps on {count_of(images.train)}{bad_images}, {run.objective} loss "
            f"{sum(tail) / len(tail):.4f} over the last {len(tail)} steps; {validation_words(images, logs)}"
            f"{skipped_updates}{rate:.0f} images/s, {log.elapsed / 60:.1f} min.{compared}",
            f"Where:     {Path(run.output_dir)}/ holds the {weights} weights, samples.png (look at it), loss.png, "
            f"loss.jsonl{validated} and checkpoint-{steps}/.",
            f'Load:      python -c "from ddpm_notes_pipeline import DDPMNotesPipeline as P; '
            f"P.from_pretrained({str(Path(run.output_dir))!r})().images[0].save('one.png')\"",
            f"Longer:    {longer}",
            f"Your own:  {own_images_command(run.command, folder, f'outputs/{output_dir}')}",
        ]
    )


def validation_words(images: TrainingImages, logs: RunLogs) -> str:
    """The newest bits/dim in words, or how to have them measured."""
    if images.validation is None:
        return "nothing was held out (--validation_share 0.04 measures bits/dim on images not trained on); "
    row = logs.validation.rows[-1] if logs.validation.rows else {"bits_per_dim": None}
    if row["bits_per_dim"] is None:
        return ""
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
    return f"{row['bits_per_dim']:.3f}{error} bits/dim on {row['images']} images of {images.validation.split!r}; "


def open_repo(accelerator: Accelerator, run: RunArguments) -> str | None:
    """The full name of the repository to push to, found or made; None without --push_to_hub.

    Collective; None on all ranks but the main one.

    Raises:
        PublishingError: the repository cannot be written to.
        FailedElsewhere: the same on the other ranks.
    """
    with failing_together(accelerator):
        if run.push_to_hub and accelerator.is_main_process:
            name = run.hub_model_id or Path(run.output_dir).resolve().name
            return prepare_repo(name, run.hub_private_repo, run.license)
    return None


def publish(output_dir: Path, repo_id: str, run: RunArguments, pushes: BackgroundPushes | None) -> None:
    """The last push.

    Raises:
        NotPublishedError: it failed. All is on disk; the message says how to push it later.
    """
    if pushes is not None:
        pushes.close()
    try:
        address = push_folder(output_dir, repo_id, "End of training", run.license)
    except (PublishingError, ValueError) as fault:
        raise NotPublishedError(
            f"{' '.join(str(fault).split())}\nNothing is lost: weights, card and pictures are in {output_dir}/. "
            f"Push them later by:\n{push_command(output_dir, repo_id, run.hub_private_repo)}"
        ) from fault
    print(f"Published: {address}", flush=True)
