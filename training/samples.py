"""Samples of a pipeline, made by all processes together, and the table of how far they are from images."""

from typing import Any

import torch
from accelerate import Accelerator

from arguments import EvaluationArguments
from ddpm_notes_pipeline.data import ImageSet
from ddpm_notes_pipeline.features import load_feature_network
from ddpm_notes_pipeline.metrics import FEWEST_IMAGES, SampleMetrics, measure_samples
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline

COLUMNS = {  # name: width
    "images": 13,
    "path": 4,
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


def sample(
    accelerator: Accelerator,
    pipeline: DDPMNotesPipeline,
    timesteps: list[int],
    number: int,
    batch_size: int,
    seed: int,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 (number, C, H, W), the same on every process: image i comes from seed + i, whichever process makes it."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = -(-number // processes)  # rounded up; the last process may have fewer, or none
    parts = []
    for i in range(rank * share, min((rank + 1) * share, number), batch_size):
        rows = range(i, min(i + batch_size, (rank + 1) * share, number))
        images: Any = pipeline(
            batch_size=len(rows),
            class_labels=None if class_labels is None else class_labels[rows.start : rows.stop],
            timesteps=timesteps,
            generator=[torch.Generator().manual_seed(seed + row) for row in rows],
            output_type="pt",
            return_dict=False,
        )[0]
        parts.append((images * 255).round().to(torch.uint8))
    if processes == 1:
        return torch.cat(parts).cpu()
    config = pipeline.unet.config
    size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    own = torch.zeros(share, config.in_channels, *size, dtype=torch.uint8, device=accelerator.device)
    if parts:
        made = torch.cat(parts)
        own[: len(made)] = made.to(own.device)
    return accelerator.gather(own)[:number].cpu()


class SampleTable:
    """Rows of the table behind `evaluate.py --metrics`, the first one that of held-out images: what perfect samples would get.

    The first row is measured when the table is made: what is missing or does not fit is said before anything else takes its time.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        evaluation: EvaluationArguments,
        real: ImageSet,
        held_out: ImageSet,
        cache_dir: Any,
    ) -> None:
        if evaluation.metric_images < FEWEST_IMAGES:
            raise ValueError(f"--metric_images is {evaluation.metric_images}; allowed: at least {FEWEST_IMAGES}")
        self.accelerator, self.evaluation, self.real = accelerator, evaluation, real
        self.held_out = held_out if held_out.fingerprint != real.fingerprint else None
        with accelerator.local_main_process_first():
            self.network = load_feature_network(evaluation.metric_network).to(accelerator.device)
        self.cache_dir = cache_dir
        self.rows: list[tuple[dict[str, Any], SampleMetrics]] = []
        if self.held_out is not None:
            self._measure({"images": f"held-out {held_out.split}"}, self.held_out, {})

    def add(self, pipeline: DDPMNotesPipeline, variance: str, kind: str, path: list[int]) -> None:
        """Sample along a path and measure."""
        n, seed, labels = self.evaluation.metric_images, self.evaluation.noise_seed, None
        sampling: dict[str, Any] = {"seeds": f"{seed}..{seed + n - 1}, one an image"}
        if pipeline.num_classes is not None and self.real.labels is not None:
            labels = torch.from_numpy(self.real.labels[[i * len(self.real) // n for i in range(n)]])
            sampling["class_labels"] = "those of the real images, evenly spaced over them"
        images = sample(self.accelerator, pipeline, path, n, self.evaluation.batch_size, seed, labels)
        row = {"images": "samples", "variance_type": variance, "path": kind, "num_inference_steps": len(path)}
        self._measure(row, images, sampling)

    def _measure(self, row: dict[str, Any], images: Any, sampling: dict[str, Any]) -> None:
        result = measure_samples(
            images,
            self.real,
            train=self.real,
            held_out=self.held_out,
            network=self.network,
            sampling={name: value for name, value in row.items() if name != "images"} | sampling,
            cache_dir=self.cache_dir,
            accelerator=self.accelerator,
        )
        self.rows.append((row, result))

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON: each row's figures with their protocol."""
        return [{**row, **result.as_dict()} for row, result in self.rows]

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
                row.get("variance_type", row["images"]),
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
