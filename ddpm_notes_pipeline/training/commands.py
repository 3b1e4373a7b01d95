"""The commands that a run prints: how to resume it, to train longer, or on other images.

`command` is what started the run, script and flags; it is empty for a run started from Python.
"""

import argparse
import os
import re
import shlex
from collections.abc import Sequence

FROM_PYTHON = 'the same TrainingRun with resume_from_checkpoint="latest"'


def resume_command(command: Sequence[str], *without: str, more: str = "") -> str:
    """The command that resumes the run from its newest whole checkpoint.

    Args:
        without: flags with one value to leave out.
        more: flags to append.
    """
    if not command:
        return FROM_PYTHON + (f" and {more.removeprefix('--').replace(' ', '=')}" if more else "")
    given = "\0".join(command[1:])
    for name in ("--resume_from_checkpoint", *without):
        given = re.sub(rf"(^|\0){name.replace('_', '[-_]')}[=\0][^\0]*", "", given)
    script = shlex.join([command[0], *filter(None, given.split("\0"))])
    return " ".join(filter(None, [f"{launcher()} {script} --resume_from_checkpoint latest", more]))


def own_images_command(command: Sequence[str], folder: str, output_dir: str) -> str:
    """The command that trains by the same file of settings on a folder of images."""
    if not command:
        data = f"DataArguments(train_data_dir={folder!r}, resolution=[32])"
        return f"TrainingRun({data}, ModelArguments(), RunArguments(output_dir={output_dir!r})).train()"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    config = parser.parse_known_args(command[1:])[0].config
    with_config = f" --config {shlex.quote(config)}" if config else ""
    script = f"{launcher()} {shlex.quote(command[0])}{with_config}"
    return f"{script} --train_data_dir {folder} --resolution 32 --output_dir {output_dir}"


def launcher() -> str:
    """What started this process, up to the script's name: `accelerate launch ...` or `python`."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and processes == 1:  # set by the launcher
        return "python"
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return "accelerate launch OPTIONS_AS_BEFORE"  # they differ between machines: rank, address
    if processes == 1:
        return "accelerate launch"
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return f"{'ACCELERATE_USE_CPU=true ' if on_cpu else ''}accelerate launch --multi_gpu --num_processes {processes}"
