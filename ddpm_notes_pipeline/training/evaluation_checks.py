"""What training/evaluate.py refuses before it starts."""

import tempfile
from pathlib import Path

from ..data import MODES, ImageSet
from ..names import LEARNED_VARIANCES
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from ..stock_config import PRIVATE_ENTRY
from .arguments import EvaluationArguments
from .images import dims


def check_variance_types(variances: list[str], scheduler: DDPMNotesScheduler) -> None:
    """Refuse a learned variance type that the network was not trained to output."""
    own = scheduler.config.variance_type  # the learned type, even if "optimal" is set over it
    for variance in variances:
        if variance in LEARNED_VARIANCES and variance != own:
            learned = f"{own}, " if own in LEARNED_VARIANCES else ""
            raise ValueError(
                f"--variance_types has {variance} and the model's variance is {own}; "
                f"each must be one of {learned}fixed_small, fixed_large, optimal"
            )


def check_steps(evaluation: EvaluationArguments, T: int) -> None:
    """Refuse numbers of steps that have no path, or at which nothing would be sampled."""
    steps, sampled = evaluation.num_inference_steps or [], evaluation.metric_steps or []
    for name, numbers in (("num_inference_steps", steps), ("metric_steps", sampled)):
        most = max(numbers, default=1)
        if most > T:
            raise ValueError(f"--{name} is {most}; it must be at most the model's {T} timesteps")
    if 1 in steps and T > 1 and "best" in (evaluation.paths or []):
        raise ValueError("--num_inference_steps is 1 with --paths best; it must be at least 2")
    without_bound = sorted(set(sampled) - set(steps))
    if evaluation.metrics and without_bound and not evaluation.samplers:
        raise ValueError(
            f"--metric_steps has {without_bound[0]} and --num_inference_steps has not; samples without a bound need "
            "--samplers"
        )


def check_images(pipeline: DDPMNotesPipeline, images: ImageSet) -> None:
    """Refuse images of another size than the model's: many networks would take them."""
    channels, side = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    mode = next((mode for mode in MODES if MODES[mode] == channels), None)
    height, width = (side, side) if isinstance(side, int) else side or images.size
    if mode is not None and (images.channels, *images.size) != (channels, height, width):
        sides = height if height == width else f"{height} {width}"
        raise ValueError(
            f"the images are {dims(images)} and the model's are {channels}x{height}x{width}; they must be the same "
            f"(--resolution {sides} --image_mode {mode})"
        )


def check_headline(images: ImageSet, more: ImageSet | None) -> None:
    """Refuse a headline on no more images than the rows."""
    if more is not None and len(more) <= len(images):
        raise ValueError(
            f"--headline_images gives {len(more)} images; it must be more than the {len(images)} of the rows (--max_images)"
        )


def check_labels(pipeline: DDPMNotesPipeline, images: ImageSet) -> None:
    """Refuse images whose classes are not the model's, or come in another order."""
    known, seen = pipeline.num_classes, images.num_classes
    if known is None:
        return
    if seen is None and pipeline.null_label is None:
        raise ValueError(
            f"the model has {known} classes and the images have no labels; they must have some (--label_column)"
        )
    if seen is not None and seen > known:
        raise ValueError(f"the images have {seen} classes and the model has {known}; they must be the same (--classes)")
    own = (pipeline.unet.config.get(PRIVATE_ENTRY) or {}).get("class_names") or []
    names = images.class_names or []
    if set(names) <= set(own) and names != own[: len(names)]:  # other names may be of the same classes
        raise ValueError(
            f"the images' classes are {', '.join(names)} and the model's are {', '.join(own)}; they must come in the same "
            f"order (--classes {' '.join(own)})"
        )


def check_guidance(evaluation: EvaluationArguments, pipeline: DDPMNotesPipeline, images: ImageSet) -> None:
    """Refuse guidance without labels, or of a model that was not trained without them, too."""
    guided = [scale for scale in evaluation.guidance_scales or [] if scale != 1]
    if guided and pipeline.null_label is None:
        raise ValueError(
            f"--guidance_scales has {guided[0]:g} and the model has no null label; it must be 1 (others are for a model "
            "that was trained with --label_column and --label_dropout above 0)"
        )
    if guided and images.num_classes is None:
        raise ValueError(
            f"--guidance_scales has {guided[0]:g} and the images have no labels; they must have some (--label_column)"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not take the results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        raise ValueError(f"{folder} must take the results and cannot be written to (--results_dir): {fault}") from fault
