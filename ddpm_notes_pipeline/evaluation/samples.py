"""How far samples are from images: a table that `evaluate.py --metrics` prints, and that training adds to while it runs."""

import dataclasses
import math
import statistics
from typing import Any

import torch
from accelerate import Accelerator

from ..data import ImageSet
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..training.sampling import sample
from ..training.stops import Stops
from .features import load_feature_network
from .metrics import FEWEST_IMAGES, SampleMetrics, measure_samples

COLUMNS = {  # name: width
    "images": 13,
    "path": 8,
    "K": 5,
    "n": 6,
    "frechet": 10,
    "kernel": 21,
    "precision": 9,
    "recall": 6,
    "mean err": 8,
    "var err": 8,
    "nearest": 8,
}


class SampleTable:
    """Samples of some pipelines, each measured beside the same real images; the first row is that of held-out images, which is what perfect
    samples would get.

    That row is measured when the table is made: what is missing or does not fit is said before anything else takes its time.

    Args:
        real: what samples are compared with, and whose nearest image is looked for.
        held_out: images that were not trained on, if there are any.
        network: name of the feature network (`load_feature_network`).
        images: samples of a set, at least 8.
        batch_size: sampled at once by a process.
        seed: image i of the first set comes from seed + i; the next set goes on behind it.
        sets: with more than one, each figure is the mean over them, and the kernel distance's standard error is over them too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        real: ImageSet,
        held_out: ImageSet | None,
        network: str,
        images: int,
        batch_size: int,
        seed: int = 0,
        sets: int = 1,
        cache_dir: str | None = None,
    ) -> None:
        if images < FEWEST_IMAGES:
            raise ValueError(f"--metric_images is {images}; allowed: at least {FEWEST_IMAGES}")
        self.accelerator, self.real, self.cache_dir = accelerator, real, cache_dir
        self.images, self.batch_size, self.seed, self.sets = images, batch_size, seed, sets
        self.held_out = held_out if held_out is not None and held_out.fingerprint != real.fingerprint else None
        with accelerator.local_main_process_first():
            self.network = load_feature_network(network).to(accelerator.device)
        self.rows: list[tuple[dict[str, Any], SampleMetrics]] = []
        if self.held_out is not None:
            row = {"images": f"held-out {self.held_out.split}"}
            self.rows.append((row, self._measure(self.held_out, {})))

    def add(
        self, pipeline: DDPMNotesPipeline, row: dict[str, Any], stops: Stops | None = None, **settings: Any
    ) -> SampleMetrics | None:
        """Sample with the pipeline's `settings`, measure, and keep that under what `row` says of it; None if a signal stops it."""
        n, labels = self.images, None
        last = self.seed + self.sets * n - 1
        sampling = {**row, "seeds": f"{self.seed}..{last}, one an image", "sets": self.sets}
        if pipeline.num_classes is not None and self.real.labels is not None:
            labels = torch.from_numpy(self.real.labels[[i * len(self.real) // n for i in range(n)]])
            sampling["class_labels"] = "those of the real images, evenly spaced over them"
        what = " ".join(map(str, row.values()))
        pipeline.set_progress_bar_config(
            desc=f"sample {what}", unit="step", leave=False, disable=not self.accelerator.is_main_process
        )
        results = []
        for first in range(self.seed, last, n):
            images = sample(
                self.accelerator, pipeline, n, self.batch_size, first, class_labels=labels, stops=stops, **settings
            )
            if images is None:
                return None
            results.append(self._measure(images, sampling))
        self.rows.append(({"images": "samples", **row}, mean_of(results)))
        if self.sets > 1:
            self.rows[-1][0]["kernel_distance of each set"] = [result.kernel_distance for result in results]
        return self.rows[-1][1]

    def _measure(self, images: Any, sampling: dict[str, Any]) -> SampleMetrics:
        return measure_samples(
            images,
            self.real,
            train=self.real,
            held_out=self.held_out,
            network=self.network,
            sampling=sampling,
            cache_dir=self.cache_dir,
            accelerator=self.accelerator,
            show_progress=False,
        )

    def as_list(self, last: bool = False) -> list[dict[str, Any]]:
        """For JSON: each row's figures with their protocol. `last`: of those of samples, the newest one alone."""
        made = [row for row in self.rows if row[0]["images"] == "samples"]
        left_out = made[:-1] if last else []
        return [{**row[0], **row[1].as_dict()} for row in self.rows if row not in left_out]

    def __str__(self) -> str:
        real, protocol = self.real, self.rows[-1][1].protocol
        lines = [
            f"\nDistances from {len(real)} images of {real.name} ({real.split}) over {protocol.num_features} features of {protocol.network}:",
            f"{protocol.preprocessing}.",
            "frechet compares at equal n alone, kernel at any; errors and nearest (the median over images) are on the scale 0..1.",
            " | ".join(f"{name:>{width}}" for name, width in COLUMNS.items()),
            "-+-".join("-" * width for width in COLUMNS.values()),
        ]
        for row, r in self.rows:
            cells = (
                name_of(row),
                row.get("path", ""),
                str(row.get("num_inference_steps", "")),
                str(r.protocol.num_generated),
                f"{r.frechet_distance:.4g}",
                f"{r.kernel_distance:.3g} ± {r.kernel_distance_standard_error:.1g}",
                f"{r.precision:.3f}",
                f"{r.recall:.3f}",
                f"{r.pixel_mean_error:.4f}",
                f"{r.pixel_variance_error:.4f}",
                f"{r.nearest_train_distance:.4f}",
            )
            lines.append(" | ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)))
        return "\n".join(lines)


def name_of(row: dict[str, Any]) -> str:
    """What made the images of a row: the variance of Algorithm 2, another sampler, or nothing: they are real."""
    return row.get("variance_type") or row.get("sampler") or row["images"]


def mean_of(results: list[SampleMetrics]) -> SampleMetrics:
    """Figures of several sets of samples: their means, and the kernel distance's standard error over the sets."""
    if len(results) == 1:
        return results[0]
    means: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(SampleMetrics) if f.name != "protocol"):
        values = [getattr(result, name) for result in results]
        means[name] = None if None in values else statistics.fmean(values)
    if means["kernel_distance"] is not None:
        spread = statistics.stdev(result.kernel_distance or 0.0 for result in results)
        means["kernel_distance_standard_error"] = spread / math.sqrt(len(results))
    return SampleMetrics(results[0].protocol, **means)


def figures_of(result: SampleMetrics) -> dict[str, float]:
    """The figures by their names, without the protocol: a row of metrics.jsonl."""
    names = (f.name for f in dataclasses.fields(SampleMetrics) if f.name != "protocol")
    figures = {name: getattr(result, name) for name in names if getattr(result, name) is not None}
    return figures | {"images": result.protocol.num_generated}
