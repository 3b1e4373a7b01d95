"""Sampling a set of images, split over the processes of an accelerator."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import to_uint8
from ..pipeline_ddpm_notes import DDPMNotesPipeline

Watch = Callable[[torch.Tensor, int, int], None]  # x_t (B, C, H, W), step i, number of steps


class Stop(Protocol):
    """Anything that knows whether the run has to end, such as `training.stops.Stops`.

    Attributes:
        received: not 0 once this process has to end.
    """

    received: int

    def agreed(self) -> int:
        """Not 0 if any process has to end. Collective: every rank must call it."""


def sample(
    accelerator: Accelerator,
    pipeline: DDPMNotesPipeline,
    number: int,
    batch_size: int,
    seed: int = 0,
    class_labels: Any = None,
    stops: Stop | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> torch.Tensor | None:
    """uint8 (number, C, H, W), the same on every process; image i comes from seed + i.

    Collective: every rank must call it, and makes its share.

    Args:
        number, batch_size: images in all, and at once on each process.
        seed: of the first image.
        class_labels: one for each image.
        stops: ends sampling early.
        watch: called after each step of the process's first batch.
        settings: of the pipeline (steps, eta, ...).

    Returns:
        None if `stops` ended it on any process.
    """
    share = -(-number // accelerator.num_processes)  # rounded up: the last process may have fewer, or none
    mine = range(number)[accelerator.process_index * share : (accelerator.process_index + 1) * share]

    def after_step(pipeline: DDPMNotesPipeline, i: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if stops is not None and stops.received:
            pipeline.interrupt = True
        elif watch is not None and first == 0:
            watch(tensors["latents"], i, len(pipeline.scheduler.timesteps))
        return {}

    images: list[torch.Tensor] = []
    for first in range(0, len(mine), batch_size):
        rows = mine[first : first + batch_size]
        with accelerator.autocast():
            batch = pipeline(
                batch_size=len(rows),
                class_labels=None if class_labels is None else class_labels[rows.start : rows.stop],
                generator=[torch.Generator().manual_seed(seed + i) for i in rows],
                output_type="latent",
                callback_on_step_end=after_step,
                return_dict=False,
                **settings,
            )[0]
        if pipeline.interrupt:
            break
        images.append(to_uint8(batch.float()).cpu())
    if stops is not None and stops.agreed():
        return None
    return torch.cat(gather_object(images))


def with_progress_bar(pipeline: DDPMNotesPipeline, **options: Any) -> DDPMNotesPipeline:
    """A pipeline of the same network and scheduler, whose progress bars have these tqdm options."""
    same = type(pipeline)(**pipeline.components)
    same.set_progress_bar_config(**options)
    return same
