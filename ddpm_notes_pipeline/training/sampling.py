"""What the weights so far can do: samples of them, and their bits/dim. Every process makes its part, and knows the whole."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ..data import ImageSet, to_uint8
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


def sample(
    accelerator: Accelerator,
    pipeline: DDPMNotesPipeline,
    number: int,
    batch_size: int,
    seed: int = 0,
    class_labels: Any = None,
    stops: Stops | None = None,
    watch: Callable[[torch.Tensor, int, int], None] | None = None,
    **settings: Any,
) -> torch.Tensor | None:
    """uint8 (number, C, H, W), the same on every process: image i comes from seed + i, whichever process makes it.

    Each process makes its part. `class_labels` has one for each image; `settings` are the pipeline's (steps, eta, ...). None if a signal
    that `stops` heard, on any process, ended it early. `watch` sees the process's first batch behind each step: x_t, the step, how many there are.
    """

    def after_step(pipeline: DDPMNotesPipeline, i: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = stops is not None and stops.received != 0
        if watch is not None and first == 0:
            watch(tensors["latents"], i, len(pipeline.scheduler.timesteps))
        return {}

    share = -(-number // accelerator.num_processes)  # rounded up; the last process may have fewer, or none
    mine = range(number)[accelerator.process_index * share : (accelerator.process_index + 1) * share]
    config = pipeline.unet.config
    size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    own = torch.zeros(share, config.in_channels, *size, dtype=torch.uint8, device=accelerator.device)
    for first in range(0, len(mine), batch_size):
        if stops is not None and stops.received:
            break
        rows = mine[first : first + batch_size]
        with accelerator.autocast():
            images = pipeline(
                batch_size=len(rows),
                class_labels=None if class_labels is None else class_labels[rows.start : rows.stop],
                generator=[torch.Generator().manual_seed(seed + i) for i in rows],
                output_type="latent",
                callback_on_step_end=after_step,
                return_dict=False,
                **settings,
            )[0]
        own[first : first + len(rows)] = to_uint8(images.float())
    if stops is not None and stops.agreed():
        return None
    return accelerator.gather(own)[:number].cpu()


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
