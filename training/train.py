"""Train a DDPM on any image data set.

    accelerate launch training/train.py --config training/configs/digits.yaml
    accelerate launch training/train.py --config training/configs/digits.yaml --train_data_dir my_pngs --output_dir outputs/mine

The run is a pure function of (config, seed, step): the batch, flips, timesteps and noise of optimizer step n follow from the seed and
n alone, so the number of processes and accumulation steps changes nothing, and a resumed run goes on as if it had not stopped.
`--output_dir` becomes the Hub folder of the model; checkpoints are in `checkpoint-N/` beside its files.
"""

import argparse
import contextlib
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
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments import DataArguments, ModelArguments, RunArguments, as_config, parse_arguments
from checkpoints import CheckpointError, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from ddpm_notes_pipeline.data import ImageSet, StepBatches, load_images, step_seed, to_model_range, to_uint8
from ddpm_notes_pipeline.model_card import write_card
from ddpm_notes_pipeline.objectives import Objective, TimestepSampler
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.publishing import BackgroundPushes, PublishingError
from ddpm_notes_pipeline.scheduling_ddpm_notes import LEARNED_VARIANCES, PRIVATE_ENTRY, DDPMNotesScheduler
from pictures import save_losses, save_samples
from results import open_repo, publish, run_record, save_model
from stops import FailedElsewhere, Stopped, Stops, failing_together, resume_command
from updates import AveragedWeights, UpdateGuard, poisoned

logger = logging.getLogger("train")
LEFTOVERS = (".checkpoint-*.partial", ".checkpoint-*.replaced", ".push-*")  # folders that a stop left half-written


