"""Are the images that --validation_share holds out new to a model?

A share is drawn by the seed from the images in their order. Another seed, or one more file in the
folder, holds out others, most of which the model was trained on: its bits/dim would look too good.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from ..data import ImageSet
from ..evaluation.records import TrainingRecord
from .arguments import DataArguments, is_local

# Settings that, with the images, decide which of them are held out.
DECIDE_HELD_OUT = ("validation_share", "seed", "max_train_samples", "train_split", "dataset_config_name", "classes")


def seen_in_training(model: str, revision: str | None, data: DataArguments, seed: int, train: ImageSet) -> str | None:
    """Why images held out of the data set that `model` was trained on are not all new to it.

    None if they are, or if the model does not say how it was trained. Of local folders only the
    names are known: other images in a folder of the same name are taken for the same.

    Args:
        model, revision: a folder, or a repository on the Hub.
        seed: that drew the images.
        train: those that were not held out.
    """
    run = read_settings(model, revision)
    if not of_same_images(data, run):
        return None
    given = {**dataclasses.asdict(data), "seed": seed}
    differ = [name for name in DECIDE_HELD_OUT if given[name] != run.get(name)]
    if differ:
        values = ", ".join(f"--{name} is {given[name]} and was {run.get(name)} in training" for name in differ)
        return f"{values}; they must be equal, or images that {model} was trained on are held out"
    record = read_file(model, revision, TrainingRecord.FILE)
    count = json.loads(record).get("images") if record else None
    if count not in (None, len(train)):
        return (
            f"{model} was trained on {count} images of {train.name}, and there are {len(train)} besides those held out: if "
            "the images have changed, some that it was trained on are held out now. Restore them, or name images that it "
            "has never seen (--validation_split of training, --split of an evaluation)"
        )
    return None


def of_same_images(data: DataArguments, run: dict[str, Any]) -> bool:
    """Whether some images may belong to these settings and to those of a training_config.yaml."""
    name, trained_on = (as_published(settings) for settings in (dataclasses.asdict(data), run))
    if not isinstance(name, str) or not isinstance(trained_on, str):
        return False
    copied = (name.startswith("./") or trained_on.startswith("./")) and Path(name).name == Path(trained_on).name
    if name != trained_on and not copied:  # a folder may hold a set of the Hub
        return False
    splits = [
        {part.partition("[")[0].strip() for part in str(split).split("+")}
        for split in (data.train_split, run.get("train_split", "train"))
    ]
    ours, theirs = data.classes, run.get("classes")
    same_classes = ours is None or theirs is None or not set(ours).isdisjoint(theirs)
    return same_classes and not splits[0].isdisjoint(splits[1])


def as_published(settings: dict[str, Any]) -> str | None:
    """The data set as training_config.yaml names it; of a local path, the last part."""
    name = settings.get("dataset_name") or settings.get("train_data_dir")
    return f"./{Path(name).expanduser().resolve().name}" if isinstance(name, str) and is_local(name) else name


def read_settings(model: str, revision: str | None) -> dict[str, Any]:
    """How a model was trained; empty if it does not say."""
    try:
        run = yaml.safe_load(read_file(model, revision, "training_config.yaml") or "")
    except yaml.YAMLError:
        return {}
    return run if isinstance(run, dict) else {}


def read_file(model: str, revision: str | None, name: str) -> str | None:
    """The text of a file of a model, in a folder or on the Hub; None if it cannot be had."""
    try:
        path = Path(model) / name if Path(model).is_dir() else hf_hub_download(model, name, revision=revision)
        return Path(path).read_text(encoding="utf-8")
    except (OSError, HFValidationError):
        return None
