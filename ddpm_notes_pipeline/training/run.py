"""A training run: images -> batches -> objective -> scheduler -> network -> step, and what it leaves in its folder."""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import ImageSet, hold_out, load_images, to_model_range
from ..data.batches import StepBatches, step_seed
from ..data.streaming import ImageStream, StreamedBatches, open_stream
from ..evaluation.pictures import Trajectory, image_grid, save_losses, save_samples
from ..evaluation.samples import SampleTable, figures_of
from ..evaluation.validation import Row, decoder_of, save_evaluation
from ..hub.model_card import weights_digest, write_card
from ..hub.publishing import BackgroundPushes
from ..objectives import Objective, TimestepSampler
from ..pipeline_ddpm_notes import BitsPerDimOutput, DDPMNotesPipeline
from ..scheduling_ddpm_notes import PRIVATE_ENTRY, DDPMNotesScheduler
from .arguments import DataArguments, ModelArguments, RunArguments, as_config, warmup_steps
from .checkpoints import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .logs import LOGS, LossLog, StepLog, Tracker, bits_per_dim_figures, find_tracker
from .networks import make_model
from .results import open_repo, publish, run_record, save_model
from .sampling import VALIDATION_EVALUATIONS, averaged_weights, bits_per_dim, sample_grid, show
from .stops import Stopped, Stops, failing_together, launcher, resume_command
from .updates import AveragedWeights, UpdateGuard, poisoned

logger = logging.getLogger("train")
LEFTOVERS = (".checkpoint-*.partial", ".checkpoint-*.replaced", ".push-*")  # folders that a stop left half-written


