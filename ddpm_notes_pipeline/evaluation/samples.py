"""A table of how far samples are from images, for `evaluate.py --metrics` and for training."""

import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import ImageSet
from ..data.sources import evenly_spaced
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from .features import load_feature_network
from .metrics import FEWEST_IMAGES, SampleComparison
from .pictures import save_nearest
from .pieces import Piece, Pieces, image_settings, scheduler_settings
from .reading import nearest_training_images
from .records import Key, SampleMetrics, SampleRecord
from .reports import sample_text
from .sampling import Stop, sample, with_progress_bar

EXAMPLES = 8  # images of a set that are shown
# Real images that samples are compared with. The distances between all pairs of them take quadratic
# time: with 60,000, minutes.
REAL_IMAGES = 10_000


class SampleTable:
    """Samples of several pipelines, each compared with the same real images.

    The first row is that of held-out images, if there are any: what perfect samples would get. It
    is measured at once, so that whatever is missing or does not fit is found before sampling.

    Args:
        real: images that samples are compared with, at most 10,000 of them, evenly spaced.
        held_out: images that were not trained on, if there are any.
        train: training images, of which the nearest to each sample is found; None: it is not.
        network: name of the feature network (`load_feature_network`).
        images: samples in a set, at least 8.
        batch_size: images that a process samples at once.
        seed: image i of the first set comes from seed + i; the next set continues from there.
        sets: if more than one, figures are means over the sets, and the standard error of the
            kernel distance is over them too.
        cache_dir: see `measure_samples`.
        pieces: where finished sets, and the parts of an unfinished one, are kept.
        classes: whether the model has classes. If `real` has labels, too, the table has the share
            of images that show theirs.

    Raises:
        ValueError: too few images. And as of `load_feature_network` and `measure_samples`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        real: ImageSet,
        held_out: ImageSet | None,
        train: ImageSet | None,
        network: str,
        images: int,
        batch_size: int,
        seed: int = 0,
        sets: int = 1,
        cache_dir: str | None = None,
        pieces: Pieces | None = None,
        classes: bool = False,
    ) -> None:
        if images < FEWEST_IMAGES:
            raise ValueError(f"--metric_images is {images}; must be at least {FEWEST_IMAGES}")
        if held_out is not None and held_out.fingerprint == real.fingerprint:
            held_out = None
        real = real.at_most(REAL_IMAGES)
        self.accelerator, self.real, self.held_out = accelerator, real, held_out
        self.images, self.batch_size, self.seed, self.sets = images, batch_size, seed, sets
        with accelerator.local_main_process_first():
            features = load_feature_network(network).to(accelerator.device)
        self.comparison = SampleComparison(
            real,
            train,
            held_out=None if train is None else held_out,
            network=features,
            cache_dir=cache_dir,
            accelerator=accelerator,
        )
        self.pieces = pieces or Pieces(accelerator)
        # what figures of samples depend on besides the samples
        self.compared_with: dict[str, Any] = {"network": [features.name, features.weights, features.preprocessing]}
        for name, one in {"real": real, "train": train, "held_out": held_out}.items():
            self.compared_with[name] = None if one is None else image_settings(one, labelled=True)
        self.rows: list[SampleRecord] = []
        self.examples: dict[Key, torch.Tensor] = {}  # some images of each row of samples
        if held_out is not None:
            labels = held_out.labels if classes else None
            piece = self.pieces.get(
                {"of": "held-out images", "compared with": self.compared_with},
                lambda: Piece(self.comparison.measure(held_out, class_labels=labels).as_dict()),
            )
            self.rows.append(SampleRecord(f"held-out {held_out.split}", SampleMetrics.from_dict(piece.values)))

    def add(
        self,
        pipeline: DDPMNotesPipeline,
        row: dict[str, Any],
        stops: Stop | None = None,
        sets: int | None = None,
        **settings: Any,
    ) -> SampleMetrics | None:
        """Sample, measure and add a row. Collective: every rank must call it.

        Args:
            row: what identifies it: `variance_type` or `sampler`, `path`, `num_inference_steps`.
            stops: ends it early.
            sets: of this row; default: those of the table.
            settings: of the pipeline.

        Returns:
            None if `stops` ended it on any process.
        """
        sets = sets or self.sets
        n, first, end = self.images, self.seed, self.seed + sets * self.images
        sampling = {**row, "seeds": f"{first}..{end - 1}, one an image", "sets": sets}
        if self.accelerator.mixed_precision != "no":
            sampling["mixed_precision"] = self.accelerator.mixed_precision
        labels = None
        if pipeline.num_classes is not None and self.real.labels is not None:
            labels = torch.from_numpy(self.real.labels[[i * len(self.real) // n for i in range(n)]])
            sampling["class_labels"] = "those of the real images, evenly spaced over them"
        what = " ".join(map(str, row.values()))
        hidden = not self.accelerator.is_main_process
        pipeline = with_progress_bar(pipeline, desc=f"sample {what}", unit="step", leave=False, disable=hidden)
        found = []
        for seed in range(first, end, n):
            piece = self._measure_set(pipeline, seed, labels, sampling, stops, settings)
            if piece is None:
                return None
            found.append(piece)
        results = [SampleMetrics.from_dict(piece.values) for piece in found]
        each = [result.kernel_distance for result in results] if sets > 1 else None
        self.rows.append(SampleRecord("samples", mean_of(results), **row, kernel_distances=each))
        self.examples[self.rows[-1].key] = found[0].tensors["examples"]
        return self.rows[-1].metrics

    def _measure_set(
        self,
        pipeline: DDPMNotesPipeline,
        seed: int,
        labels: torch.Tensor | None,
        sampling: dict[str, Any],
        stops: Stop | None,
        settings: dict[str, Any],
    ) -> Piece | None:
        """Metrics and examples of a set, whose image i comes from seed + i; None if stopped."""
        n, at_once = self.images, self.batch_size * self.accelerator.num_processes
        the_set = {"samples of": settings, **scheduler_settings(pipeline), "seeds": [seed, seed + n]}
        the_set |= {"labels": None if labels is None else labels.tolist()}

        def sample_part(rows: range) -> Piece | None:
            mine = None if labels is None else labels[rows.start : rows.stop]
            at = (len(rows), self.batch_size, seed + rows.start, mine, stops)
            images = sample(self.accelerator, pipeline, *at, **settings)
            return None if images is None else Piece(tensors={"images": images})

        def measure() -> Piece | None:
            parts = []
            for i in range(0, n, at_once):
                rows = range(i, min(i + at_once, n))
                part = self.pieces.get(the_set, partial(sample_part, rows), rows)
                if part is None:
                    return None
                parts.append(part.tensors["images"])
            images = torch.cat(parts)
            metrics = self.comparison.measure(images, sampling, class_labels=labels)
            if self.held_out is not None:
                metrics = replace(metrics, held_out_class_accuracy=self.rows[0].metrics.class_accuracy)
            return Piece(metrics.as_dict(), {"examples": images[evenly_spaced(n, EXAMPLES)]})

        piece = self.pieces.get(the_set | {"sampling": sampling, "compared with": self.compared_with}, measure)
        if piece is not None:
            self.pieces.drop_parts(the_set)
        return piece

    def save_nearest(self, path: Path, row: SampleRecord) -> None:
        """Draw some samples of a row, and held-out images, above their nearest training images.

        Nothing, without training images.
        """
        train = self.comparison.train
        if train is None:
            return
        sets = {f"Samples of {row.name}, {row.num_inference_steps} {row.path} steps": self.examples[row.key]}
        if self.held_out is not None:
            few = self.held_out.at_most(EXAMPLES)
            sets[f"Held-out images, split {few.split}"] = few.take(range(len(few)))
        nearest, distances = nearest_training_images(torch.cat(list(sets.values())), train)
        sizes = [len(images) for images in sets.values()]
        found = zip(sets.items(), nearest.split(sizes), distances.split(sizes))
        save_nearest(path, {name: (a.numpy(), b.numpy(), d.numpy()) for (name, a), b, d in found})

    def as_list(self, last: bool = False) -> list[SampleRecord]:
        """The rows; with `last`, of those of samples only the newest."""
        older = [row for row in self.rows if row.is_sampled][:-1] if last else []
        return [row for row in self.rows if row not in older]

    def __str__(self) -> str:
        return f"\n{sample_text(self.rows)}"


def mean_of(results: list[SampleMetrics]) -> SampleMetrics:
    """Means of the figures over sets of samples.

    The standard error of the kernel distance is then over the sets.
    """
    if len(results) == 1:
        return results[0]
    every = [result.figures() for result in results]
    means: dict[str, Any] = {name: statistics.fmean(figures[name] for figures in every) for name in every[0]}
    if "kernel_distance" in means:
        spread = statistics.stdev(figures["kernel_distance"] for figures in every)
        means["kernel_distance_standard_error"] = spread / math.sqrt(len(results))
    return replace(results[0], **means)
