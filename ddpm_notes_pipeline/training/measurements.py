"""What the weights so far are worth: bits/dim, distances of samples from images, sample grids."""

import numpy as np

from ..evaluation.level_reports import fit_image_levels
from ..evaluation.records import figures_of
from ..evaluation.samples import SampleTable
from ..evaluation.sampling import Watch, sample
from ..evaluation.validation import measure_bits_per_dim
from ..evaluation.yardsticks import Yardsticks, image_yardsticks
from ..pipeline_ddpm_notes import BitsPerDimOutput, DDPMNotesPipeline
from .images import TrainingImages
from .learner import Learner
from .logs import RunLogs, bits_per_dim_figures
from .stops import Stops


class Measurements:
    """Measures a learner's weights and logs the figures; the time does not count as training.

    A measurement uses the same noise or seeds every time. One that a signal interrupts is None. All
    methods are collective: every rank must call them.

    Attributes:
        table: of sample metrics; None without --metric_interval.
        yardsticks: of the validation images, on the main process, once bits/dim are measured.
        levels_of: the step to whose weights levels were last fitted, even if they gain too little.
    """

    def __init__(self, learner: Learner, images: TrainingImages, stops: Stops, cache_dir: str | None) -> None:
        self.learner, self.images, self.stops = learner, images, stops
        self.accelerator, run = learner.accelerator, learner.run
        self.table: SampleTable | None = None
        self.yardsticks: Yardsticks | None = None
        self.levels_of: int | None = None
        if run.metric_interval is not None:
            self.table = SampleTable(
                self.accelerator,
                images.stored,
                images.validation,
                train=images.stored,
                network=run.metric_network,
                images=run.metric_images,
                batch_size=run.eval_batch_size,
                seed=run.seed,
                cache_dir=cache_dir,
                classes=images.stored.num_classes is not None,
            )

    def validate(self, step: int, logs: RunLogs) -> BitsPerDimOutput | None:
        """bits/dim of the averaged weights."""
        if self.images.validation is None:
            return None
        self.fit_levels(step, logs)
        images = self.images.validation
        with logs.loss.paused(), self.learner.pipeline(float32=True, desc="validate", leave=False) as pipeline:
            result = measure_bits_per_dim(self.accelerator, pipeline, images, self.stops)
        if result is not None:
            logs.validation.add(step, bits_per_dim_figures(result))
            if self.yardsticks is None and self.accelerator.is_main_process:
                with logs.loss.paused():
                    self.yardsticks = image_yardsticks(self.images.stored, images)
        return result

    def fit_levels(self, step: int, logs: RunLogs) -> None:
        """Fit the 8-bit levels to the averaged weights after `step` steps, on training images."""
        if not self.learner.run.fit_levels or self.levels_of == step:
            return
        with logs.loss.paused(), self.learner.pipeline(float32=True, leave=False) as pipeline:
            fit = fit_image_levels(
                pipeline, self.images.stored, seed=self.learner.run.seed, accelerator=self.accelerator
            )
        self.levels_of = step
        self.learner.set_levels(fit.levels)

    def measure_samples(self, step: int, logs: RunLogs) -> None:
        """How far samples of the averaged weights after `step` steps are from images."""
        if self.table is None:
            return
        scheduler = self.learner.scheduler
        n = self.learner.run.ddpm_num_inference_steps or len(scheduler)
        row = {"variance_type": scheduler.variance_type, "path": scheduler.config.timestep_spacing}
        with logs.loss.paused(), self.learner.pipeline() as pipeline:
            result = self.table.add(pipeline, row | {"num_inference_steps": n}, self.stops, num_inference_steps=n)
        if result is not None:
            logs.metrics.add(step, figures_of(result))

    def grid_labels(self) -> list[int] | None:
        """The labels of `sample_grid`, classes in turn; None for a model without."""
        classes = DDPMNotesPipeline(self.learner.unet, self.learner.scheduler).num_classes
        return None if classes is None else [i % classes for i in range(self.learner.run.num_samples)]

    def sample_grid(self, watch: Watch | None = None) -> np.ndarray | None:
        """`num_samples` images, uint8 (N, C, H, W), of `grid_labels`; `watch`: see `sample`."""
        run, labels = self.learner.run, self.grid_labels()
        with self.learner.pipeline(desc="sample", unit="step") as pipeline:
            samples = sample(
                self.accelerator,
                pipeline,
                run.num_samples,
                run.eval_batch_size,
                class_labels=labels,
                stops=self.stops,
                watch=watch,
                num_inference_steps=run.ddpm_num_inference_steps,
            )
        return None if samples is None else samples.numpy()
