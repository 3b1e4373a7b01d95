"""bits/dim of a set of images, split over the processes of an accelerator: the same number for any count of them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from ddpm_notes_pipeline.data import ImageSet
from ddpm_notes_pipeline.pipeline_ddpm_notes import PILOT_IMAGES, BitsPerDimOutput, DDPMNotesPipeline
from stops import Stops


def batches(
    images: ImageSet, first: int = 0, end: int | None = None, size: int = 256, labelled: bool = False
) -> Iterator[Any]:
    """The images first..end in order, a few at a time; `labelled`: each batch as a dict with its labels."""
    end = len(images) if end is None else end
    for i in range(first, end, size):
        index = range(i, min(i + size, end))
        pixels = images.take(index)
        if labelled and images.labels is not None:
            yield {"pixel_values": pixels, "class_labels": torch.from_numpy(images.labels[index])}
        else:
            yield pixels


def measure_bits_per_dim(
    accelerator: Accelerator,
    pipeline: DDPMNotesPipeline,
    images: ImageSet,
    stops: Stops | None = None,
    **settings: Any,
) -> BitsPerDimOutput | None:
    """`pipeline.bits_per_dim` over all images, each process taking a part of them; called by, and the same on, every process.

    Labels are the images', where the model and they have classes. `settings` are those of `bits_per_dim`. None if a signal that `stops`
    heard, on any process, ended it early.

    Raises:
        ValueError: fewer images than processes.
    """
    n, processes = len(images), accelerator.num_processes
    if n < processes:
        raise ValueError(f"{n} images for {processes} processes; allowed: at least one each")
    first, end = n * accelerator.process_index // processes, n * (accelerator.process_index + 1) // processes
    labelled = pipeline.num_classes is not None
    own = batches(images, first, end, labelled=labelled)
    if stops is not None:  # a few images at a time, to end soon
        few = batches(images, first, end, PILOT_IMAGES, labelled)
        own = (batch for i, batch in enumerate(few) if i == 0 or not stops.received)
    result = pipeline.bits_per_dim(
        own,
        first_image=first,
        pilot_images=batches(images, 0, min(PILOT_IMAGES, n), labelled=labelled),  # the same on every process
        **settings,
    )
    if stops is not None and stops.agreed():
        return None
    if processes == 1:
        return result
    # with a column that tells images from rows that only fill up
    parts = torch.zeros((math.ceil(n / processes), 4), dtype=torch.float64, device=accelerator.device)
    parts[: end - first] = torch.nn.functional.pad(result.parts_per_image, (0, 1), value=1.0).to(accelerator.device)
    parts = accelerator.gather(parts).cpu()
    counts = torch.tensor([result.network_evaluations], dtype=torch.float64, device=accelerator.device)
    sums = torch.cat([result.per_timestep.to(accelerator.device) * (end - first), counts])
    sums = accelerator.reduce(sums, "sum").cpu()
    return BitsPerDimOutput.from_parts(parts[parts[:, 3] == 1, :3], sums[:-1], result.dims, int(sums[-1]))
