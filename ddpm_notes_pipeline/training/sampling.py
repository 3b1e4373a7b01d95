"""Samples of a pipeline, made by several processes: each makes its part, and knows the whole."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ..data import to_uint8
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from .stops import Stops


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
