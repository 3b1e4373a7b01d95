"""What training/evaluate.py does: bits/dim and samples of a DDPM, and the table of both."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ..data import HELD_OUT, MODES, ImageSet, hold_out
from ..evaluation.pixel_batches import batches
from ..evaluation.reports import TERMINAL_COLUMNS, text_header, text_line
from ..evaluation.samples import SampleTable
from ..evaluation.tables import results_table
from ..evaluation.validation import Row, decoder_of, measure_bits_per_dim, save_evaluation
from ..hub.card import weights_digest, write_card
from ..hub.push import push_command
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import LEARNED_VARIANCES, DDPMNotesScheduler
from ..variances import best_timesteps, fit_decoder_variance, measure_original_sample_mse, optimal_scheduler
from .arguments import DataArguments, EvaluationArguments
from .images import load_split

# Of --table, beside T. At T only fixed_large is sampled, as the reference.
TABLE_STEPS = (10, 25, 50, 100)
# flag: name in tables, scheduler, settings that differ from the model's
SAMPLERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ddim": ("DDIM", DDIMScheduler, {}),  # clips x0_hat, but keeps the unclipped eps_hat
    "eta0": ("eta = 0", DDPMNotesScheduler, {"eta": 0.0}),  # DDIM with the eps_hat of the clipped x0_hat
    "dpmsolver++": ("DPM-Solver++", DPMSolverMultistepScheduler, {}),
}


def main(data: DataArguments, evaluation: EvaluationArguments) -> None:
    """Measure and print; write evaluation.json, bits_per_dim.png, the card, table.md (--table)."""
    accelerator = Accelerator()
    pipeline = load_pipeline(accelerator, evaluation)
    own = pipeline.scheduler
    check_variance_types(evaluation.variance_types or [], own)
    images = load(accelerator, data, evaluation.split, evaluation.max_images, evaluation.seed)
    check_images(pipeline, images)

    evaluation = with_defaults(evaluation, own)
    samples = sample_table(accelerator, data, evaluation, images) if evaluation.metrics else None
    mse, decoder = measure_variances(accelerator, data, evaluation, pipeline)
    if evaluation.save_variances and accelerator.is_main_process:
        optimal_scheduler(own, mse, decoder or None).save_pretrained(Path(evaluation.model) / "scheduler")

    rows: list[Row] = []
    for variance, kind, path in variances_and_paths(evaluation, own, mse):
        pipeline.scheduler = scheduler_of(own, variance, mse, decoder if evaluation.decoder == "fitted" else None)
        rows.append(measure_row(accelerator, pipeline, images, evaluation, variance, kind, path))
        if accelerator.is_main_process:
            header = "" if len(rows) > 1 else text_header(TERMINAL_COLUMNS) + "\n"
            print(header + text_line(TERMINAL_COLUMNS, rows[-1].record()), flush=True)
        if samples is not None and is_sampled(evaluation, rows[-1], len(own)):
            row = {"variance_type": variance, "path": kind, "num_inference_steps": len(path)}
            samples.add(pipeline, row, timesteps=path)
    if samples is not None:
        add_samplers(pipeline, own, evaluation, samples)
    if accelerator.is_main_process:
        write(evaluation, images, rows, samples)
    accelerator.end_training()


# ------------------------------------------------------------ loading


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


def load(accelerator: Accelerator, data: DataArguments, split: str, max_images: int | None, seed: int = 0) -> ImageSet:
    """A split, its images whole or cropped at the centre, decoded by one process per machine.

    With --validation_share, the training split is without the images that were held out by `seed`,
    and the split "held_out" is those.
    """
    shared = data.validation_share is not None and split in (data.train_split, HELD_OUT)
    if split == HELD_OUT and not shared:
        raise ValueError(f"--split is {HELD_OUT}; it needs --validation_share, which says which images those are")
    split_read, most = (data.train_split, data.max_train_samples) if shared else (split, max_images)
    with accelerator.local_main_process_first():
        found = load_split(accelerator, data, split_read, most)
    if data.validation_share is None or not shared:
        return found
    training, held_out = hold_out(found, data.validation_share, seed)
    return (held_out if split == HELD_OUT else training).at_most(max_images)


def check_variance_types(variances: list[str], scheduler: DDPMNotesScheduler) -> None:
    """Refuse a learned variance type that the network was not trained to output."""
    own = scheduler.config.variance_type  # the learned type, even if "optimal" is set over it
    for variance in variances:
        if variance in LEARNED_VARIANCES and variance != own:
            learned = f"{own}, " if own in LEARNED_VARIANCES else ""
            raise ValueError(
                f"--variance_types has {variance} and the model's variance is {own}; "
                f"each must be one of {learned}fixed_small, fixed_large, optimal"
            )


def check_images(pipeline: DDPMNotesPipeline, images: ImageSet) -> None:
    """Refuse images of another size than the model's: many networks would take them."""
    config = pipeline.unet.config
    side = config.sample_size
    size = list(side) if isinstance(side, (list, tuple)) else [side, side]
    mode = next((mode for mode, channels in MODES.items() if channels == config.in_channels), None)
    if None not in (mode, side) and (images.channels, *images.size) != (config.in_channels, *size):
        raise ValueError(
            f"the images are {'x'.join(map(str, (images.channels, *images.size)))} and the model's are "
            f"{'x'.join(map(str, (config.in_channels, *size)))}; they must be the same "
            f"(--resolution {' '.join(map(str, size[: 1 + (size[0] != size[1])]))} --image_mode {mode})"
        )


