"""Train a DDPM on any image data set.

    accelerate launch training/train.py --config training/configs/digits.yaml
    accelerate launch training/train.py --train_data_dir pngs --resolution 64 --output_dir outputs/a

A run is a pure function of (config, seed, step): the batch, flips, timesteps and noise of optimizer
step n follow from the seed and n alone. So neither the number of processes nor accumulation changes
the result, and a resumed run continues as if it had not stopped. `--output_dir` becomes the Hub
folder of the model; its checkpoints are in `checkpoint-N/`.
"""

import logging
import sys
import warnings
from pathlib import Path

from tqdm.auto import tqdm

from ddpm_notes_pipeline.training.arguments import Arguments, RunArguments
from ddpm_notes_pipeline.training.commands import num_processes, resume_command
from ddpm_notes_pipeline.training.parser import one_line, parse_arguments


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.formatwarning = one_line
    settings = parse_arguments()
    try:
        train(settings)
    except ImportError as fault:  # an extra is not installed
        sys.exit(f"train.py: error: {fault}")


def train(settings: Arguments) -> None:
    """The run, and how it ends."""
    # Not at the top: these load torch, which --help and a mistyped flag do without.
    from ddpm_notes_pipeline.hub.push import PublishingError
    from ddpm_notes_pipeline.training.checkpoints import CheckpointError
    from ddpm_notes_pipeline.training.results import NotPublishedError
    from ddpm_notes_pipeline.training.run import TrainingRun
    from ddpm_notes_pipeline.training.stops import FailedElsewhere, Stopped, Stops, exit_now

    stops, run = Stops(), None
    stops.install()
    try:
        run = TrainingRun(*settings, stops)
        run.train()
    except Stopped as stop:
        exit_now(stop.status, f"train.py: {stop}", once=stop.together)
    except FailedElsewhere:
        exit_now(1)
    except NotPublishedError as fault:  # its last line is a command to copy
        sys.exit(f"train.py: error: {fault}")
    except (ValueError, OSError, FloatingPointError, CheckpointError, PublishingError) as fault:
        text = describe(fault, settings.run, begun=run is not None)
        if num_processes() > 1:
            exit_now(1, text, once=isinstance(fault, FloatingPointError))
        tqdm.write(text, file=sys.stderr)
        sys.exit(1)


def describe(fault: Exception, run: RunArguments, begun: bool) -> str:
    """The failure in one line, with the command that resumes if there is a checkpoint."""
    from ddpm_notes_pipeline.training.checkpoints import list_checkpoints

    text = f"train.py: error: {' '.join(str(fault).split())}".rstrip(".")
    checkpoints = list_checkpoints(Path(run.output_dir))
    if not checkpoints or (isinstance(fault, ValueError) and not begun):  # a mistake in the settings ends no run
        return text
    return f"{text}. {checkpoints[0]} is left. Resume: {resume_command(run.command)}"


if __name__ == "__main__":
    main()
