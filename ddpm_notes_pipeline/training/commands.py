"""Command lines: their flags, and the commands that a run prints: to resume, to train longer, or on
other images.

`command` is what started the run, script and flags; it is empty for a run started from Python.
"""

import argparse
import os
import shlex
from collections.abc import Sequence

FROM_PYTHON = 'the same TrainingRun with resume_from_checkpoint="latest"'


def typed_flags(line: Sequence[str]) -> set[str]:
    """The names of the flags on a command line, without dashes."""
    words = (word.partition("=")[0].replace("-", "_") for word in line)
    return {word.removeprefix("__") for word in words if word.startswith("__")}


def take_flags(line: Sequence[str], *flags: str) -> tuple[argparse.Namespace, list[str]]:
    """The values of some flags that take one, and the rest of the line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, flag.replace("_", "-"))
    return parser.parse_known_args(line)


def resume_command(command: Sequence[str], *without: str, more: str = "") -> str:
    """The command that resumes the run from its newest whole checkpoint.

    Args:
        without: flags with one value to leave out.
        more: flags to append.
    """
    if not command:
        return FROM_PYTHON + (f" and {more.removeprefix('--').replace(' ', '=')}" if more else "")
    flags = take_flags(command[1:], "--resume_from_checkpoint", *without)[1]
    script = shlex.join([command[0], *flags])
    return f"{launcher()} {script} --resume_from_checkpoint latest {more}".rstrip()


def own_images_command(command: Sequence[str], folder: str, output_dir: str) -> str:
    """The command that trains by the same file of settings on a folder of images."""
    if not command:
        data = f"DataArguments(train_data_dir={folder!r}, resolution=[32])"
        return f"TrainingRun({data}, ModelArguments(), RunArguments(output_dir={output_dir!r})).train()"
    config = take_flags(command[1:], "--config")[0].config
    script = shlex.join([command[0], *(["--config", config] if config else [])])
    return f"{launcher()} {script} --train_data_dir {folder} --resolution 32 --output_dir {output_dir}"


def num_processes() -> int:
    """How many processes this launch has, by what the launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launcher() -> str:
    """What started this process, up to the script's name: `accelerate launch ...` or `python`."""
    processes = num_processes()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and processes == 1:  # set by the launcher
        return "python"
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return "accelerate launch OPTIONS_AS_BEFORE"  # they differ between machines: rank, address
    if processes == 1:
        return "accelerate launch"
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return f"{'ACCELERATE_USE_CPU=true ' if on_cpu else ''}accelerate launch --multi_gpu --num_processes {processes}"
