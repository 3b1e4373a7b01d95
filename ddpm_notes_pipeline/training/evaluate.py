"""Measuring a DDPM, as training/evaluate.py is asked to: bits/dim, samples, and the table of both."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ..data import HELD_OUT, MODES, ImageSet, hold_out, load_images
from ..evaluation.samples import SampleTable
from ..evaluation.tables import results_table
from ..evaluation.validation import Row, batches, decoder_of, measure_bits_per_dim, save_evaluation
from ..hub.model_card import weights_digest, write_card
from ..hub.publishing import push_command
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import LEARNED_VARIANCES, DDPMNotesScheduler
from ..variances import (
    best_timesteps,
    fit_decoder_variance,
    measure_original_sample_mse,
    optimal_scheduler,
)
from .arguments import DataArguments, EvaluationArguments

TABLE_STEPS = (
    10,
    25,
    50,
    100,
)  # of --table, beside T; samples of T steps are drawn for fixed_large alone, to compare with
SAMPLERS: dict[
    str, tuple[str, Any, dict[str, Any]]
] = {  # flag: name in tables, scheduler, what of its settings differs from the model's
    "ddim": ("DDIM", DDIMScheduler, {}),  # clips x0_hat, and goes on with the eps_hat of before
    "eta0": (
        "eta = 0",
        DDPMNotesScheduler,
        {"eta": 0.0},
    ),  # the same sampler with the eps_hat that belongs to the clipped x0_hat
    "dpmsolver++": ("DPM-Solver++", DPMSolverMultistepScheduler, {}),
}


def main(data: DataArguments, evaluation: EvaluationArguments) -> None:
    accelerator = Accelerator()
    try:
        pipeline = DDPMNotesPipeline.from_pretrained(evaluation.model, revision=evaluation.revision)
    except OSError as error:
        if Path(evaluation.model).exists():
            raise
        raise ValueError(
            f"--model {evaluation.model}: there is no such folder here, and no such repository could be loaded: {error}"
        ) from error
    pipeline.to(accelerator.device)
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=not accelerator.is_main_process)
    if not isinstance(pipeline.scheduler, DDPMNotesScheduler):
        pipeline.scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config)
    check_variance_types(evaluation.variance_types or [], pipeline.scheduler)
    images = load(accelerator, data, evaluation.split, evaluation.max_images, evaluation.seed)

    check_images(pipeline, images)

    table = None
    if evaluation.metrics:
        real = load(accelerator, data, evaluation.metric_split, None, evaluation.seed)
        table = SampleTable(
            accelerator,
            real,
            images,
            evaluation.metric_network,
            evaluation.metric_images,
            evaluation.batch_size,
            seed=evaluation.noise_seed,
            sets=evaluation.metric_sets,
            cache_dir=data.cache_dir,
        )

    # what the data has to say first
    own = pipeline.scheduler
    T = len(own)
    if evaluation.table:
        learned = [own.config.variance_type] if own.config.variance_type in LEARNED_VARIANCES else []
        evaluation.variance_types = evaluation.variance_types or ["fixed_small", "fixed_large", *learned, "optimal"]
        evaluation.num_inference_steps = evaluation.num_inference_steps or [k for k in TABLE_STEPS if k < T] + [T]
        evaluation.metric_steps = evaluation.metric_steps or [k for k in TABLE_STEPS if k < T]
    variances = evaluation.variance_types or [own.variance_type]
    fit_needed = evaluation.decoder == "fitted"
    mse = own.original_sample_mse
    decoder = own.decoder_variance or {}
    mse_needed = evaluation.save_variances or "optimal" in variances or "best" in evaluation.paths
    if (mse_needed and mse is None) or (fit_needed and 0 not in decoder):
        known = load(accelerator, data, evaluation.variance_split, None, evaluation.seed)
        known_labels = known.labels if pipeline.num_classes is not None else None
        if mse_needed and mse is None:
            measured = measure_original_sample_mse(
                pipeline, batches(known), known_labels, batch_size=evaluation.batch_size, accelerator=accelerator
            )
            mse = measured.original_sample_mse.tolist()
        if fit_needed and 0 not in decoder:
            fitted = fit_decoder_variance(pipeline, batches(known), known_labels, batch_size=evaluation.batch_size)
            decoder = {**decoder, 0: fitted[0]}
    if evaluation.save_variances and accelerator.is_main_process:
        optimal_scheduler(own, mse, decoder or None).save_pretrained(Path(evaluation.model) / "scheduler")

    rows = []
    for variance in variances:
        scheduler = DDPMNotesScheduler.from_config(
            own.config,
            variance_type=variance,
            original_sample_mse=mse if variance == "optimal" else None,
            decoder_variance=decoder if fit_needed and variance not in LEARNED_VARIANCES else None,
            eta=None,
        )
        for steps in evaluation.num_inference_steps or [T]:
            for kind in evaluation.paths if steps < T else ["even"]:
                path = best_timesteps(own, steps, mse) if kind == "best" else even_timesteps(own, steps)
                pipeline.scheduler = scheduler
                result = measure_bits_per_dim(
                    accelerator,
                    pipeline,
                    images,
                    timesteps=path,
                    evaluations_per_image=evaluation.evaluations_per_image,
                    full=evaluation.full,
                    batch_size=evaluation.batch_size,
                    seed=evaluation.noise_seed,
                )
                assert result is not None  # nothing is told of signals here: one ends the process
                rows.append(Row(variance, kind, steps, decoder_of(scheduler, path), result))
                if accelerator.is_main_process:
                    print(line(rows[-1]) if len(rows) > 1 else f"{header()}\n{line(rows[-1])}", flush=True)
                if table is not None and is_sampled(evaluation, rows[-1], T):
                    row = {"variance_type": variance, "path": kind, "num_inference_steps": steps}
                    table.add(pipeline, row, timesteps=path)
    for name in evaluation.samplers:
        assert table is not None  # the arguments were checked
        label, kind_of_scheduler, settings = SAMPLERS[name]
        # their own spacing that ends at the image, as `even` does; the scheduler's default is for training's T
        pipeline.scheduler = kind_of_scheduler.from_config(own.config, timestep_spacing="trailing", **settings)
        for steps in evaluation.metric_steps or evaluation.num_inference_steps or [T]:
            row = {"sampler": label, "path": "trailing", "num_inference_steps": steps}
            table.add(pipeline, row, num_inference_steps=steps)
    if accelerator.is_main_process:
        write(evaluation, images, rows, table)
    accelerator.end_training()


def check_variance_types(variances: list[str], scheduler: DDPMNotesScheduler) -> None:
    """Refuse a learned variance type that the network was not trained to output."""
    own = scheduler.config.variance_type  # the learned type also where "optimal" took its place
    for variance in variances:
        if variance in LEARNED_VARIANCES and variance != own:
            learned = f"{own}, " if own in LEARNED_VARIANCES else ""
            raise ValueError(
                f"--variance_types has {variance} and the model's variance is {own}; "
                f"each must be one of {learned}fixed_small, fixed_large, optimal"
            )


def check_images(pipeline: DDPMNotesPipeline, images: ImageSet) -> None:
    """Refuse images that are not of the model's size: many a network would take them, and the number would be of no model."""
    config = pipeline.unet.config
    side = config.sample_size
    size = list(side) if isinstance(side, (list, tuple)) else [side, side]
    mode = next((mode for mode, channels in MODES.items() if channels == config.in_channels), None)
    if None not in (mode, side) and (images.channels, *images.size) != (config.in_channels, *size):
        raise ValueError(
            f"the images are {'x'.join(map(str, (images.channels, *images.size)))} and the model's are "
            f"{'x'.join(map(str, (config.in_channels, *size)))}; allowed: the same "
            f"(--resolution {' '.join(map(str, size[: 1 + (size[0] != size[1])]))} --image_mode {mode})"
        )


