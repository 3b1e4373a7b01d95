"""What a run leaves in its folder: the model as a Hub folder with its card, and what was learned, where, on what, in how long.

Nothing here names the machine, its user or a path on it: the folder may be published as it stands.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel

import ddpm_notes_pipeline

from ..data import EMBEDDED, ImageSet
from ..data.streaming import ImageStream
from ..hub.publishing import BackgroundPushes, PublishingError, prepare_repo, push_command, push_folder
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from .arguments import DataArguments, ModelArguments, RunArguments, as_config

# Settings that are about one machine or one owner: a stranger who repeats the run has his own.
OWN_SETTINGS = ("output_dir", "cache_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "license")
PATH_SETTINGS = ("dataset_name", "train_data_dir", "pretrained_model_name_or_path", "model_config_name_or_path")
PACKAGES = ("ddpm_notes_pipeline", "torch", "diffusers", "accelerate", "datasets", "huggingface_hub")


def save_model(
    folder: Path,
    unet: UNet2DModel,
    scheduler: DDPMNotesScheduler,
    settings: tuple[DataArguments, ModelArguments, RunArguments],
    record: dict[str, Any],
) -> None:
    """The pipeline with its code, training_config.yaml and training_run.json."""
    DDPMNotesPipeline(unet, scheduler).save_pretrained(folder)
    save_settings(folder / "training_config.yaml", *settings, fingerprint=record["fingerprint"])
    (folder / "training_run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_settings(
    path: Path, data: DataArguments, model: ModelArguments, run: RunArguments, fingerprint: str | None = None
) -> None:
    """training_config.yaml: with it, and an --output_dir, `--config` repeats the run on images of that fingerprint.

    Of a path here only the last name is kept, as "./name": it names no embedded set and no repository.
    """
    config = {name: value for name, value in as_config(data, model, run).items() if name not in OWN_SETTINGS}
    for name in PATH_SETTINGS:
        embedded = name == "dataset_name" and config.get(name) in EMBEDDED
        if not embedded and is_local(config.get(name)):
            config[name] = f"./{Path(config[name]).expanduser().resolve().name}"
    if fingerprint is not None:
        config["data_fingerprint"] = fingerprint
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def run_record(
    accelerator: Accelerator,
    images: ImageSet | ImageStream,
    data: DataArguments,
    model: ModelArguments,
    run: RunArguments,
    losses: list[float],
    first_step: int,
    seconds: float,
) -> dict[str, Any]:
    """training_run.json, which the card is filled from. `losses` of every step so far; this launch began after `first_step`."""
    steps = len(losses)
    tail = [loss for loss in losses[-max(1, steps // 20) :] if math.isfinite(loss)]
    name = Path(run.output_dir).resolve().name
    versions = {package: importlib.metadata.version(package) for package in PACKAGES[1:]}
    return {
        "data": images.name,
        "split": images.split,
        "images": images.num_images,
        "images_skipped": images.skipped,
        "dims": [images.channels, *images.size],
        "fingerprint": images.fingerprint,
        "data_license": images.license,
        "hub_dataset": data.dataset_name
        if "/" in (data.dataset_name or "") and not is_local(data.dataset_name)
        else None,
        "base_model": None if is_local(model.pretrained_model_name_or_path) else model.pretrained_model_name_or_path,
        "objective": run.objective,
        "loss": sum(tail) / len(tail) if tail else None,
        "loss_steps": len(tail),
        "steps": steps,
        "train_batch_size": run.train_batch_size,
        "seed": run.seed,
        "weights": "averaged over steps (EMA)" if run.use_ema else "raw, as the last step left them",
        "mixed_precision": run.mixed_precision,
        "processes": accelerator.num_processes,
        "hardware": hardware(accelerator.device),
        "seconds": seconds,
        "steps_of_launch": steps - first_step,
        "images_per_second": (steps - first_step) * run.train_batch_size / seconds if seconds > 0 else 0.0,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "ddpm_notes_pipeline": ddpm_notes_pipeline.__version__,
            "python": platform.python_version(),
            **versions,
        },
        "command": "accelerate launch training/train.py --config training_config.yaml "
        f"--output_dir {shlex.quote(f'outputs/{name}')}",
    }


def hardware(device: torch.device) -> str:
    """What the run was computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {platform.machine()} {device.type.upper()}"


def is_local(name: str | None) -> bool:
    """Whether a setting that may be a repository's name is a path here."""
    return name is not None and (name.startswith(("/", ".", "~")) or Path(name).expanduser().exists())


@contextmanager
def told_to_all(accelerator: Accelerator) -> Iterator[list[Any]]:
    """A list whose first entry, set by the main process alone, is on every process afterwards; so is the main process's failure."""
    value: list[Any] = [None, None]
    try:
        yield value
    except PublishingError as fault:
        value[1] = str(fault)
    broadcast_object_list(value)
    if value[1] is not None:
        raise PublishingError(value[1])


def open_repo(accelerator: Accelerator, run: RunArguments) -> str | None:
    """The full name of the repository to push to, made or found writable before anything is trained; None without --push_to_hub.

    Raises:
        PublishingError: on every process, so that none waits for the others.
    """
    if not run.push_to_hub:
        return None
    with told_to_all(accelerator) as repo_id:
        if accelerator.is_main_process:
            repo_id[0] = prepare_repo(
                run.hub_model_id or Path(run.output_dir).resolve().name, run.hub_private_repo, run.license
            )
    return repo_id[0]


def publish(output_dir: Path, repo_id: str, run: RunArguments, pushes: BackgroundPushes | None) -> str | None:
    """The last push; returns what to tell the user if it fails: everything is on the disk, and how to push it later."""
    if pushes is not None:
        pushes.close()
    try:
        print(f"Published: {push_folder(output_dir, repo_id, 'End of training', run.license)}", flush=True)
    except (PublishingError, ValueError) as fault:
        return (
            f"train.py: error: {' '.join(str(fault).split())}\nNothing is lost: weights, card and pictures are in {output_dir}/. "
            f"Push them later by:\n{push_command(output_dir, repo_id, run.hub_private_repo)}"
        )
    return None
