"""Measure a DDPM: bits/dim with its parts and standard errors, by variance and number of steps.

    accelerate launch training/evaluate.py --model outputs/digits \
        --config training/configs/digits.yaml --split test
    accelerate launch training/evaluate.py --model outputs/digits \
        --config training/configs/digits.yaml --metrics --num_inference_steps 50
    accelerate launch training/evaluate.py --model outputs/digits \
        --config training/configs/digits.yaml --variance_types fixed_small fixed_large optimal \
        --num_inference_steps 10 100 1000 --paths even best --decoder levels
    accelerate launch training/evaluate.py --model outputs/mnist \
        --config training/configs/mnist.yaml --table

Prints a table, and what simple codes need for the same images; writes evaluation.json,
bits_per_dim.png, bits_map.png and, with --metrics, nearest.png. What an optimal variance, a best
path or a decoder (--decoder levels) needs to know of the data is measured on --variance_split, so
not on the images that are reported on, unless it is the same split.

Finished bounds and sets of samples are kept in unfinished/ below the results until these are
written: the same command continues where it was stopped.
"""

import sys
import warnings

from ddpm_notes_pipeline.training.arguments import DataArguments, EvaluationArguments
from ddpm_notes_pipeline.training.parser import one_line, parse_evaluation_arguments


def main() -> None:
    warnings.formatwarning = one_line
    settings = parse_evaluation_arguments()
    try:
        evaluate(*settings)
    except ImportError as fault:  # an extra is not installed
        sys.exit(f"evaluate.py: error: {fault}")


def evaluate(data: DataArguments, evaluation: EvaluationArguments) -> None:
    """The measurement, and how it ends."""
    # Not at the top: it loads torch, which --help and a mistyped flag do without.
    from ddpm_notes_pipeline.training.evaluate import kept_text
    from ddpm_notes_pipeline.training.evaluate import main as measure
    from ddpm_notes_pipeline.training.stops import Stopped, Stops, exit_now

    stops = Stops()
    stops.where = "while measuring"
    stops.install()
    try:
        measure(data, evaluation)
    except Stopped as stop:
        exit_now(stop.status, f"evaluate.py: {stop}. {kept_text(evaluation)}", once=True)
    except (ValueError, OSError) as fault:
        sys.exit(f"evaluate.py: error: {' '.join(str(fault).split())}")


if __name__ == "__main__":
    main()
