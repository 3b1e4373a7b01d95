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

from ..data import ImageSet
from ..evaluation.records import TrainingRecord
from .arguments import DataArguments

# Settings that, with the images, decide which of them are held out.
DECIDE_HELD_OUT = ("validation_share", "seed", "max_train_samples", "train_split", "dataset_config_name", "classes")


def check_held_out(model: str, revision: str | None, data: DataArguments, seed: int, train: ImageSet) -> None:
    """Refuse images held out of the data set that `model` was trained on, unless they are its own.

    Silent for a model that does not say how it was trained, or was trained on another data set.

    Args:
        model, revision: a folder, or a repository on the Hub.
        seed: that drew the images.
        train: those that were not held out.

    Raises:
        ValueError: settings, or a number of images, other than those of the model's run.
    """
    text, record = (read_file(model, revision, name) for name in ("training_config.yaml", TrainingRecord.FILE))
    run: dict[str, Any] = yaml.safe_load(text) if text else {}
    trained_on = run.get("dataset_name") or run.get("train_data_dir")
    if trained_on is None or Path(trained_on).name != Path(train.name).name:
        return
    given = {**dataclasses.asdict(data), "seed": seed}
    differ = [name for name in DECIDE_HELD_OUT if given[name] != run.get(name)]
    if differ:
        values = ", ".join(f"--{name} is {given[name]} and was {run.get(name)} in training" for name in differ)
        raise ValueError(f"{values} of {model}; they must be equal, or images that it was trained on are held out")
    count = json.loads(record).get("images") if record else None
    if count not in (None, len(train)):
        raise ValueError(
            f"{model} was trained on {count} images of {train.name}, and there are {len(train)} besides those held out: the "
            "images have changed, and some that it was trained on are held out now. Restore them, or name images that it "
            "has never seen (--validation_split of training, --split of an evaluation)"
        )


def read_file(model: str, revision: str | None, name: str) -> str | None:
    """The text of a file of a model, in a folder or on the Hub; None if it cannot be had."""
    try:
        path = Path(model) / name if Path(model).is_dir() else hf_hub_download(model, name, revision=revision)
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None
