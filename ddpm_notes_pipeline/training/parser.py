"""Settings from a command line and a YAML file under `--config`, checked alike. The line wins."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .arguments import (
    Arguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    RunArguments,
    check_arguments,
    check_evaluation,
)
from .commands import take_flags, typed_flags

SOURCES = {"dataset_name", "train_data_dir"}
OF_ONE_SOURCE = SOURCES | set(
    "dataset_config_name train_split validation_split image_column label_column classes".split()
)
# What a fingerprint depends on.
CHOOSE_IMAGES = OF_ONE_SOURCE - {"validation_split", "label_column"} | set(
    "validation_share resolution center_crop image_mode max_train_samples on_bad_image streaming shuffle_buffer_size seed".split()
)
MODELS = {"model", "pretrained_model_name_or_path"}
# Flags on the command line, and the keys of a file that each of them makes void, in a file that has
# one of the last keys.
OVERRIDES = (
    (SOURCES, OF_ONE_SOURCE, OF_ONE_SOURCE),
    (CHOOSE_IMAGES, {"data_fingerprint"}, {"data_fingerprint"}),
    # Without the share of the file, all images are trained on.
    ({"validation_split"}, {"validation_share", "data_fingerprint"}, {"validation_share"}),
    ({"validation_share"}, {"validation_split"}, {"validation_split"}),
    # The revision is that of the file's model: in a training run's, the one that it started from.
    (MODELS, {"revision"}, MODELS),
)
# Flags of diffusers' train_unconditional.py that have no namesake here, and what to use instead.
OF_TRAIN_UNCONDITIONAL = {
    "--save_images_epochs": "--sample_steps",
    "--save_model_epochs": "--checkpointing_steps",
    "--logger": "--report_to",
    "--logging_dir": "the folder --output_dir, which holds the logs",
    "--hub_token": "the environment variable HF_TOKEN",
    "--enable_xformers_memory_efficient_attention": "nothing: PyTorch's own attention is used",
    "--local_rank": "nothing: accelerate launch tells each process",
    "--preserve_input_precision": "nothing: images have 8 bits here",
    "--batch_size": "--train_batch_size",
}


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser with --config and without abbreviations, which suggests the nearest flag."""

    def __init__(self, description: str, *classes: Any) -> None:
        self.flags: list[str] = []
        formatter = argparse.HelpFormatter
        super().__init__(classes, allow_abbrev=False, description=description, formatter_class=formatter)
        self.add_argument("--config", help="YAML file of flags; flags on the command line win.")

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        """Add a flag; for a field of a dataclass, `settings` holds all of its metadata."""
        settings.pop("bounds", None)
        if settings.get("action") == "store_false":  # --no_x of a switch x that is on by default
            name = settings["dest"]
            settings = {"action": "store_false", "dest": name, "default": True, "help": f"Turn --{name} off."}
        elif settings.get("default") not in (None, argparse.SUPPRESS):
            settings["help"] += " (default: %(default)s)"
        if names[0] == "--attention_levels":  # HfArgumentParser requires a value for each list
            settings["nargs"] = "*"
        self.flags += names
        return super().add_argument(*names, **settings)

    def nearest(self, flag: str) -> str | None:
        """The known flag that `flag` most resembles."""
        return next(iter(difflib.get_close_matches(flag, self.flags, n=1)), None)

    def error(self, message: str) -> Any:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
            if flag in OF_TRAIN_UNCONDITIONAL:
                message += f" (instead of {flag}: {OF_TRAIN_UNCONDITIONAL[flag]})"
            elif (near := self.nearest(flag)) is not None:
                message += f" (did you mean {near}?)"
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags\n")

    def read(self, argv: list[str], ignored: Collection[str] = ()) -> list[Any]:
        """An instance of each dataclass; keys of a file in `ignored` belong to the other script."""
        known, line = take_flags(argv, "--config")
        in_file = self.read_file(known.config, typed_flags(line), ignored) if known.config else []
        given = vars(self.parse_args(in_file + line))
        return [cls(**{f.name: given[f.name] for f in fields(cls) if f.init}) for cls in self.dataclass_types]

    def read_file(self, path: str, typed: set[str], ignored: Collection[str]) -> list[str]:
        """The flags that a YAML file stands for, so that argparse checks file and line alike."""
        try:
            # As text, for argparse to convert: YAML reads 1e-3 as a string and `no` as False.
            values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"--config {path}: {' '.join(str(error).split())}")
        if not isinstance(values, dict):
            self.error(f"--config {path} holds {type(values).__name__}; it must hold lines of the form 'flag: value'")
        known = {key.replace("-", "_") for key in values}
        void = {key for flags, keys, there in OVERRIDES if flags & typed and there & known for key in keys}
        tokens: list[str] = []
        for key, value in ((key.replace("-", "_"), value) for key, value in values.items()):
            flag = f"--{key}"
            if key in void or (key in ignored and flag not in self.flags):
                continue
            if flag not in self.flags or key == "config":
                near = self.nearest(flag)
                self.error(
                    f"--config {path} has the unknown key {key!r}" + (f" (did you mean {near[2:]!r}?)" if near else "")
                )
            if isinstance(value, dict):
                self.error(f"--config {path}: {key} is {value!r}; it must be one value, or a list")
            if value not in ("", "~", "null"):
                tokens += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
        return tokens

    def check(self, check: Callable[..., None], *arguments: Any) -> None:
        """Exit with the message of a check that raises ValueError."""
        try:
            check(*arguments)
        except ValueError as error:
            self.error(str(error))


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The settings of a training run.

    Exits with status 2 and one line for an unknown flag or key, a value of the wrong type, or
    settings that contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser("Train a DDPM on any image data set.", DataArguments, ModelArguments, RunArguments)
    arguments = Arguments(*parser.read(argv))
    arguments.run.command = (sys.argv[0], *argv)
    parser.check(check_arguments, *arguments)
    return arguments


def parse_evaluation_arguments(argv: list[str] | None = None) -> tuple[DataArguments, EvaluationArguments]:
    """The settings of an evaluation; a training run's YAML file also serves, for its images."""
    of_training = {f.name for cls in (ModelArguments, RunArguments) for f in fields(cls)}
    parser = ArgumentParser("Measure bits/dim and samples of a DDPM.", DataArguments, EvaluationArguments)
    data, evaluation = parser.read(sys.argv[1:] if argv is None else argv, ignored=of_training)
    parser.check(check_evaluation, data, evaluation)
    return data, evaluation


def one_line(message: Warning | str, *where: Any, **also: Any) -> str:
    """Formats a warning for the scripts' users: without the source line that raised it."""
    return f"warning: {message}\n"