def is_sampled(evaluation: EvaluationArguments, row: Row, T: int) -> bool:
    """Whether samples are drawn beside this bound: of a table, not all are worth their time."""
    if not evaluation.table:
        return evaluation.metric_steps is None or row.steps in evaluation.metric_steps
    if row.steps == T:
        return row.variance == "fixed_large"
    return row.steps in (evaluation.metric_steps or ()) and (row.path == "even" or row.variance == "optimal")


def load(accelerator: Accelerator, data: DataArguments, split: str, max_images: int | None, seed: int = 0) -> ImageSet:
    """A split, its images whole or cropped at the centre, decoded by one process a machine."""
    shared = data.validation_share is not None and split in (data.train_split, HELD_OUT)
    if split == HELD_OUT and not shared:
        raise ValueError(f"--split is {HELD_OUT} and no --validation_share says which images those are")
    with accelerator.local_main_process_first():
        found = load_images(
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            train_data_dir=data.train_data_dir,
            split=data.train_split if shared else split,
            image_column=data.image_column,
            label_column=data.label_column,
            resolution=data.resolution,
            center_crop=True,
            image_mode=data.image_mode,
            max_samples=data.max_train_samples if shared else max_images,
            cache_dir=data.cache_dir,
            on_bad_image=data.on_bad_image,
            streaming=data.streaming,
            show_progress=accelerator.is_local_main_process,
        )
    if data.validation_share is None or not shared:
        return found
    training, held_out = hold_out(found, data.validation_share, seed)
    return (held_out if split == HELD_OUT else training).at_most(max_images)