# ------------------------------------------------------------ what is measured


def with_defaults(evaluation: EvaluationArguments, own: DDPMNotesScheduler) -> EvaluationArguments:
    """The arguments with variances and numbers of steps filled in."""
    T = len(own)
    variances, steps, metric_steps = [own.variance_type], [T], evaluation.metric_steps
    if evaluation.table:
        learned = [own.config.variance_type] if own.config.variance_type in LEARNED_VARIANCES else []
        variances = ["fixed_small", "fixed_large", *learned, "optimal"]
        metric_steps = metric_steps or [k for k in TABLE_STEPS if k < T]
        steps = [k for k in TABLE_STEPS if k < T] + [T]
    return dataclasses.replace(
        evaluation,
        variance_types=evaluation.variance_types or variances,
        num_inference_steps=evaluation.num_inference_steps or steps,
        metric_steps=metric_steps,
    )


def measure_variances(
    accelerator: Accelerator, data: DataArguments, evaluation: EvaluationArguments, pipeline: DDPMNotesPipeline
) -> tuple[list[float] | None, dict[int, float]]:
    """V_t of each timestep, and decoder variances by last timestep, as far as they are needed.

    Measured on --variance_split, unless the scheduler knows them.
    """
    own = pipeline.scheduler
    mse, decoder = own.original_sample_mse, dict(own.decoder_variance or {})
    needs_mse = (
        evaluation.save_variances or "optimal" in (evaluation.variance_types or []) or "best" in evaluation.paths
    )
    measures_mse, measures_decoder = needs_mse and mse is None, evaluation.decoder == "fitted" and 0 not in decoder
    if not (measures_mse or measures_decoder):
        return mse, decoder
    known = load(accelerator, data, evaluation.variance_split, None, evaluation.seed)
    labels = known.labels if pipeline.num_classes is not None else None
    size = evaluation.batch_size
    if measures_mse:
        error = measure_original_sample_mse(pipeline, batches(known), labels, batch_size=size, accelerator=accelerator)
        mse = error.original_sample_mse.tolist()
    if measures_decoder:
        decoder[0] = fit_decoder_variance(pipeline, batches(known), labels, batch_size=size)[0]
    return mse, decoder


def variances_and_paths(
    evaluation: EvaluationArguments, own: DDPMNotesScheduler, mse: list[float] | None
) -> Iterator[tuple[str, str, list[int]]]:
    """Variance, kind of path and its timesteps, for each row of the table."""
    for variance in evaluation.variance_types or []:
        for steps in evaluation.num_inference_steps or []:
            for kind in evaluation.paths if steps < len(own) else ["even"]:
                path = best_timesteps(own, steps, mse) if kind == "best" else even_timesteps(own, steps)
                yield variance, kind, path


def even_timesteps(scheduler: DDPMNotesScheduler, steps: int) -> list[int]:
    """K timesteps evenly from T-1 to 0, both included."""
    spaced = DDPMNotesScheduler.from_config(scheduler.config, timestep_spacing="linspace", steps_offset=0)
    spaced.set_timesteps(steps)
    return spaced.timesteps.tolist()