def main(data: DataArguments, model: ModelArguments, run: RunArguments) -> str | None:
    """Train, save and publish; returns what went wrong in publishing."""
    settings = (data, model, run)
    stops = Stops()
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=find_tracker(run.report_to),
        project_dir=run.output_dir,
    )
    check_processes(accelerator)
    set_seed(run.seed)
    output_dir = Path(run.output_dir)
    prepare_output_dir(accelerator, output_dir, run)
    repo_id = open_repo(accelerator, run)

    # images
    with accelerator.local_main_process_first():
        images = load_split(accelerator, data, data.train_split, data.max_train_samples, training=True)
        validation = None
        if data.validation_split is not None:
            validation = load_split(accelerator, data, data.validation_split, data.max_validation_images)
        elif data.validation_share is not None:
            images, held_out = hold_out(images, data.validation_share, run.seed)
            validation = held_out.at_most(data.max_validation_images)
    check_fingerprint(data, images)
    check_validation(accelerator, images, validation)
    shown = images.first if data.streaming else images
    steps = run.max_train_steps or math.ceil(run.num_epochs * len(images) / run.train_batch_size)
    share = share_of_batch(run, accelerator)
    warmup = warmup_steps(run, steps)
    if run.lr_warmup_steps is not None and warmup < run.lr_warmup_steps:
        say(accelerator, f"warm-up: {warmup} steps instead of {run.lr_warmup_steps}, since training ends after {steps}")

    # network and math
    unet, scheduler = make_model(model, images)
    objective = Objective(scheduler, run.objective, run.loss_weighting, snr_gamma=run.snr_gamma)
    timestep_sampler = TimestepSampler(len(scheduler), run.timestep_sampling)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = None
    if run.use_ema:
        ema = AveragedWeights(unet.parameters(), run.ema_max_decay, run.ema_schedule, run.ema_inv_gamma, run.ema_power)
        ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=run.learning_rate,
        betas=(run.adam_beta1, run.adam_beta2),
        weight_decay=run.adam_weight_decay,
        eps=run.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    network, optimizer = accelerator.prepare(unet, optimizer)
    parameters = list(network.parameters())
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in unet.modules())
    guard = UpdateGuard(accelerator, run.max_nonfinite_steps)
    if run.torch_compile:
        unet.compile()
    table = None
    if run.metric_interval is not None:
        n, seed, cache = run.metric_images, run.seed, data.cache_dir
        table = SampleTable(
            accelerator, images, validation, run.metric_network, n, run.eval_batch_size, seed, cache_dir=cache
        )
    # where the run is
    identity = {
        "seed": run.seed,
        "train_batch_size": run.train_batch_size,
        "images": images.fingerprint,
        "use_ema": run.use_ema,
    }
    for owner, config in (("unet", unet.config), ("scheduler", scheduler.config)):
        identity |= {f"{owner}.{name}": value for name, value in config.items() if not name.startswith("_")}
    identity = json.loads(json.dumps(identity))  # as a checkpoint gives it back
    done = 0
    checkpoint = find_checkpoint(output_dir, run.resume_from_checkpoint) if run.resume_from_checkpoint else None
    if checkpoint is not None:
        done = load_checkpoint(accelerator, checkpoint, ema, timestep_sampler, guard, identity)
        if done > steps:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint} is from step {done}, and training ends at step {steps}; give more steps"
            )
        say(accelerator, f"going on from {checkpoint} at step {done}")
    elif run.resume_from_checkpoint:
        say(accelerator, f"{output_dir} has no checkpoint yet: starting at the beginning")
    # Not prepared: accelerate would step it once a process; here it is stepped once an optimizer step.
    for group in optimizer.param_groups:
        group["initial_lr"] = run.learning_rate
    lr_scheduler = get_scheduler(
        run.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        last_epoch=done - 1,
    )
    null_label = (unet.config.get(PRIVATE_ENTRY) or {}).get("null_label")
    batches = (StreamedBatches if data.streaming else StepBatches)(
        images,
        run.train_batch_size,
        run.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        random_flip=data.random_flip,
        label_dropout=0.0 if null_label is None else data.label_dropout,
        null_label=null_label,
    )
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(done, steps),
        num_workers=data.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=False,
    )

    def save(step: int) -> None:
        limit = run.checkpoints_total_limit
        save_checkpoint(accelerator, output_dir, step, ema, timestep_sampler, guard, identity, limit)

    positions = torch.arange(share) + accelerator.process_index * share
    say(
        accelerator,
        f"{many(images)} of {'x'.join(map(str, (images.channels, *images.size)))} from {images.name}, "
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M weights in levels of {'-'.join(map(str, unet.config.block_out_channels))} channels, steps {done} to {steps} of {run.train_batch_size} images in all, "
        f"{share} a process in {run.gradient_accumulation_steps} accumulation step(s) of {share // run.gradient_accumulation_steps}, on "
        f"{accelerator.num_processes} process(es) of {accelerator.device.type}, {run.mixed_precision} mixed precision",
    )

    # train
    clear_leftovers(accelerator, output_dir, run)
    stops.hold(accelerator)
    stop = 0
    tracker, name = None, find_tracker(run.report_to)
    if name is not None and accelerator.is_main_process:
        tracker = Tracker(accelerator, name, as_config(*settings), output_dir, resume=done > 0)
    with failing_together(accelerator, f"could not write {output_dir}/loss.jsonl"):
        log = LossLog(accelerator, output_dir / "loss.jsonl", done, run.train_batch_size, tracker)
        validation_log = StepLog(accelerator, output_dir, "validation", done, tracker)
        metric_log = StepLog(accelerator, output_dir, "metrics", done, tracker)
    pushes = BackgroundPushes(repo_id, run.license) if repo_id and run.hub_strategy == "every_save" else None
    unet.train()
    started = time.monotonic()

    def record() -> dict[str, Any]:
        return run_record(accelerator, images, *settings, log.history()[1], done, time.monotonic() - started)

    def validate(step: int) -> BitsPerDimOutput | None:
        """bits/dim of the averaged weights behind `step`, if they are due; on the same noise each time.

        Those of the last step are measured again where an earlier launch did so: it may have ended before it kept more than the total.
        """
        due = step % run.validation_steps == 0 or step == steps
        if validation is None or not due or (validation_log.has(step) and step < steps):
            return None
        with log.paused(), averaged_weights(unet, ema):
            result = bits_per_dim(accelerator, unet, scheduler, validation, stops)
        with failing_together(accelerator, f"could not write {validation_log.path}"):
            if result is not None and not validation_log.has(step):
                validation_log.add(step, bits_per_dim_figures(result))
        return result

    def measure_samples(step: int) -> None:
        """How far samples of the averaged weights behind `step` are from images, if that is due; from the same seeds each time."""
        due = step == steps or (run.metric_interval and step % run.metric_interval == 0)
        if table is None or not due or (metric_log.has(step) and step < steps):
            return
        pipeline = DDPMNotesPipeline(unet, DDPMNotesScheduler.from_config(scheduler.config))
        n = run.ddpm_num_inference_steps or len(scheduler)
        row = {
            "variance_type": scheduler.variance_type,
            "path": scheduler.config.timestep_spacing,
            "num_inference_steps": n,
        }
        with log.paused(), averaged_weights(unet, ema):
            unet.eval()
            result = table.add(pipeline, row, stops, num_inference_steps=n)
            unet.train()
        with failing_together(accelerator, f"could not write {metric_log.path}"):
            if result is not None and not metric_log.has(step):
                metric_log.add(step, figures_of(result))

    # weights that were learned: where this run starts from
    if (done or model.pretrained_model_name_or_path) and done < steps:
        validate(done)
    bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=not accelerator.is_main_process)
    for step, batch in enumerate(loader, start=done):
        if has_dropout:
            torch.manual_seed(step_seed(run.seed, step, f"dropout of process {accelerator.process_index}"))
        t, weight = timestep_sampler.sample(batch["u"], positions, run.train_batch_size)
        x_0 = to_model_range(batch["pixel_values"].to(accelerator.device, non_blocking=True))
        noise = batch["noise"].to(accelerator.device, non_blocking=True)
        labels = batch["class_labels"].to(accelerator.device, non_blocking=True) if "class_labels" in batch else None
        weight = weight.to(accelerator.device, torch.float32, non_blocking=True)

        losses = []
        parts = [
            slice(i, i + share // run.gradient_accumulation_steps)
            for i in range(0, share, share // run.gradient_accumulation_steps)
        ]
        for part in parts:
            last = part is parts[-1]
            with (
                contextlib.nullcontext() if last else accelerator.no_sync(network)
            ):  # gradients are averaged over processes once
                loss = objective(network, x_0[part], noise[part], t[part], None if labels is None else labels[part])
                accelerator.backward(poisoned((loss * weight[part]).mean() / len(parts)))
            losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(parameters, run.max_grad_norm)
        taken = guard.update(optimizer, grad_norm)
        optimizer.zero_grad(set_to_none=True)
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema is not None:
            ema.step(parameters, taken)

        unweighted = torch.cat(losses)
        if run.timestep_sampling == "loss_second_moment":
            timestep_sampler.update(
                accelerator.gather(t.to(accelerator.device)).cpu(), accelerator.gather(unweighted).cpu()
            )
        log.add((unweighted * weight).mean(), grad_norm, learning_rate)
        guard.watch(step + 1, t, unweighted, grad_norm)
        bar.update()
        stop = stops.agreed()
        checkpoint_due = stop or (step + 1) % run.checkpointing_steps == 0
        if (step + 1) % run.logging_steps == 0 or step + 1 == steps or checkpoint_due:
            with failing_together(accelerator, f"could not write {log.path}"):
                log.write(bar)
            guard.check()
        if checkpoint_due and step + 1 < steps:
            with log.paused():
                save(step + 1)
            stop = stops.agreed()  # it may have come while that was written
            if pushes is not None and accelerator.is_main_process and not stop:
                snapshot = Path(tempfile.mkdtemp(prefix=".push-", dir=output_dir))
                with averaged_weights(unet, ema):
                    save_model(snapshot, unet, scheduler, settings, record())
                pushes.push(snapshot, f"Step {step + 1} of {steps}")
        if stop:
            break
        if step + 1 < steps:
            validate(step + 1)
            measure_samples(step + 1)
        if run.sample_steps and (step + 1) % run.sample_steps == 0 and step + 1 < steps:
            with log.paused(), averaged_weights(unet, ema):
                samples = sample_grid(accelerator, unet, scheduler, run, stops)
            picture = output_dir / f"samples-{step + 1}.png"
            with failing_together(accelerator, f"could not write {picture}"):
                if accelerator.is_main_process and samples is not None:
                    save_samples(picture, show(shown, run), samples, f"step {step + 1}")
            if tracker is not None and samples is not None:
                tracker.log_image(step + 1, "samples", image_grid(samples))
    bar.close()
    if data.streaming and log.step > done:
        bad = int(accelerator.reduce(batch["bad_images"].to(accelerator.device), "sum"))
        images = dataclasses.replace(images, skipped=bad)
    seconds = time.monotonic() - started
    training = seconds - log.pauses
    rate = (steps - done) * run.train_batch_size / training if training > 0 else 0.0
    if stop and log.step < steps:
        if pushes is not None:
            pushes.abandon()
        if tracker is not None:
            tracker.close()
        where = f"behind step {log.step} of {steps}, which {output_dir}/checkpoint-{log.step} holds"
        raise Stopped(stop, f"{where}. Resume: {resume_command()}")

    # what comes out
    fault = None
    save(steps)
    measured = validate(steps)
    measure_samples(steps)
    if ema is not None:
        ema.copy_to(unet.parameters())
    with failing_together(accelerator, f"could not write the model to {output_dir}"):
        if accelerator.is_main_process:
            save_model(output_dir, unet, scheduler, settings, record())
            if validation is not None and measured is not None:
                T = len(scheduler)
                row = Row(scheduler.variance_type, "even", T, decoder_of(scheduler, [*range(T)][::-1]), measured)
                weights = weights_digest(output_dir)
                save_evaluation(
                    output_dir,
                    validation,
                    [row],
                    weights,
                    evaluations_per_image=VALIDATION_EVALUATIONS,
                    metrics=table.as_list(last=True) if table else None,
                )
            title = f"{run.objective} loss on {images.name}"
            save_losses(output_dir / "loss.png", *log.history(), title, validation_log.rows)
            write_card(output_dir, repo_id, run.license)  # samples may take a while; what is there is complete
    trajectory = Trajectory()
    samples = sample_grid(accelerator, unet, scheduler, run, stops, trajectory)
    if tracker is not None:
        if samples is not None:
            tracker.log_image(steps, "samples", image_grid(samples))
        tracker.close()
    if samples is None:
        where = f"with training done and the model in {output_dir}, but no samples"
        raise Stopped(stops.agreed(), f"{where}. Resume: {resume_command()}")
    stops.release(f"with training done and the model in {output_dir}")
    if accelerator.is_main_process:
        n = run.ddpm_num_inference_steps or len(scheduler)
        save_samples(
            output_dir / "samples.png", show(shown, run), samples, f"samples: {n} steps, {scheduler.variance_type}"
        )
        trajectory.save(output_dir / "trajectory.gif")
        write_card(output_dir, repo_id, run.license)
        told = summary(data, images, validation, run, log, validation_log, guard, steps, rate, seconds, output_dir)
        print(told, flush=True)
        if repo_id is not None:
            fault = publish(output_dir, repo_id, run, pushes)
    # The wrapper for several processes goes before the processes' connection does: its destructor may wait on that for ever.
    del network
    accelerator.free_memory()
    accelerator.end_training()
    return fault


def check_processes(accelerator: Accelerator) -> None:
    """Refuse a launch that looks distributed and is not: each process would train alone on the whole batch."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        sys.exit(
            f"train.py: error: WORLD_SIZE is {world_size} and accelerate runs {accelerator.num_processes} process(es). On CPUs, start "
            "several processes by: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N training/train.py ..."
        )


def prepare_output_dir(accelerator: Accelerator, output_dir: Path, run: RunArguments) -> None:
    """Refuse to write over somebody's files."""
    if output_dir.exists() and not output_dir.is_dir():
        sys.exit(f"train.py: error: --output_dir {output_dir} is a file; name a folder")
    there = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    if run.resume_from_checkpoint and not list_checkpoints(output_dir):  # a run that was stopped before its first one
        ours = (".checkpoint-", ".push-", ".loss.", ".validation.", ".metrics.", "samples-")
        there = {name for name in there if name not in LOGS and not name.startswith(ours)}
    going_on = run.resume_from_checkpoint and (list_checkpoints(output_dir) or run.resume_from_checkpoint != "latest")
    accelerator.wait_for_everyone()  # before anybody writes
    if there and not (run.overwrite_output_dir or going_on):
        sys.exit(
            f"train.py: error: --output_dir {output_dir} is not empty. Go on with it by --resume_from_checkpoint latest, write over it by "
            "--overwrite_output_dir, or name another"
            + (" (it holds no checkpoint to go on from)" if run.resume_from_checkpoint else "")
        )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def clear_leftovers(accelerator: Accelerator, output_dir: Path, run: RunArguments) -> None:
    """Take away what a stop left half-written and, in a folder that is written over, the old run's checkpoints.

    Those would be the "latest" of the new one. Not before training starts: nothing is lost to a mistake in the settings.
    """
    if accelerator.is_main_process:
        old = [] if run.resume_from_checkpoint else list_checkpoints(output_dir)
        for folder in (*old, *(path for name in LEFTOVERS for path in output_dir.glob(name))):
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def load_split(
    accelerator: Accelerator, data: DataArguments, split: str, max_samples: int | None, training: bool = False
) -> Any:
    """Images of a split: an ImageSet, or an ImageStream to train on. Those to train on are kept larger than a batch holds, to be cropped anew."""
    settings: dict[str, Any] = {
        "dataset_name": data.dataset_name,
        "dataset_config_name": data.dataset_config_name,
        "train_data_dir": data.train_data_dir,
        "split": split,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "resolution": data.resolution,
        "center_crop": data.center_crop or not training,
        "image_mode": data.image_mode,
        "max_samples": max_samples,
        "cache_dir": data.cache_dir,
        "on_bad_image": data.on_bad_image,
        "show_progress": accelerator.is_local_main_process,
    }
    if data.streaming and training:
        return open_stream(**settings, buffer_size=data.shuffle_buffer_size)
    return load_images(**settings, streaming=data.streaming)


def check_fingerprint(data: DataArguments, images: ImageSet | ImageStream) -> None:
    """Refuse other images than those that a training_config.yaml was written for."""
    if data.data_fingerprint not in (None, images.fingerprint):
        raise ValueError(
            f"the configuration was written for images of the fingerprint {data.data_fingerprint} and {images.name} (split {images.split}) has "
            f"{images.fingerprint}: they are not the same images. To train on these, take the line data_fingerprint out of the file"
        )


def check_validation(accelerator: Accelerator, images: ImageSet | ImageStream, validation: ImageSet | None) -> None:
    """Refuse validation images that the network trained on `images` does not fit, and too few of them."""
    if validation is None:
        return
    split = f"--validation_split {validation.split}"
    ours, theirs = ((one.channels, *one.size) for one in (images, validation))
    if ours != theirs or (validation.num_classes or 0) > (images.num_classes or 0):
        raise ValueError(
            f"{split} has images of {'x'.join(map(str, theirs))} and {validation.num_classes or 0} classes; allowed: "
            f"those of the training images, {'x'.join(map(str, ours))} and {images.num_classes or 0}"
        )
    if images.class_names != validation.class_names:
        differ = sorted(set(images.class_names or ()) ^ set(validation.class_names or ()))
        what = f"differ in {', '.join(differ)}" if differ else "are the same in another order"
        raise ValueError(f"{split} and the training images must have the same classes; they {what}")
    if len(validation) < accelerator.num_processes:
        raise ValueError(f"{split} has {len(validation)} images; allowed: at least one for each process")


def share_of_batch(run: RunArguments, accelerator: Accelerator) -> int:
    """Images of a step that are this process's."""
    parts = accelerator.num_processes * run.gradient_accumulation_steps
    if run.train_batch_size % parts:
        sys.exit(
            f"train.py: error: --train_batch_size is {run.train_batch_size} on {accelerator.num_processes} process(es) with "
            f"--gradient_accumulation_steps {run.gradient_accumulation_steps}; allowed: a multiple of {parts}"
        )
    return run.train_batch_size // accelerator.num_processes


def many(images: ImageSet | ImageStream) -> str:
    """How many images, of how many files, as far as that is known."""
    number = "a stream of images" if images.num_images is None else f"{images.num_images} images"
    return number if images.num_files is None else f"{number} of {images.num_files} files"


def say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        tqdm.write(text)


def config_words() -> list[str]:
    """The value of --config on the command line, if it is there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    return parser.parse_known_args()[0].config


def summary(
    data: DataArguments,
    images: ImageSet | ImageStream,
    validation: ImageSet | None,
    run: RunArguments,
    log: LossLog,
    validation_log: StepLog,
    guard: UpdateGuard,
    steps: int,
    rate: float,
    seconds: float,
    output_dir: Path,
) -> str:
    """Five lines: what was learned, where it is, how to load it, how to go on, how to train on other images."""
    _, losses = log.history()
    tail = [loss for loss in losses[-max(1, len(losses) // 20) :] if math.isfinite(loss)] or [math.nan]
    weights = "averaged (EMA)" if run.use_ema else "raw"
    skipped = f" ({images.skipped} left out)" if images.skipped else ""
    left_out = f"updates left out, not finite: {guard.skipped}; " if guard.skipped else ""
    measured, validated = "", "" if validation is None else ", validation.jsonl"
    if validation is not None and validation_log.rows and validation_log.rows[-1]["bits_per_dim"] is not None:
        row = validation_log.rows[-1]
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
        measured = f"{row['bits_per_dim']:.3f}{error} bits/dim on {row['images']} images of {validation.split!r}; "
    elif validation is None:
        measured = "nothing was held out (--validation_share 0.04 measures bits/dim on images not trained on); "
    folder, where = ("ANOTHER_FOLDER", "another") if data.train_data_dir else ("FOLDER_OF_IMAGES", "mine")
    config = next((f" --config {shlex.quote(word)}" for word in config_words()), "")
    return "\n".join(
        [
            f"Learned:   {steps} steps on {many(images)}{skipped}, {run.objective} loss {sum(tail) / len(tail):.4f} over the last "
            f"{len(tail)} steps; {measured}{left_out}{rate:.0f} images/s, {seconds / 60:.1f} min.",
            f"Where:     {output_dir}/ holds the {weights} weights, samples.png (look at it), loss.png, loss.jsonl{validated} and checkpoint-{steps}/.",
            f'Load:      python -c "from ddpm_notes_pipeline import DDPMNotesPipeline as P; '
            f"P.from_pretrained({str(output_dir)!r})().images[0].save('one.png')\"",
            f"Longer:    {resume_command('--max_train_steps')} --max_train_steps {2 * steps}",
            f"Your own:  {launcher()} {shlex.quote(sys.argv[0])}{config} --train_data_dir {folder} --resolution 32 --output_dir outputs/{where}",
        ]
    )