def even_timesteps(scheduler: DDPMNotesScheduler, steps: int) -> list[int]:
    """K timesteps evenly from T-1 to 0, both included."""
    spaced = DDPMNotesScheduler.from_config(scheduler.config, timestep_spacing="linspace", steps_offset=0)
    spaced.set_timesteps(steps)
    return spaced.timesteps.tolist()


COLUMNS = {  # name: width
    "variance": 13,
    "path": 4,
    "K": 5,
    "L_T": 17,
    "sum KL": 19,
    "L_0": 17,
    "total": 19,
    "decoder var": 11,
    "evaluations": 11,
}


def header() -> str:
    """Names of the columns; the four parts are bits/dim with their standard errors."""
    names = " | ".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    return names + "\n" + "-+-".join("-" * width for width in COLUMNS.values())


def line(row: Row) -> str:
    """One row of the table."""
    r = row.result
    errors = (*(r.standard_errors[name] for name in ("prior", "diffusion", "decoder")), r.standard_error)
    cells = (
        row.variance,
        row.path,
        str(row.steps),
        *(f"{x:.5f} ± {e:.5f}" for x, e in zip((r.prior, r.diffusion, r.decoder, r.total), errors, strict=True)),
        "network's" if row.decoder_variance is None else f"{row.decoder_variance:.3e}",
        str(r.network_evaluations),
    )
    return " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def write(evaluation: EvaluationArguments, images: ImageSet, rows: list[Row], table: SampleTable | None = None) -> None:
    """evaluation.json and bits_per_dim.png, the card of a folder here, and where they are; the table of samples."""
    local = Path(evaluation.model) if Path(evaluation.model).is_dir() else None
    folder = Path(evaluation.results_dir or local or "outputs/evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_digest(local) if local else None
    each = None if evaluation.full else evaluation.evaluations_per_image
    names = save_evaluation(
        folder, images, rows, weights, evaluation.noise_seed, each, table.as_list() if table else None
    )
    print(
        f"\n{len(images)} images of {images.name} ({images.split}), {rows[0].result.dims} dims each; bits/dim, s.e. over images."
    )
    if table is not None:
        print(table)
    if evaluation.table:
        text = results_table(rows, table.as_list() if table else [], images)
        (folder / "table.md").write_text(text, encoding="utf-8")
        names.append("table.md")
        print(f"\n{text}")
    print(f"Written: {', '.join(f'{folder}/{name}' for name in names)}")
    if local and folder.samefile(local):
        write_card(folder)
        print(f"The card {folder}/README.md has these numbers now. Publish: {push_command(folder, 'USER/NAME')}")