def main(data: DataArguments, model: ModelArguments, run: RunArguments) -> str | None:
    """Train, save and publish; returns what went wrong in publishing."""
    settings = (data, model, run)
    stops = Stops()
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.output_dir,
    )
    check_processes(accelerator)
    set_seed(run.seed)
    output_dir = Path(run.output_dir)
    prepare_output_dir(accelerator, output_dir, run)
    repo_id = open_repo(accelerator, run)

    # images
    with accelerator.local_main_process_first():
        images = load_images(
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            train_data_dir=data.train_data_dir,
            split=data.train_split,
            image_column=data.image_column,
            label_column=data.label_column,
            resolution=data.resolution,
            center_crop=data.center_crop,
            image_mode=data.image_mode,
            max_samples=data.max_train_samples,
            cache_dir=data.cache_dir,
            on_bad_image=data.on_bad_image,
            show_progress=accelerator.is_local_main_process,
        )
    steps = run.max_train_steps or math.ceil(run.num_epochs * len(images) / run.train_batch_size)
    share = share_of_batch(run, accelerator)
    if run.lr_warmup_steps > steps:
        raise ValueError(
            f"--lr_warmup_steps is {run.lr_warmup_steps} and training ends after {steps} steps; allowed: at most those"
        )

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
    guard = UpdateGuard(accelerator, run.max_nonfinite_steps)
    if run.torch_compile:
        unet.compile()
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
        num_warmup_steps=run.lr_warmup_steps,
        num_training_steps=steps,
        last_epoch=done - 1,
    )
    null_label = (unet.config.get(PRIVATE_ENTRY) or {}).get("null_label")
    batches = StepBatches(
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
    if run.report_to != "none":
        accelerator.init_trackers(
            "ddpm_notes_pipeline", config={k: str(v) for k, v in as_config(data, model, run).items()}
        )
    say(
        accelerator,
        f"{len(images)} images of {'x'.join(map(str, (images.channels, *images.size)))} from {images.name}, "
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M weights, steps {done} to {steps} of {run.train_batch_size} images "
        f"on {accelerator.num_processes} process(es) of {accelerator.device.type}, {run.mixed_precision} mixed precision",
    )

    # train
    clear_leftovers(accelerator, output_dir, run)
    stops.hold(accelerator)
    stop = 0
    with failing_together(accelerator, f"could not write {output_dir}/loss.jsonl"):
        log = LossLog(accelerator, output_dir / "loss.jsonl", done)
    pushes = BackgroundPushes(repo_id, run.license) if repo_id and run.hub_strategy == "every_save" else None
    unet.train()
    started = time.monotonic()

    def record() -> dict[str, Any]:
        return run_record(accelerator, images, *settings, log.history()[1], done, time.monotonic() - started)

    bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=not accelerator.is_main_process)
    for step, batch in enumerate(loader, start=done):
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
        grad_norm = accelerator.clip_grad_norm_(network.parameters(), run.max_grad_norm)
        taken = guard.update(optimizer, grad_norm)
        optimizer.zero_grad(set_to_none=True)
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema is not None:
            ema.step(unet.parameters(), taken)

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
            save(step + 1)
            stop = stops.agreed()  # it may have come while that was written
            if pushes is not None and accelerator.is_main_process and not stop:
                snapshot = Path(tempfile.mkdtemp(prefix=".push-", dir=output_dir))
                with averaged_weights(unet, ema):
                    save_model(snapshot, unet, scheduler, settings, record())
                pushes.push(snapshot, f"Step {step + 1} of {steps}")
        if stop:
            break
        if run.sample_steps and (step + 1) % run.sample_steps == 0 and step + 1 < steps:
            with averaged_weights(unet, ema):
                samples = sample(accelerator, unet, scheduler, run, stops)
            picture = output_dir / f"samples-{step + 1}.png"
            with failing_together(accelerator, f"could not write {picture}"):
                if accelerator.is_main_process and samples is not None:
                    save_samples(picture, show(images, run), samples, f"step {step + 1}")
    bar.close()
    seconds = time.monotonic() - started
    if stop and log.step < steps:
        if pushes is not None:
            pushes.abandon()
        finish_trackers(accelerator)
        where = f"behind step {log.step} of {steps}, which {output_dir}/checkpoint-{log.step} holds"
        raise Stopped(stop, f"{where}. Resume: {resume_command()}")

    # what comes out
    fault = None
    save(steps)
    if ema is not None:
        ema.copy_to(unet.parameters())
    with failing_together(accelerator, f"could not write the model to {output_dir}"):
        if accelerator.is_main_process:
            save_model(output_dir, unet, scheduler, settings, record())
            save_losses(output_dir / "loss.png", *log.history(), f"{run.objective} loss on {images.name}")
            write_card(output_dir, repo_id, run.license)  # samples may take a while; what is there is complete
    samples = sample(accelerator, unet, scheduler, run, stops)
    if samples is None:
        finish_trackers(accelerator)
        where = f"with training done and the model in {output_dir}, but no samples"
        raise Stopped(stops.agreed(), f"{where}. Resume: {resume_command()}")
    stops.release(f"with training done and the model in {output_dir}")
    if accelerator.is_main_process:
        n = run.ddpm_num_inference_steps or len(scheduler)
        save_samples(
            output_dir / "samples.png", show(images, run), samples, f"samples: {n} steps, {scheduler.variance_type}"
        )
        write_card(output_dir, repo_id, run.license)
        print(summary(images, unet, run, log, guard, steps, steps - done, seconds, output_dir), flush=True)
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
        there = {name for name in there if name != "loss.jsonl" and not name.startswith((".checkpoint-", ".push-"))}
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


def share_of_batch(run: RunArguments, accelerator: Accelerator) -> int:
    """Images of a step that are this process's."""
    parts = accelerator.num_processes * run.gradient_accumulation_steps
    if run.train_batch_size % parts:
        sys.exit(
            f"train.py: error: --train_batch_size is {run.train_batch_size} on {accelerator.num_processes} process(es) with "
            f"--gradient_accumulation_steps {run.gradient_accumulation_steps}; allowed: a multiple of {parts}"
        )
    return run.train_batch_size // accelerator.num_processes


