"""bits/dim of an image set, split over processes: the same number whatever their number."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import ImageSet
from ..names import LEARNED_VARIANCES
from ..pipeline_ddpm_notes import PILOT_IMAGES, BitsPerDimOutput, DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from .pictures import save_bits_per_dim
from .pixel_batches import batches
from .records import BoundRecord, Evaluation, FewestSteps, Headline, SampleRecord
from .sampling import Stop, with_progress_bar
from .yardsticks import Yardsticks


@dataclass
class Row:
    """bits/dim of one variance and path.

    Attributes:
        record: what evaluation.json keeps of it.
        result: what was measured, image by image.
    """

    record: BoundRecord
    result: BitsPerDimOutput

    @classmethod
    def of(cls, scheduler: DDPMNotesScheduler, kind: str, path: list[int], result: BitsPerDimOutput) -> "Row":
        """A result that this scheduler gave on a path of this kind."""
        names = {"variance_type": scheduler.variance_type, "path": kind, "num_inference_steps": len(path)}
        decoder_type, variance = decoder_of(scheduler, path)
        decoder = {"decoder_type": decoder_type, "decoder_variance": variance}
        return cls(BoundRecord.from_dict({**result, **names, **decoder}), result)

    @property
    def T(self) -> int:
        """Timesteps of the model."""
        return len(self.result.per_timestep)


def measure_bits_per_dim(
    accelerator: Accelerator,
    pipeline: DDPMNotesPipeline,
    images: ImageSet,
    stops: Stop | None = None,
    **settings: Any,
) -> BitsPerDimOutput | None:
    """`pipeline.bits_per_dim` over all images; collective, and every rank returns the same.

    Labels are those of the images, if they and the model have classes.

    Args:
        stops: ends it early.
        settings: of `bits_per_dim`.

    Returns:
        None if `stops` ended it on any process.

    Raises:
        ValueError: fewer images than processes.
    """
    n, processes = len(images), accelerator.num_processes
    if n < processes:
        raise ValueError(f"{n} images for {processes} processes; must be at least one each")
    first, end = n * accelerator.process_index // processes, n * (accelerator.process_index + 1) // processes
    labelled = pipeline.num_classes is not None
    # a generator does not say how many images it yields: `bits_per_dim`'s bar would have no total
    silent = with_progress_bar(pipeline, disable=True)
    with pipeline.image_progress_bar(desc="bits/dim", unit="image", total=end - first) as bar:

        def own_images() -> Iterator[Any]:
            for batch in batches(images, first, end, PILOT_IMAGES, labelled):  # a few at a time, to stop soon
                yield batch
                bar.update(len(batch["pixel_values"]))
                if stops is not None and stops.received:
                    return

        result = silent.bits_per_dim(
            own_images(),
            first_image=first,
            # evenly spaced, as many sets are sorted by class; the same on every rank
            pilot_images=batches(images.at_most(PILOT_IMAGES), labelled=labelled),
            **settings,
        )
    if stops is not None and stops.agreed():
        return None
    results = gather_object([result])
    return BitsPerDimOutput.from_parts(
        torch.cat([part.parts_per_image for part in results]),
        torch.stack([part.per_timestep * len(part.per_image) for part in results]).sum(0),
        result.dims,
        sum(part.network_evaluations for part in results),
    )


def decoder_of(scheduler: DDPMNotesScheduler, path: list[int]) -> tuple[str, float | None]:
    """Type of the decoder that ends a path, and the variance of a Gaussian that is not learned.

    Both as of `BoundRecord`.
    """
    if scheduler.levels is not None:
        return "levels", None
    if scheduler.variance_type in LEARNED_VARIANCES:
        return "own", None
    scheduler = DDPMNotesScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(timesteps=path)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    variance = float(scheduler.reverse_mean_variance(x, x, path[-1], -1)[1])
    return "fitted" if path[-1] in (scheduler.decoder_variance or {}) else "own", variance


def save_evaluation(
    folder: Path,
    images: ImageSet,
    rows: list[Row],
    weights: str | None,
    seed: int = 0,
    evaluations_per_image: int | None = None,
    metrics: list[SampleRecord] | None = None,
    yardsticks: Yardsticks | None = None,
    fewest_steps: FewestSteps | None = None,
    headline: Headline | None = None,
) -> Evaluation:
    """Write evaluation.json, and bits_per_dim.png if a row walks every timestep; the record.

    Earlier pictures are removed, as they show other numbers.

    Args:
        weights: digest of the measured weights (`weights_digest`), by which the card knows that the
            numbers belong to its model; None if unknown.
        evaluations_per_image: None: every term of the bound.
        metrics: of samples. fewest_steps: at equal quality. headline: on more images.
        yardsticks: of the same images as the headline, or else the rows.
    """
    dims = rows[0].result.dims
    record = Evaluation(
        data=images.name,
        split=images.split,
        images=len(images),
        dims=dims,
        fingerprint=images.fingerprint,
        classes=images.source.classes,
        seed=seed,
        evaluations_per_image=evaluations_per_image or "all",
        weights=weights,
        results=[row.record for row in rows],
        headline=headline,
        metrics=metrics or [],
        yardsticks=yardsticks.bits if yardsticks else None,
        fewest_steps=fewest_steps,
    )
    record.write(folder)
    picture = folder / Evaluation.PICTURE
    for earlier in (picture, folder / Evaluation.MAP, folder / Evaluation.NEAREST):
        earlier.unlink(missing_ok=True)
    whole = [row for row in rows if row.record.num_inference_steps == row.T]
    if whole:
        curves = {row.record.variance_type: row.result.per_timestep.numpy() for row in whole}
        save_bits_per_dim(picture, curves, f"{images.name} {images.split}: {len(images)} images of {dims} dims")
    return record
