"""bits/dim of a set of images, split over the processes of an accelerator: the same number for any count of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import ImageSet
from ..pipeline_ddpm_notes import PILOT_IMAGES, BitsPerDimOutput, DDPMNotesPipeline
from ..scheduling_ddpm_notes import LEARNED_VARIANCES, DDPMNotesScheduler
from ..training.stops import Stops
from .pictures import save_bits_per_dim


@dataclass
class Row:
    """One line of the table."""

    variance: str
    path: str
    steps: int
    decoder_variance: float | None  # None: the network's own
    result: BitsPerDimOutput


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


def decoder_of(scheduler: DDPMNotesScheduler, path: list[int]) -> float | None:
    """Variance of p(x_0 | x_t) at the end of a path; None: the network's own."""
    if scheduler.variance_type in LEARNED_VARIANCES:
        return None
    scheduler = DDPMNotesScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(timesteps=path)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return float(scheduler.reverse_mean_variance(x, x, path[-1], -1)[1])


def save_evaluation(
    folder: Path,
    images: ImageSet,
    rows: list[Row],
    weights: str | None,
    seed: int = 0,
    evaluations_per_image: int | None = None,
    metrics: list[dict[str, Any]] | None = None,
) -> list[str]:
    """Write evaluation.json, each number with its protocol, and bits_per_dim.png where a row walks every timestep; the names of the two.

    Args:
        weights: digest of what was measured (`weights_digest`), by which the card knows that the numbers are its model's.
        evaluations_per_image: None: every term of the bound was.
        metrics: of samples, each with a protocol of its own.
    """
    dims, T = rows[0].result.dims, len(rows[0].result.per_timestep)
    protocol = {
        "unit": "bits/dim",
        "data": images.name,
        "split": images.split,
        "images": len(images),
        "dims": dims,
        "fingerprint": images.fingerprint,
        "seed": seed,
        "evaluations_per_image": evaluations_per_image or "all",
        "weights": weights,
    }
    results = [
        {
            "variance_type": row.variance,
            "path": row.path,
            "num_inference_steps": row.steps,
            "decoder_variance": row.decoder_variance,
            **{
                name: getattr(row.result, name) for name in ("total", "standard_error", "prior", "diffusion", "decoder")
            },
            "standard_errors": row.result.standard_errors,
            "network_evaluations": row.result.network_evaluations,
        }
        for row in rows
    ]
    record = {**protocol, "results": results} | ({"metrics": metrics} if metrics else {})
    (folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    whole = {row.variance: row.result.per_timestep.numpy() for row in rows if row.steps == T and row.path == "even"}
    if not whole:
        (folder / "bits_per_dim.png").unlink(missing_ok=True)  # of other numbers
        return ["evaluation.json"]
    title = f"{images.name} {images.split}: {len(images)} images of {dims} dims"
    save_bits_per_dim(folder / "bits_per_dim.png", whole, title)
    return ["evaluation.json", "bits_per_dim.png"]
