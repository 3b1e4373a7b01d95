"""Settings from a command line and a YAML file under `--config`, checked alike. The line wins."""

import argparse
import difflib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..scheduling_ddpm_notes import VARIANCE_TYPES
from .arguments import (
    Arguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    RunArguments,
    check_arguments,
    check_bounds,
    typed_flags,
)

# What belongs to one source of images: another source on the line drops it from the file.
OF_ONE_SOURCE = set(
    "dataset_name dataset_config_name train_data_dir train_split validation_split image_column label_column".split()
)
# What a fingerprint depends on.
CHOOSE_IMAGES = OF_ONE_SOURCE - {"validation_split", "label_column"} | set(
    "validation_share resolution center_crop image_mode max_train_samples on_bad_image streaming shuffle_buffer_size seed".split()
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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends each flag's default to its help, unless it is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_negation = any(option.startswith("--no_") for option in action.option_strings)
        return action.help if action.default is None or is_negation else super()._get_help_string(action)


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser without abbreviations, whose errors suggest the nearest flag."""

    def __init__(self, classes: tuple[Any, ...]) -> None:
        self.flags: list[str] = []
        super().__init__(classes, allow_abbrev=False, description=__doc__, formatter_class=HelpFormatter)
        self.add_argument("--config", help="YAML file of flags; flags on the command line win.")

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        settings.pop("bounds", None)  # HfArgumentParser passes all metadata on
        if settings.get("action") == "store_false":  # --no_x of a switch x that is on by default
            settings |= {"help": f"Turn --{settings['dest']} off.", "default": True}
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


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The settings of a training run.

    Exits with status 2 and one line for an unknown flag or key, a value of the wrong type, or
    settings that contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, parts = _parse((DataArguments, ModelArguments, RunArguments), argv)
    arguments = Arguments(*parts)
    arguments.run.command = (sys.argv[0], *argv)
    try:
        check_arguments(*arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def parse_evaluation_arguments(argv: list[str] | None = None) -> tuple[DataArguments, EvaluationArguments]:
    """The settings of an evaluation; a training run's YAML file also serves, for its images."""
    training_only = {f.name for cls in (ModelArguments, RunArguments) for f in fields(cls)}
    argv = sys.argv[1:] if argv is None else argv
    parser, (data, evaluation) = _parse((DataArguments, EvaluationArguments), argv, training_only)
    try:
        check_bounds(evaluation)
        _check_evaluation(data, evaluation)
    except ValueError as error:
        parser.error(str(error))
    if evaluation.table:
        evaluation.metrics, evaluation.decoder, evaluation.paths = True, "fitted", ["even", "best"]
        evaluation.samplers = evaluation.samplers or ["ddim", "dpmsolver++"]
        evaluation.metric_sets = max(evaluation.metric_sets, 2)  # a spread needs two
    return data, evaluation


def _check_evaluation(data: DataArguments, evaluation: EvaluationArguments) -> None:
    choices: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "--variance_types": (evaluation.variance_types or [], VARIANCE_TYPES),
        "--paths": (evaluation.paths, ("even", "best")),
        "--samplers": (evaluation.samplers, ("ddim", "eta0", "dpmsolver++")),
    }
    for name, (given, known) in choices.items():
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"{name} has {', '.join(unknown)}; each must be one of {', '.join(known)}")
    if evaluation.save_variances and not Path(evaluation.model).is_dir():
        raise ValueError(
            f"--save_variances writes into the model's folder and --model is {evaluation.model}, which must be a "
            "folder here: download the repository first (hf download), or leave --save_variances out"
        )
    if evaluation.samplers and not (evaluation.metrics or evaluation.table):
        raise ValueError("--samplers have no bits/dim; they must go with --metrics")
    if (data.dataset_name is None) == (data.train_data_dir is None):
        raise ValueError("name the images: --dataset_name or --train_data_dir, or --config with one of the two")


def _parse(classes: tuple[Any, ...], argv: list[str], ignored: set[str] | None = None) -> tuple[ArgumentParser, Any]:
    """An instance of each dataclass; keys in `ignored` belong to the other script."""
    parser = ArgumentParser(classes)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    known, line = config.parse_known_args(argv)
    tokens = _read_config(parser, known.config, line, ignored or set()) if known.config else []
    namespace = parser.parse_args(tokens + line)
    return parser, tuple(cls(**{f.name: getattr(namespace, f.name) for f in fields(cls) if f.init}) for cls in classes)


def _read_config(parser: ArgumentParser, path: str, line: list[str], ignored: set[str]) -> list[str]:
    """The flags that a YAML file stands for, so that argparse checks file and line alike."""
    try:
        # As text, for argparse to convert: YAML would turn 1e-3 into a string and `no` into False.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} holds {type(values).__name__}; it must hold lines of the form 'flag: value'")
    values = {key.replace("-", "_"): value for key, value in values.items()}
    tokens: list[str] = []
    for key, value in values.items():
        flag = f"--{key}"
        if key in _overridden(typed_flags(line)) or (key in ignored and flag not in parser.flags):
            continue
        if flag not in parser.flags or key == "config":
            near = parser.nearest(flag)
            hint = f" (did you mean {near[2:]!r}?)" if near else ""
            parser.error(f"--config {path} has the unknown key {key!r}{hint}")
        if isinstance(value, dict):
            parser.error(f"--config {path}: {key} is {value!r}; it must be one value, or a list")
        if value not in ("", "~", "null"):
            tokens += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return tokens


def _overridden(typed: frozenset[str]) -> set[str]:
    """The keys of a file that other flags on the command line make void."""
    void: set[str] = set()
    if typed & {"dataset_name", "train_data_dir"}:
        void |= OF_ONE_SOURCE
    if typed & CHOOSE_IMAGES:
        void.add("data_fingerprint")
    if "validation_split" in typed:
        void.add("validation_share")
    if "validation_share" in typed:
        void.add("validation_split")
    return void


def one_line(message: Warning | str, *where: Any, **also: Any) -> str:
    """Formats a warning for the scripts' users: without the source line that raised it."""
    return f"warning: {message}\n"
