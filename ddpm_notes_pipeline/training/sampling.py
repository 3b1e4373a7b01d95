"""What the weights so far can do: samples of them, and their bits/dim. Every process makes its part, and knows the whole."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ..data import ImageSet
from ..evaluation.sampling import sample
from ..evaluation.validation import measure_bits_per_dim
from ..pipeline_ddpm_notes import BitsPerDimOutput, DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from .arguments import RunArguments
from .stops import Stops
from .updates import AveragedWeights

VALIDATION_EVALUATIONS = 16  # of the network, for each validation image


@contextlib.contextmanager
def averaged_weights(unet: UNet2DModel, ema: AveragedWeights | None) -> Any:
    """The UNet with its averaged weights, for as long as the block lasts."""
    if ema is None:
        yield
        return
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        ema.restore(unet.parameters())


def bits_per_dim(
    accelerator: Accelerator, unet: UNet2DModel, scheduler: DDPMNotesScheduler, images: ImageSet, stops: Stops
) -> BitsPerDimOutput | None:
    """bits/dim of the weights that the UNet has, as evaluate.py measures them, with fewer evaluations an image.

    None if a signal stops the run meanwhile.
    """
    pipeline = DDPMNotesPipeline(unet, DDPMNotesScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(desc="validate", leave=False, disable=not accelerator.is_main_process)
    unet.eval()
    n = VALIDATION_EVALUATIONS
    result = measure_bits_per_dim(accelerator, pipeline, images, stops, evaluations_per_image=n, batch_size=8 * n)
    unet.train()
    return result


def sample_grid(
    accelerator: Accelerator,
    unet: UNet2DModel,
    scheduler: DDPMNotesScheduler,
    run: RunArguments,
    stops: Stops,
    watch: Callable[[torch.Tensor, int, int], None] | None = None,
) -> Any:
    """`num_samples` images (N, C, H, W) of the weights that the UNet has, classes in turn; None if a signal stops the run meanwhile."""
    pipeline = DDPMNotesPipeline(unet, DDPMNotesScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(desc="sample", unit="step", disable=not accelerator.is_main_process)
    classes, n = pipeline.num_classes, run.num_samples
    labels = None if classes is None else [i % classes for i in range(n)]
    steps = run.ddpm_num_inference_steps
    unet.eval()
    settings: dict[str, Any] = {"class_labels": labels, "stops": stops, "watch": watch, "num_inference_steps": steps}
    made = sample(accelerator, pipeline, n, run.eval_batch_size, **settings)
    unet.train()
    return None if made is None else made.numpy()


def show(images: ImageSet, run: RunArguments) -> Any:
    """Real images for the left half of the picture, spread over the set."""
    count = min(run.num_samples, len(images))
    return images.take([i * len(images) // count for i in range(count)]).numpy()