def scheduler_of(
    own: DDPMNotesScheduler, variance: str, mse: list[float] | None, decoder: dict[int, float] | None
) -> DDPMNotesScheduler:
    """The model's scheduler with another variance; `decoder`: None for the variance's own rule."""
    return DDPMNotesScheduler.from_config(
        own.config,
        variance_type=variance,
        original_sample_mse=mse if variance == "optimal" else None,
        decoder_variance=None if variance in LEARNED_VARIANCES else decoder,
        eta=None,
    )


def measure_row(
    accelerator: Accelerator,
    pipeline: DDPMNotesPipeline,
    images: ImageSet,
    evaluation: EvaluationArguments,
    variance: str,
    kind: str,
    path: list[int],
) -> Row:
    """bits/dim of the pipeline's scheduler on a path. Collective."""
    settings: dict[str, Any] = {"evaluations_per_image": evaluation.evaluations_per_image, "full": evaluation.full}
    settings |= {"batch_size": evaluation.batch_size, "seed": evaluation.noise_seed}
    result = measure_bits_per_dim(accelerator, pipeline, images, timesteps=path, **settings)
    assert result is not None  # nothing stops it early
    return Row(variance, kind, len(path), decoder_of(pipeline.scheduler, path), result)


# ------------------------------------------------------------ samples


def sample_table(
    accelerator: Accelerator, data: DataArguments, evaluation: EvaluationArguments, images: ImageSet
) -> SampleTable:
    """The table with its first row, that of `images`, which were held out."""
    real = load(accelerator, data, evaluation.metric_split, None, evaluation.seed)
    network, n, size = evaluation.metric_network, evaluation.metric_images, evaluation.batch_size
    seed, sets = evaluation.noise_seed, evaluation.metric_sets
    return SampleTable(accelerator, real, images, network, n, size, seed, sets, data.cache_dir)


def is_sampled(evaluation: EvaluationArguments, row: Row, T: int) -> bool:
    """Whether samples are drawn for this bound: in a table, not all are worth their time."""
    if not evaluation.table:
        return evaluation.metric_steps is None or row.steps in evaluation.metric_steps
    if row.steps == T:
        return row.variance == "fixed_large"
    return row.steps in (evaluation.metric_steps or ()) and (row.path == "even" or row.variance == "optimal")


def add_samplers(
    pipeline: DDPMNotesPipeline, own: DDPMNotesScheduler, evaluation: EvaluationArguments, samples: SampleTable
) -> None:
    """Add a row for each of --samplers and number of steps. Collective."""
    for flag in evaluation.samplers:
        name, kind, settings = SAMPLERS[flag]
        # trailing: their spacing that starts at pure noise; the model's own setting is for T steps
        pipeline.scheduler = kind.from_config(own.config, timestep_spacing="trailing", **settings)
        for steps in evaluation.metric_steps or evaluation.num_inference_steps or []:
            row = {"sampler": name, "path": "trailing", "num_inference_steps": steps}
            samples.add(pipeline, row, num_inference_steps=steps)


# ------------------------------------------------------------ results


def write(
    evaluation: EvaluationArguments, images: ImageSet, rows: list[Row], samples: SampleTable | None = None
) -> None:
    """Write results, and the card of a local model; print the other tables and where all is."""
    local = Path(evaluation.model) if Path(evaluation.model).is_dir() else None
    folder = Path(evaluation.results_dir or local or "outputs/evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_digest(local) if local else None
    each = None if evaluation.full else evaluation.evaluations_per_image
    metrics = samples.as_list() if samples else None
    record = save_evaluation(folder, images, rows, weights, evaluation.noise_seed, each, metrics)
    names = [name for name in (record.FILE, record.PICTURE) if (folder / name).exists()]
    print(f"\nbits/dim: {record.protocol}; ± standard error over images.")
    if samples is not None:
        print(samples)
    if evaluation.table:
        text = results_table(rows, record)
        (folder / "table.md").write_text(text, encoding="utf-8")
        names.append("table.md")
        print(f"\n{text}")
    print(f"Written: {', '.join(f'{folder}/{name}' for name in names)}")
    if local and folder.samefile(local):
        write_card(folder)
        print(f"The card {folder}/README.md has these numbers now. Publish: {push_command(folder, 'USER/NAME')}")
