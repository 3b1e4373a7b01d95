"""Train a DDPM on any image data set.

    accelerate launch training/train.py --config training/configs/digits.yaml
    accelerate launch training/train.py --config training/configs/digits.yaml --train_data_dir my_pngs --output_dir outputs/mine

The run is a pure function of (config, seed, step): the batch, flips, timesteps and noise of optimizer step n follow from the seed and
n alone, so the number of processes and accumulation steps changes nothing, and a resumed run goes on as if it had not stopped.
`--output_dir` becomes the Hub folder of the model; checkpoints are in `checkpoint-N/` beside its files.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

from tqdm.auto import tqdm

from ddpm_notes_pipeline.hub.publishing import PublishingError
from ddpm_notes_pipeline.training.arguments import one_line, parse_arguments
from ddpm_notes_pipeline.training.checkpoints import CheckpointError, list_checkpoints
from ddpm_notes_pipeline.training.run import main
from ddpm_notes_pipeline.training.stops import FailedElsewhere, Stopped, resume_command


def leave(status: int, text: str, together: bool = False) -> None:
    """End this process, with one line on stderr. `together`: all processes come here with the same line, and one of them writes it."""
    if text and (not together or os.environ.get("RANK", "0") == "0"):
        tqdm.write(text, file=sys.stderr)  # clear of a progress bar
    sys.stdout.flush(), sys.stderr.flush()
    # Not by the interpreter's own end: it waits for pushes on their way, and for the other processes, which may be for ever.
    os._exit(status)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.formatwarning = one_line
    settings = parse_arguments()
    try:
        not_published = main(*settings)
    except Stopped as stop:
        leave(stop.status, f"train.py: {stop}", stop.together)
    except FailedElsewhere:
        leave(1, "")
    except (ValueError, OSError, FloatingPointError, CheckpointError, PublishingError) as fault:
        text = f"train.py: error: {' '.join(str(fault).split())}".rstrip(".")
        left = list_checkpoints(Path(settings[2].output_dir))
        if left and not isinstance(fault, ValueError):  # a mistake in the settings is not the run's end
            text += f". {left[0]} is left. Resume: {resume_command()}"
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            tqdm.write(text, file=sys.stderr)
            sys.exit(1)
        leave(1, text, isinstance(fault, FloatingPointError))
    sys.exit(not_published)