def make_model(model: ModelArguments, images: ImageSet) -> tuple[UNet2DModel, DDPMNotesScheduler]:
    """A new UNet and scheduler, or those of a repository to go on from.

    Raises:
        ValueError: a network that does not fit the images.
    """
    if model.pretrained_model_name_or_path:
        pipeline = DDPMNotesPipeline.from_pretrained(model.pretrained_model_name_or_path, revision=model.revision)
        unet, scheduler = pipeline.unet, pipeline.scheduler
        if not isinstance(scheduler, DDPMNotesScheduler):
            scheduler = DDPMNotesScheduler.from_config(scheduler.config)
        if unet.config.in_channels != images.channels:
            raise ValueError(
                f"{model.pretrained_model_name_or_path} takes {unet.config.in_channels} channels and the images have {images.channels}; "
                "allowed: the same (see --image_mode)"
            )
        check_size(images.size, len(unet.config.block_out_channels))
        embeddings = unet.config.num_class_embeds
        if (embeddings is None) != (images.labels is None) or (images.num_classes or 0) > (embeddings or 0):
            raise ValueError(
                f"{model.pretrained_model_name_or_path} has {embeddings or 0} class embeddings and the images have "
                f"{images.num_classes or 0} classes; allowed: an embedding for each class, or neither (see --label_column)"
            )
        unet.register_to_config(sample_size=list(images.size))
        return unet.float(), scheduler
    scheduler = DDPMNotesScheduler(
        num_train_timesteps=model.ddpm_num_steps,
        beta_schedule=model.ddpm_beta_schedule,
        rescale_betas_zero_snr=model.rescale_betas_zero_snr,
        prediction_type=model.prediction_type,
        variance_type=model.variance_type,
    )
    out_channels = images.channels * (2 if model.variance_type in LEARNED_VARIANCES else 1)
    if model.model_config_name_or_path:
        config = dict(UNet2DModel.load_config(model.model_config_name_or_path))
        config.update(sample_size=list(images.size), in_channels=images.channels, out_channels=out_channels)
        check_size(images.size, len(config["block_out_channels"]))
        return UNet2DModel.from_config(config), scheduler

    # the shape of Ho et al. 2020: four levels at 32x32, attention at 16x16; six from 64x64, as diffusers' script
    channels = model.block_out_channels
    if channels is None:
        levels = max(
            (n for n in range(1, 7) if all(side % 2 ** (n - 1) == 0 and side >> (n - 1) >= 4 for side in images.size)),
            default=1,
        )
        channels = [128, 128, 256, 256, 512, 512][:levels] if levels > 4 else [128, 256, 256, 256][:levels]
    check_size(images.size, len(channels))
    attention = model.attention_levels
    if attention is None:
        attention = [level for level in range(1, len(channels)) if max(images.size) >> level <= 16]
    if any(not 0 <= level < len(channels) for level in attention):
        raise ValueError(
            f"--attention_levels is {attention}; allowed: 0 to {len(channels) - 1}, the levels of --block_out_channels"
        )
    unet = UNet2DModel(
        sample_size=images.size[0] if images.size[0] == images.size[1] else images.size,
        in_channels=images.channels,
        out_channels=out_channels,
        block_out_channels=tuple(channels),
        layers_per_block=model.layers_per_block,
        # a group of one channel would normalise away the time embedding, a number added to each channel
        norm_num_groups=max(1, min(math.gcd(32, *channels), min(channels) // 2)),
        down_block_types=tuple(
            "AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(channels))
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(len(channels)))
        ),
        dropout=model.dropout,
        num_class_embeds=None if images.num_classes is None else images.num_classes + 1,
    )
    if images.labels is not None:
        unet.register_to_config(
            **{PRIVATE_ENTRY: {"null_label": images.num_classes, "class_names": images.class_names}}
        )
    return unet, scheduler


def check_size(size: tuple[int, int], levels: int) -> None:
    """A UNet halves the size levels - 1 times."""
    divisor = 2 ** (levels - 1)
    if size[0] % divisor or size[1] % divisor:
        raise ValueError(
            f"the images are {size[0]}x{size[1]} and the UNet has {levels} levels; allowed: sides that divide by {divisor} "
            "(give --resolution), or fewer levels (--block_out_channels)"
        )


class LossLog:
    """Loss, gradient norm and learning rate of every step, as one JSON line each; read from the accelerator only now and then.

    JSON has no NaN and no infinity: what is not finite is null.
    """

    def __init__(self, accelerator: Accelerator, path: Path, done: int) -> None:
        self.accelerator, self.path, self.step = accelerator, path, done
        self.waiting: list[tuple[torch.Tensor, Any, float]] = []
        self.rows = [row for row in read_rows(path) if row["step"] <= done] if done else []
        if accelerator.is_main_process:
            aside = path.with_name(f".{path.name}.partial")
            aside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(aside, path)  # a full disk costs no row

    def add(self, loss: torch.Tensor, grad_norm: Any, learning_rate: float) -> None:
        """Remember one step, without waiting for it."""
        self.waiting.append((loss, torch.as_tensor(grad_norm, device=loss.device), learning_rate))

    def write(self, bar: Any) -> None:
        """Average over processes and write what has gathered."""
        losses = self.accelerator.reduce(torch.stack([loss for loss, _, _ in self.waiting]), "mean").tolist()
        for loss, (_, norm, learning_rate) in zip(losses, self.waiting, strict=True):
            self.step += 1
            row = {"step": self.step, "loss": loss, "grad_norm": float(norm), "learning_rate": learning_rate}
            self.rows.append({key: value if math.isfinite(value) else None for key, value in row.items()})
        fresh = self.rows[-len(losses) :]
        self.waiting.clear()
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in fresh)
        self.accelerator.log({k: v for k, v in fresh[-1].items() if k != "step" and v is not None}, step=self.step)
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")

    def history(self) -> tuple[list[int], list[float]]:
        """Steps and losses of the whole run, from before an interruption too; NaN for a loss that was not finite."""
        return [row["step"] for row in self.rows], [
            math.nan if row["loss"] is None else row["loss"] for row in self.rows
        ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one that a stop cut short is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text().splitlines():
            rows.append(json.loads(text))
    return rows


@contextlib.contextmanager
def averaged_weights(unet: UNet2DModel, ema: AveragedWeights | None) -> Any:
    """The UNet with its averaged weights, for as long as the block lasts."""
    if ema is None:
        yield
        return
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        ema.restore(unet.parameters())


def sample(
    accelerator: Accelerator, unet: UNet2DModel, scheduler: DDPMNotesScheduler, run: RunArguments, stops: Stops
) -> Any:
    """`num_samples` images (N, C, H, W) uint8, image i from seed i whatever the number of processes, each of which makes its part.

    None if a signal stops the run meanwhile.
    """

    def end_if_stopped(pipeline: DDPMNotesPipeline, i: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = stops.received != 0
        return {}

    pipeline = DDPMNotesPipeline(unet, DDPMNotesScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(desc="sample", unit="step", disable=not accelerator.is_main_process)
    unet.eval()
    mine = range(run.num_samples)[accelerator.process_index :: accelerator.num_processes]
    made = []
    for i in range(0, len(mine), run.eval_batch_size):
        if stops.received:
            break
        seeds = mine[i : i + run.eval_batch_size]
        labels = None if pipeline.num_classes is None else [seed % pipeline.num_classes for seed in seeds]
        with accelerator.autocast():
            images = pipeline(
                batch_size=len(seeds),
                class_labels=labels,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=run.ddpm_num_inference_steps,
                output_type="latent",
                callback_on_step_end=end_if_stopped,
                return_dict=False,
            )[0]
        made.append(to_uint8(images.float()))
    unet.train()
    if stops.agreed():
        return None
    size = unet.config.sample_size
    none = torch.empty(
        (0, unet.config.in_channels, *((size, size) if isinstance(size, int) else size)), dtype=torch.uint8
    )
    own = torch.cat([none, *made])
    gathered = accelerator.gather(accelerator.pad_across_processes(own.to(accelerator.device), dim=0)).cpu()
    # process r made images r, r + P, ...: put them back in their order
    per_process = math.ceil(run.num_samples / accelerator.num_processes)
    order = [
        (i % accelerator.num_processes) * per_process + i // accelerator.num_processes for i in range(run.num_samples)
    ]
    return gathered[order].numpy()


def show(images: ImageSet, run: RunArguments) -> Any:
    """Real images for the left half of the picture, spread over the set."""
    count = min(run.num_samples, len(images))
    return images.take([i * len(images) // count for i in range(count)]).numpy()


def finish_trackers(accelerator: Accelerator) -> None:
    """Of a run that a signal stops: `end_training` would also end the connection of its processes, see `leave`."""
    for tracker in accelerator.trackers:
        tracker.finish()


def say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        tqdm.write(text)


def config_words() -> list[str]:
    """The value of --config on the command line, if it is there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    return parser.parse_known_args()[0].config


def summary(
    images: ImageSet,
    unet: UNet2DModel,
    run: RunArguments,
    log: LossLog,
    guard: UpdateGuard,
    steps: int,
    fresh: int,
    seconds: float,
    output_dir: Path,
) -> str:
    """Five lines: what was learned, where it is, how to load it, how to go on, how to train on other images."""
    _, losses = log.history()
    tail = [loss for loss in losses[-max(1, len(losses) // 20) :] if math.isfinite(loss)] or [math.nan]
    rate = fresh * run.train_batch_size / seconds if seconds > 0 else 0.0
    weights = "averaged (EMA)" if run.use_ema else "raw"
    skipped = f" ({images.skipped} bad ones skipped)" if images.skipped else ""
    left_out = f"{guard.skipped} updates left out, not finite; " if guard.skipped else ""
    script = "accelerate launch training/train.py"
    config = next((f" --config {shlex.quote(word)}" for word in config_words()), "")
    return "\n".join(
        [
            f"Learned:   {steps} steps on {len(images)} images{skipped}, {run.objective} loss {sum(tail) / len(tail):.4f} over the last "
            f"{len(tail)} steps; {left_out}{rate:.0f} images/s, {seconds / 60:.1f} min.",
            f"Where:     {output_dir}/ holds the {weights} weights, samples.png (look at it), loss.png, loss.jsonl and checkpoint-{steps}/.",
            f'Load:      python -c "from ddpm_notes_pipeline import DDPMNotesPipeline as P; '
            f"P.from_pretrained({str(output_dir)!r})().images[0].save('one.png')\"",
            f"Longer:    {resume_command()} --max_train_steps {2 * steps}",  # a later flag wins over an earlier one
            f"Your own:  {script}{config} --train_data_dir FOLDER_OF_IMAGES --resolution 32 --output_dir outputs/mine",
        ]
    )


def leave(status: int, text: str, together: bool = False) -> None:
    """End this process, with one line on stderr. `together`: all processes come here with the same line, and one of them writes it."""
    if text and (not together or os.environ.get("RANK", "0") == "0"):
        tqdm.write(text, file=sys.stderr)  # clear of a progress bar
    sys.stdout.flush(), sys.stderr.flush()
    # Not by the interpreter's own end: it waits for pushes on their way, and for the other processes, which may be for ever.
    os._exit(status)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    settings = parse_arguments()
    try:
        not_published = main(*settings)
    except Stopped as stop:
        leave(stop.status, f"train.py: {stop}", stop.together)
    except FailedElsewhere:
        leave(1, "")
    except (ValueError, OSError, FloatingPointError, CheckpointError, PublishingError) as fault:
        text = f"train.py: error: {' '.join(str(fault).split())}".rstrip(".")
        left = list_checkpoints(Path(settings[2].output_dir))
        if left and not isinstance(fault, ValueError):  # a mistake in the settings is not the run's end
            text += f". {left[0]} is left. Resume: {resume_command()}"
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            tqdm.write(text, file=sys.stderr)
            sys.exit(1)
        leave(1, text, isinstance(fault, FloatingPointError))
    sys.exit(not_published)
