"""What the weights so far can do: samples of them, and their bits/dim. Every process makes its part, and knows the whole."""

import contextlib
import math
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from arguments import RunArguments
from ddpm_notes_pipeline.data import ImageSet, to_uint8
from ddpm_notes_pipeline.pipeline_ddpm_notes import BitsPerDimOutput, DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from stops import Stops
from updates import AveragedWeights
from validation import measure_bits_per_dim

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
    pipeline.set_progress_bar_config(disable=True)
    unet.eval()
    n = VALIDATION_EVALUATIONS
    result = measure_bits_per_dim(accelerator, pipeline, images, stops, evaluations_per_image=n, batch_size=8 * n)
    unet.train()
    return result


def sample(
    accelerator: Accelerator, unet: UNet2DModel, scheduler: DDPMNotesScheduler, run: RunArguments, stops: Stops
) -> Any:
    """`num_samples` images (N, C, H, W) uint8, image i from seed i whatever the number of processes, each of which makes its part.

    None if a signal stops the run meanwhile.
    """

    def end_if_stopped(pipeline: DDPMNotesPipeline, i: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = stops.received != 0
        return {}

    pipeline = DDPMNotesPipeline(unet, DDPMNotesScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(desc="sample", unit="step", disable=not accelerator.is_main_process)
    unet.eval()
    mine = range(run.num_samples)[accelerator.process_index :: accelerator.num_processes]
    made = []
    for i in range(0, len(mine), run.eval_batch_size):
        if stops.received:
            break
        seeds = mine[i : i + run.eval_batch_size]
        labels = None if pipeline.num_classes is None else [seed % pipeline.num_classes for seed in seeds]
        with accelerator.autocast():
            images = pipeline(
                batch_size=len(seeds),
                class_labels=labels,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=run.ddpm_num_inference_steps,
                output_type="latent",
                callback_on_step_end=end_if_stopped,
                return_dict=False,
            )[0]
        made.append(to_uint8(images.float()))
    unet.train()
    if stops.agreed():
        return None
    size = unet.config.sample_size
    none = torch.empty(
        (0, unet.config.in_channels, *((size, size) if isinstance(size, int) else size)), dtype=torch.uint8
    )
    own = torch.cat([none, *made])
    gathered = accelerator.gather(accelerator.pad_across_processes(own.to(accelerator.device), dim=0)).cpu()
    # process r made images r, r + P, ...: put them back in their order
    per_process = math.ceil(run.num_samples / accelerator.num_processes)
    order = [
        (i % accelerator.num_processes) * per_process + i // accelerator.num_processes for i in range(run.num_samples)
    ]
    return gathered[order].numpy()


def show(images: ImageSet, run: RunArguments) -> Any:
    """Real images for the left half of the picture, spread over the set."""
    count = min(run.num_samples, len(images))
    return images.take([i * len(images) // count for i in range(count)]).numpy()
