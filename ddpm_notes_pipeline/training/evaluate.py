"""What training/evaluate.py does: bits/dim and samples of a DDPM, and the table of both."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ..data import HELD_OUT, ImageSet, hold_out
from ..evaluation.findings import fewest_steps, kernel_distances
from ..evaluation.level_reports import compare_with_fit, fit_image_levels, fit_text
from ..evaluation.pictures import save_bit_map
from ..evaluation.pieces import (
    Piece,
    Pieces,
    image_settings,
    int_keys,
    network_settings,
    scheduler_settings,
)
from ..evaluation.pixel_batches import batches
from ..evaluation.records import BoundRecord, Evaluation, FewestSteps, Headline
from ..evaluation.reports import TERMINAL_COLUMNS, headline_text, text_header, text_line, yardstick_text
from ..evaluation.samples import SampleTable
from ..evaluation.sampling import with_progress_bar
from ..evaluation.tables import results_table
from ..evaluation.validation import Row, measure_bits_per_dim, save_evaluation
from ..evaluation.yardsticks import MOST_TRAINING_PIXELS, Yardsticks, image_yardsticks
from ..hub.card import weights_digest, write_card
from ..hub.push import push_command
from ..level_fit import LevelFit
from ..names import LEARNED_VARIANCES
from ..pipeline_ddpm_notes import BitsPerDimOutput, DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from ..variances import best_timesteps, measure_original_sample_mse
from .arguments import DataArguments, EvaluationArguments
from .evaluation_checks import (
    check_guidance,
    check_headline,
    check_images,
    check_labels,
    check_steps,
    check_variance_types,
    check_writable,
)
from .held_out import seen_in_training
from .images import load_split

VARIANCE_IMAGES = 4096  # of V_t: with T = 1000, 131 evaluations of each
MAP_IMAGES = 16  # whose bits are drawn
MAP_PRECISION = 12  # times --evaluations_per_image: a pixel's bits are noisier than their sum
# Of --table, beside T. At T only one set of fixed_large is sampled, as the reference.
TABLE_STEPS = [10, 25, 50, 100]
# Variances that --table also samples on the best paths.
SAMPLED_ON_BEST_PATHS = ("optimal", *LEARNED_VARIANCES)
# flag: name in tables, scheduler, settings that differ from the model's
SAMPLERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ddim": ("DDIM", DDIMScheduler, {}),  # clips x0_hat, but keeps the unclipped eps_hat
    "eta0": ("eta = 0", DDPMNotesScheduler, {"eta": 0.0}),  # DDIM with the eps_hat of the clipped x0_hat
    # Half the log SNR ends at -5.06 with linear betas. The cosine schedule goes on to -10, where
    # eps says nothing of x_0: this sampler does not clip x0_hat, and breaks down there.
    "dpmsolver++": ("DPM-Solver++", DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}),
}


def main(data: DataArguments, evaluation: EvaluationArguments) -> None:
    """Measure and print; write evaluation.json, pictures, the card and table.md (--table)."""
    EvaluationRun(data, evaluation).measure()


class EvaluationRun:
    """Measures a model on a split. All methods but `write` are collective.

    Attributes:
        pipeline: its scheduler changes from row to row.
        own: the model's scheduler, with the levels that --decoder asks for.
        mse: V_t of each timestep; None while it is unknown.
        fit: of the levels; None if the model had them, or needs none.
        images: those that are measured on. more_images: those of the headline, if one is asked for.
        headline: the model's own variance in all T steps on them.
        rows: bits/dim, by variance and path. notes: lines below their table.
        samples: with --metrics, how far samples are from images.
        pieces: what is finished, kept until the results are written.
    """

    def __init__(self, data: DataArguments, evaluation: EvaluationArguments) -> None:
        self.accelerator, self.data = Accelerator(), data
        self.pipeline = load_pipeline(self.accelerator, evaluation)
        self.own: DDPMNotesScheduler = self.pipeline.scheduler
        self.mse: list[float] | None = self.own.original_sample_mse
        self.fit: LevelFit | None = None
        self.evaluation = evaluation = with_defaults(evaluation, self.own)
        check_variance_types(evaluation.variance_types or [], self.own)
        check_steps(evaluation, len(self.own))
        self.images = self.load(evaluation.split, evaluation.max_images)
        check_images(self.pipeline, self.images)
        check_labels(self.pipeline, self.images)
        check_guidance(evaluation, self.pipeline, self.images)
        self.more_images = (
            self.load(evaluation.split, evaluation.headline_images) if evaluation.headline_images else None
        )
        check_headline(self.images, self.more_images)
        self.headline: Headline | None = None
        if self.accelerator.is_main_process:
            check_writable(results_folder(evaluation))
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.samples: SampleTable | None = None
        of_all = network_settings(self.pipeline, self.accelerator)
        self.pieces = Pieces(self.accelerator, results_folder(evaluation) / Pieces.FOLDER, of_all)

    @property
    def labelled(self) -> bool:
        """Whether the model takes labels."""
        return self.pipeline.num_classes is not None

    def load(self, split: str, max_images: int | None = None) -> ImageSet:
        """As `read`, decoded by one process per machine."""
        with self.accelerator.local_main_process_first():
            return self.read(split, max_images)

    def read(self, split: str, max_images: int | None = None) -> ImageSet:
        """A split, its images whole or cropped at the centre. Not collective.

        The training split is what was trained on: --max_train_samples of it, and without the images
        of --validation_share, which are the split "held_out".
        """
        data, evaluation = self.data, self.evaluation
        if data.validation_share is None and split == HELD_OUT:
            raise ValueError(f"--split is {HELD_OUT}; it needs --validation_share, which says which images those are")
        trained_on = data.max_train_samples if split == data.train_split else None
        if data.streaming or (data.validation_share is None and trained_on is None):
            limits = [limit for limit in (max_images, trained_on) if limit is not None]
            return load_split(self.accelerator, data, split, min(limits, default=None))
        if split not in (data.train_split, HELD_OUT):
            return load_split(self.accelerator, data, split, max_images)
        found = load_split(self.accelerator, data, data.train_split, data.max_train_samples)
        if data.validation_share is not None:
            training, held_out = hold_out(found, data.validation_share, evaluation.seed)
            if split == HELD_OUT:
                fault = seen_in_training(evaluation.model, evaluation.revision, data, evaluation.seed, training)
                if fault is not None:
                    raise ValueError(fault)
            found = held_out if split == HELD_OUT else training
        return found.at_most(max_images)

    def measure(self) -> None:
        """Fill `rows` and `samples`, print and write them."""
        evaluation, pipeline = self.evaluation, self.pipeline
        main = self.accelerator.is_main_process
        if evaluation.metrics:
            self.samples = self.sample_table()
        self.choose_levels()
        self.measure_mse()
        for variance, kind, path in self.variances_and_paths():
            pipeline.scheduler = self.scheduler_of(variance)
            row = self.measure_row(kind, path, self.images)
            self.rows.append(row)
            if main:
                self.print_row(row, path)
            if self.samples is not None and is_sampled(evaluation, row.record, row.T):
                names = {"variance_type": variance, "path": kind, "num_inference_steps": len(path)}
                reference = evaluation.table and len(path) == row.T
                self.add_samples(self.samples, names, sets=1 if reference else None, timesteps=path)
        if self.samples is not None:
            self.add_samplers(self.samples)
        if self.more_images is not None:
            self.headline = self.measure_headline(self.more_images)
        if main:
            if evaluation.save_variances:  # only now: it changes what the same command measures
                self.with_measured_variances().save_pretrained(Path(evaluation.model) / "scheduler")
            self.write()
            if self.pieces.found:
                print(f"Not measured again: {self.pieces.found} of {self.pieces.found + self.pieces.measured} pieces.")
            self.pieces.clear()
        self.accelerator.end_training()

    def scheduler_of(self, variance: str) -> DDPMNotesScheduler:
        """The model's scheduler with this variance."""
        mse = self.mse if variance == "optimal" else None
        return DDPMNotesScheduler.from_config(
            self.own.config, variance_type=variance, original_sample_mse=mse, eta=None
        )

    def with_measured_variances(self) -> DDPMNotesScheduler:
        """The scheduler with V_t; its variance becomes the optimal one, unless it is learned."""
        own = self.own
        variance = own.variance_type if own.variance_type in LEARNED_VARIANCES else "optimal"
        return DDPMNotesScheduler.from_config(
            own.config, variance_type=variance, original_sample_mse=self.mse, decoder_variance=own.decoder_variance
        )

    def print_row(self, row: Row, path: list[int]) -> None:
        """Print the newest row; note how the levels fit on the images of the first."""
        first = len(self.rows) == 1
        header = text_header(TERMINAL_COLUMNS) + "\n" if first else ""
        print(header + text_line(TERMINAL_COLUMNS, row.record), flush=True)
        if first and self.fit is not None and self.fit.levels is not None:
            self.notes.append(compare_with_fit(self.fit, row, path[-1]))

    def sample_table(self) -> SampleTable:
        evaluation, data = self.evaluation, self.data
        real = self.load(evaluation.metric_split)
        return SampleTable(
            self.accelerator,
            real,
            held_out=None if evaluation.split in (data.train_split, evaluation.metric_split) else self.images,
            train=real if evaluation.metric_split == data.train_split else None,
            network=evaluation.metric_network,
            images=evaluation.metric_images,
            batch_size=evaluation.batch_size,
            seed=evaluation.noise_seed,
            sets=evaluation.metric_sets,
            cache_dir=data.cache_dir,
            pieces=self.pieces,
            classes=self.labelled,
        )

    def choose_levels(self) -> None:
        """Fit the levels on --variance_split, if --decoder asks for them and the model has none.

        V_t is of x0_hat as the steps use it: with other levels it has to be measured anew.
        """
        evaluation, own = self.evaluation, self.own
        if evaluation.decoder == "levels" and own.levels is None:
            size, accelerator = evaluation.batch_size, self.accelerator

            def fit_levels(images: ImageSet) -> dict[str, Any]:
                return vars(fit_image_levels(self.pipeline, images, batch_size=size, accelerator=accelerator))

            self.fit = LevelFit(**int_keys(self.fitted("levels", fit_levels)))
            self.own = DDPMNotesScheduler.from_config(own.config, levels=self.fit.levels)
            self.pipeline.scheduler, self.mse = self.own, None
            if accelerator.is_main_process:
                print(f"{fit_text(self.fit)}\n", flush=True)

    def measure_mse(self) -> None:
        """Measure V_t on --variance_split, if it is needed and not known."""
        evaluation, pipeline, size = self.evaluation, self.pipeline, self.evaluation.batch_size
        uses_mse = "optimal" in (*(evaluation.variance_types or []), self.own.variance_type)
        uses_mse = uses_mse or "best" in (evaluation.paths or []) or evaluation.save_variances
        if uses_mse and self.mse is None:

            def measure(images: ImageSet) -> list[float]:
                labelled, hidden = batches(images, labelled=self.labelled), not self.accelerator.is_main_process
                # batches do not say how many images they are
                shown = with_progress_bar(pipeline, total=len(images), disable=hidden)
                error = measure_original_sample_mse(shown, labelled, batch_size=size, accelerator=self.accelerator)
                return error.original_sample_mse.tolist()

            self.mse = self.fitted("variances", measure, VARIANCE_IMAGES)

    def fitted(self, what: str, measure: Callable[[ImageSet], Any], max_images: int | None = None) -> Any:
        """What `measure` finds on --variance_split, or an earlier run found; for JSON."""
        images = self.load(self.evaluation.variance_split, max_images)
        settings = {"of": what, **scheduler_settings(self.pipeline), **image_settings(images, self.labelled)}
        return self.pieces.get(settings, lambda: Piece({what: measure(images)})).values[what]

    def variances_and_paths(self) -> Iterator[tuple[str, str, list[int]]]:
        """Variance, kind of path and its timesteps, for each row of the table."""
        T = len(self.own)
        for variance in self.evaluation.variance_types or []:
            for steps in self.evaluation.num_inference_steps or []:
                for kind in self.evaluation.paths or [] if steps < T else ["even"]:
                    yield variance, kind, self.timesteps(variance, kind, steps)

    def timesteps(self, variance: str, kind: str, steps: int) -> list[int]:
        """Of a path of that kind, "even" or "best"."""
        scheduler = self.scheduler_of(variance)
        return best_timesteps(scheduler, steps, self.mse) if kind == "best" else even_timesteps(scheduler, steps)

    def measure_headline(self, images: ImageSet) -> Headline:
        """bits/dim of the model as it is, in all its steps."""
        self.pipeline.scheduler = self.scheduler_of(self.own.variance_type)
        row = self.measure_row("even", even_timesteps(self.own, len(self.own)), images)
        return Headline.from_dict({**row.record.as_dict(), "images": len(images), "fingerprint": images.fingerprint})

    def measure_row(self, kind: str, path: list[int], measured: ImageSet) -> Row:
        """bits/dim of these images with the pipeline's scheduler on a path of this kind."""
        evaluation, scheduler = self.evaluation, self.pipeline.scheduler
        settings: dict[str, Any] = {"evaluations_per_image": evaluation.evaluations_per_image, "full": evaluation.full}
        settings |= {"timesteps": path, "seed": evaluation.noise_seed}
        images = image_settings(measured, self.labelled)

        def measure() -> Piece:
            size = evaluation.batch_size
            result = measure_bits_per_dim(self.accelerator, self.pipeline, measured, batch_size=size, **settings)
            assert result is not None  # nothing stops it early
            return Piece.of(result)

        piece = self.pieces.get({"of": "bits/dim", **scheduler_settings(self.pipeline), **images, **settings}, measure)
        return Row.of(scheduler, kind, path, BitsPerDimOutput(**{**piece.values, **piece.tensors}))

    def add_samplers(self, samples: SampleTable) -> None:
        """Add a row for each of --samplers and number of steps."""
        evaluation = self.evaluation
        for flag in evaluation.samplers or []:
            name, kind, settings = SAMPLERS[flag]
            # trailing: from pure noise on; the model's own spacing is for T steps
            self.pipeline.scheduler = kind.from_config(self.own.config, timestep_spacing="trailing", **settings)
            for steps in evaluation.metric_steps or []:
                row = {"sampler": name, "path": "trailing", "num_inference_steps": steps}
                self.add_samples(samples, row, num_inference_steps=steps)

    def add_samples(self, samples: SampleTable, row: dict[str, Any], sets: int | None = None, **settings: Any) -> None:
        """Add a row of the pipeline's samples for each of --guidance_scales."""
        for scale in self.evaluation.guidance_scales or []:
            guidance: dict[str, Any] = {} if scale == 1 else {"guidance_scale": scale}
            samples.add(self.pipeline, row | guidance, sets=sets, **settings, **guidance)

    def fewest_steps(self, samples: SampleTable) -> FewestSteps | None:
        """How the row of samples is made that has the fewest steps at equal quality."""
        T, kernels = len(self.own), kernel_distances(samples.rows)
        key = fewest_steps(kernels, T)
        if key is None:
            return None
        name, path, steps = key
        _, kind, settings = next(
            (known for known in SAMPLERS.values() if known[0] == name),
            (name, DDPMNotesScheduler, {"variance_type": name}),
        )
        ours = kind is DDPMNotesScheduler
        needs = {"levels": ours and self.own.levels is not None, "original_sample_mse": name == "optimal"}
        (distance, error), (reference, reference_error) = kernels[key], kernels["fixed_large", "even", T]
        return FewestSteps(
            name=name,
            path=path,
            num_inference_steps=steps,
            scheduler=kind.__name__,
            scheduler_settings=settings | ({"timestep_spacing": path} if path == "trailing" else {}),
            timesteps=None if path == "trailing" else self.timesteps(name, path, steps),
            needs=[name for name, needed in needs.items() if needed],
            kernel_distance=distance,
            standard_error=error,
            reference_steps=T,
            reference_kernel_distance=reference,
            reference_standard_error=reference_error,
        )

    def yardsticks(self) -> Yardsticks | None:
        """Of the headline's images, or else those of the rows; not collective.

        Histograms are of the training images. None, with a warning, if there are no training images
        of the same size.
        """
        data, most = self.data, self.data.max_train_samples
        if data.streaming:  # reads the first of them
            most = min(most or MOST_TRAINING_PIXELS, max(1, MOST_TRAINING_PIXELS // self.images.dims))
        try:
            return image_yardsticks(self.read(data.train_split, most), self.more_images or self.images)
        except (ValueError, OSError) as fault:
            warnings.warn(f"no yardsticks to compare with: {' '.join(str(fault).split())}", stacklevel=2)
            return None

    def save_map(self, folder: Path) -> None:
        """Write the picture of where some images' bits are, with the model's own settings."""
        evaluation, pipeline = self.evaluation, self.pipeline
        some = self.images.at_most(MAP_IMAGES)  # evenly spaced
        pipeline.scheduler = DDPMNotesScheduler.from_config(self.own.config, original_sample_mse=self.mse, eta=None)
        # batches do not say how many images they are
        result = with_progress_bar(pipeline, desc="map", total=len(some)).bits_per_dim(
            batches(some, labelled=self.labelled),
            evaluations_per_image=MAP_PRECISION * evaluation.evaluations_per_image,
            full=evaluation.full,
            batch_size=evaluation.batch_size,
            seed=evaluation.noise_seed,
            return_map=True,
        )
        log_snr = self.own.chain.pair(torch.arange(len(self.own)), -1).snr_t.log().numpy()
        save_bit_map(folder / Evaluation.MAP, some.take(range(len(some))).numpy(), result, log_snr)

    def write(self) -> None:
        """Write results, and the card of a local model; print the other tables and where all is."""
        evaluation, samples = self.evaluation, self.samples
        local, folder = local_folder(evaluation), results_folder(evaluation)
        weights = weights_digest(local) if local else None
        fewest = self.fewest_steps(samples) if samples else None
        record = save_evaluation(
            folder,
            self.images,
            self.rows,
            weights,
            seed=evaluation.noise_seed,
            evaluations_per_image=None if evaluation.full else evaluation.evaluations_per_image,
            metrics=samples.rows if samples else None,
            yardsticks=self.yardsticks(),
            fewest_steps=fewest,
            headline=self.headline,
        )
        self.save_map(folder)
        if samples is not None and record.nearest_samples is not None:
            samples.save_nearest(folder / record.NEAREST, record.nearest_samples)
        names = [name for name in (record.FILE, record.PICTURE, record.MAP, record.NEAREST) if (folder / name).exists()]
        print(f"\nbits/dim: {record.protocol}; ± standard error over images.")
        said = [] if evaluation.table else [headline_text(record), yardstick_text(record)]
        print("\n".join([*filter(None, said), *self.notes]))
        if samples is not None:
            print(samples)
        if evaluation.table:
            text = results_table(self.rows, record)
            (folder / "table.md").write_text(text, encoding="utf-8")
            names.append("table.md")
            print(f"\n{text}")
        print(f"Written: {', '.join(f'{folder}/{name}' for name in names)}")
        if local and folder.samefile(local):
            write_card(folder)
            lacks = fewest.missing(DDPMNotesScheduler.from_pretrained(folder / "scheduler")) if fewest else []
            if lacks:
                print(
                    f"The card's code does not use the fewest steps: the scheduler lacks {', '.join(lacks)} (--save_variances)"
                )
            print(f"The card {folder}/README.md has these numbers now. Publish: {push_command(folder, 'USER/NAME')}")


def load_pipeline(accelerator: Accelerator, evaluation: EvaluationArguments) -> DDPMNotesPipeline:
    """The model on this process's device, with a DDPMNotesScheduler.

    Raises:
        ValueError: neither a folder here nor a repository that loads.
    """
    try:
        pipeline = DDPMNotesPipeline.from_pretrained(evaluation.model, revision=evaluation.revision)
    except OSError as error:
        if Path(evaluation.model).exists():
            raise
        raise ValueError(
            f"--model {evaluation.model}: no such folder here, and no such repository could be loaded: {error}"
        ) from error
    pipeline.to(accelerator.device)
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=not accelerator.is_main_process)
    if not isinstance(pipeline.scheduler, DDPMNotesScheduler):
        pipeline.scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def with_defaults(evaluation: EvaluationArguments, own: DDPMNotesScheduler) -> EvaluationArguments:
    """The arguments with what --table asks for, and with the lists that were not given."""
    T, table = len(own), evaluation.table
    short = [k for k in TABLE_STEPS if k < T]
    steps = evaluation.num_inference_steps or ([*short, T] if table else [T])
    learned = [own.config.variance_type] if own.config.variance_type in LEARNED_VARIANCES else []
    every = ["fixed_small", "fixed_large", *learned, "optimal"]
    lists: dict[str, Any] = {
        "variance_types": every if table else [own.variance_type],
        "num_inference_steps": steps,
        "paths": ["even", "best"] if table else ["even"],
        "metric_steps": short if table else steps,
        "samplers": ["ddim", "dpmsolver++"] if table else [],
        "guidance_scales": [1.0],
    }
    filled = {name: getattr(evaluation, name) or default for name, default in lists.items()}
    if table:  # a spread needs two sets
        filled |= {"metrics": True, "metric_sets": max(evaluation.metric_sets, 2), "decoder": "levels"}
    return dataclasses.replace(evaluation, **filled)


def local_folder(evaluation: EvaluationArguments) -> Path | None:
    """The model's folder; None for one on the Hub."""
    return Path(evaluation.model) if Path(evaluation.model).is_dir() else None


def results_folder(evaluation: EvaluationArguments) -> Path:
    """Where results go."""
    return Path(evaluation.results_dir or local_folder(evaluation) or "outputs/evaluation")


def kept_text(evaluation: EvaluationArguments) -> str:
    """What a stopped run has kept."""
    folder = results_folder(evaluation) / Pieces.FOLDER
    kept = len(list(folder.glob("*.safetensors")))
    if not kept:
        return "Nothing is kept yet"
    return f"{folder} has {kept} finished pieces; the same command continues with them"


# ------------------------------------------------------------ parts of a table


def even_timesteps(scheduler: DDPMNotesScheduler, steps: int) -> list[int]:
    """K timesteps evenly from T-1 to 0, both included; for K = 1, timestep 0."""
    spaced = DDPMNotesScheduler.from_config(scheduler.config, timestep_spacing="linspace", steps_offset=0)
    spaced.set_timesteps(steps)
    return spaced.timesteps.tolist()


def is_sampled(evaluation: EvaluationArguments, record: BoundRecord, T: int) -> bool:
    """Whether samples are drawn for this bound: in a table, not all are worth their time."""
    if evaluation.table and record.num_inference_steps == T:
        return record.variance_type == "fixed_large"
    wanted = not evaluation.table or record.path == "even" or record.variance_type in SAMPLED_ON_BEST_PATHS
    return wanted and record.num_inference_steps in (evaluation.metric_steps or [])
