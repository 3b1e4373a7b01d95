"""What is trained: a network, the average of its weights, its optimizer, and one step of them."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler

from ..data import to_model_range
from ..data.batches import step_seed
from ..objectives import Objective, TimestepSampler
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from ..stock_config import PRIVATE_ENTRY
from .arguments import RunArguments
from .checkpoints import CheckpointState
from .logs import warning_once
from .updates import AveragedWeights, UpdateGuard, poisoned


class Learner:
    """A network and all that a step changes.

    Attributes:
        unet: the network. network: the same, wrapped for several processes.
        average: moving average of the weights; None without.
    """

    def __init__(
        self, accelerator: Accelerator, unet: UNet2DModel, scheduler: DDPMNotesScheduler, run: RunArguments
    ) -> None:
        self.accelerator, self.run, self.unet, self.scheduler = accelerator, run, unet, scheduler
        self.objective = Objective(scheduler, run.objective, run.loss_weighting, snr_gamma=run.snr_gamma)
        self.timestep_sampler = TimestepSampler(len(scheduler), run.timestep_sampling)
        if run.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.average: AveragedWeights | None = None
        if run.use_ema:
            decay = (run.ema_max_decay, run.ema_schedule, run.ema_inv_gamma, run.ema_power)
            self.average = AveragedWeights(unet.parameters(), *decay)
            self.average.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=run.learning_rate,
            **adam_settings(run),
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.network, self.optimizer = accelerator.prepare(unet, optimizer)
        self.guard = UpdateGuard(accelerator, run.max_nonfinite_steps)
        if run.torch_compile:
            unet.compile()
        self.lr_scheduler: Any = None  # by `schedule`
        self._last_loss: torch.Tensor | None = None

    def checkpoint_state(self, fingerprint: str, class_names: list[str] | None = None) -> CheckpointState:
        """What a checkpoint holds of this, for a run on images of a fingerprint and classes."""
        identity = {
            "seed": self.run.seed,
            "train_batch_size": self.run.train_batch_size,
            "images": fingerprint,
            "classes": class_names,  # of labels 0, 1, ...: the fingerprint is of pixels alone
            "use_ema": self.run.use_ema,
        }
        for owner, config in (("unet", self.unet.config), ("scheduler", self.scheduler.config)):
            ours = config.get(PRIVATE_ENTRY) or {}  # a schedule by its name and ends
            named = {name: ours.get(name, value) for name, value in config.items() if not name.startswith("_")}
            named |= {name: ours[name] for name in ("log_snr_range",) if name in ours}
            identity |= {f"{owner}.{name}": value for name, value in named.items()}
        identity = json.loads(json.dumps(identity))  # as a checkpoint returns it
        return CheckpointState(self.average, self.timestep_sampler, self.guard, identity)

    def schedule(self, done: int, steps: int, warmup: int) -> None:
        """Set the learning rate of step `done` of `steps`, and of those after it.

        With the optimizer's other settings, for which a checkpoint has those of the run before.
        """
        for group in self.optimizer.param_groups:
            group |= {"initial_lr": self.run.learning_rate, **adam_settings(self.run)}
        # Not prepared: accelerate would step it once per process.
        self.lr_scheduler = get_scheduler(
            self.run.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            last_epoch=done - 1,
        )

    def update(self, step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
        """Forward, backward, clip, optimizer, average. Collective: every rank must call it.

        Args:
            step: counted from 0.
            batch: this rank's share of the global batch, from `StepBatches`.

        Returns:
            The row of loss.jsonl, read from the device later: no sync here.
        """
        device, rank = self.accelerator.device, self.accelerator.process_index
        self.set_levels(None)
        torch.manual_seed(step_seed(self.run.seed, step, f"dropout of process {rank}"))
        share = len(batch["u"])
        position = torch.arange(share, device=batch["u"].device) + rank * share
        t, weight = self.timestep_sampler.sample(batch["u"], position, self.run.train_batch_size)
        weight = weight.to(device, torch.float32, non_blocking=True)
        losses = self._backward(batch, t, weight)
        parameters = self.optimizer.param_groups[0]["params"]  # walking the network takes time at every step
        grad_norm = self.accelerator.clip_grad_norm_(parameters, self.run.max_grad_norm)
        applied = self.guard.update(self.optimizer, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.step(parameters, applied)
        if self.run.timestep_sampling == "loss_second_moment":
            gathered = (self.accelerator.gather(value).cpu() for value in (t.to(device), losses))
            self.timestep_sampler.update(*gathered)
        self.guard.watch(step + 1, t, losses, grad_norm)
        return {"loss": (losses * weight).mean(), "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _backward(self, batch: dict[str, torch.Tensor], t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Accumulate gradients of the weighted mean loss; returns the unweighted losses (B,)."""
        device, share, parts = self.accelerator.device, len(t), self.run.gradient_accumulation_steps
        x_0 = to_model_range(batch["pixel_values"].to(device, non_blocking=True))
        noise = batch["noise"].to(device, non_blocking=True)
        labels = batch["class_labels"].to(device, non_blocking=True) if "class_labels" in batch else None
        losses = []
        for first in range(0, share, share // parts):
            part = slice(first, first + share // parts)
            is_last = part.stop == share
            # gradients are averaged over processes once, with the last part
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.network):
                label_part = None if labels is None else labels[part]
                loss = self.objective(self.network, x_0[part], noise[part], t[part], label_part)
                self.accelerator.backward(poisoned((loss * weight[part]).mean() / parts))
            losses.append(loss.detach())
        # Freeing its graph here makes glibc return the memory to the system: 7 % of a CPU step.
        self._last_loss = loss
        return torch.cat(losses)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the UNet has its averaged weights."""
        if self.average is None:
            yield
            return
        self.average.store(self.unet.parameters())
        self.average.copy_to(self.unet.parameters())
        try:
            yield
        finally:
            self.average.restore(self.unet.parameters())

    @contextlib.contextmanager
    def pipeline(self, float32: bool = False, **progress_bar: Any) -> Iterator[DDPMNotesPipeline]:
        """A pipeline of the averaged weights, for a block in which the network is in eval mode.

        Args:
            float32: compute in float32 even in a run of mixed precision, as bits/dim should be.
            progress_bar: settings of its bar.
        """
        pipeline = DDPMNotesPipeline(self.unet, DDPMNotesScheduler.from_config(self.scheduler.config))
        pipeline.set_progress_bar_config(disable=not self.accelerator.is_main_process, **progress_bar)
        precision = without_autocast(self.unet) if float32 else contextlib.nullcontext()
        with warning_once(self.accelerator), self.averaged(), precision:
            self.unet.eval()
            try:
                yield pipeline
            finally:
                self.unet.train()

    def set_levels(self, levels: dict[str, Any] | None) -> None:
        """Give the scheduler levels that fit these weights (`level_fit`); a step drops them."""
        if levels is not self.scheduler.levels:
            self.scheduler = DDPMNotesScheduler.from_config(self.scheduler.config, levels=levels)

    def keep_average(self) -> None:
        """Make the averaged weights the network's own: training has ended."""
        if self.average is not None:
            self.average.copy_to(self.unet.parameters())
            self.average = None

    def unwrap(self) -> None:
        """Keep the network alone, ready to sample; drop its wrapper and all that trained it."""
        for name in ("forward", "_original_forward"):  # accelerate's autocast
            vars(self.unet).pop(name, None)
        self.network = self.unet.eval()
        self.optimizer = self.lr_scheduler = self._last_loss = None


def adam_settings(run: RunArguments) -> dict[str, Any]:
    """AdamW's settings but the learning rate, which has a schedule."""
    betas = run.adam_beta1, run.adam_beta2
    return {"betas": betas, "weight_decay": run.adam_weight_decay, "eps": run.adam_epsilon}


@contextlib.contextmanager
def without_autocast(unet: UNet2DModel) -> Iterator[None]:
    """A block in which the network computes in its weights' precision.

    accelerate puts autocast around `forward`, as an attribute of the network; what it wraps is kept
    beside it.
    """
    original = vars(unet).get("_original_forward")
    if original is None:
        yield
        return
    autocast, unet.forward = unet.forward, original
    try:
        yield
    finally:
        unet.forward = autocast
