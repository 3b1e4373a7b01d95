"""An update of the weights and their average, applied as a whole or skipped.

A non-finite loss is given a non-finite gradient (`poisoned`). Gradients are averaged over
processes, so their norm tells all ranks alike whether to apply the step. That flag stays on the
device, where AdamW's fused kernel and the average read it: checking it on the host would force a
device sync. The host learns of skipped steps when it next reads the losses.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The same loss (a scalar), with a non-finite gradient if it is not finite itself.

    Otherwise the gradient of inf = (1e30)^2 would be finite.
    """
    return loss * (1 + 0 * loss.detach())


class AveragedWeights(EMAModel):
    """Exponential moving average of the weights, unchanged by a skipped step.

    Args:
        schedule: of the decay. "warmup": 1 - (1 + (n - 1) / inv_gamma)^-power at step n, at most
            `decay`, so that early weights are soon forgotten. "constant": `decay` from the second
            step on. Either way the average starts at the weights after the first step.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], decay: float, schedule: str, inv_gamma: float, power: float
    ) -> None:
        lowest = decay if schedule == "constant" else 0.0
        super().__init__(parameters, decay, lowest, use_ema_warmup=True, inv_gamma=inv_gamma, power=power, foreach=True)

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter], applied: torch.Tensor | float = 1.0) -> None:
        """Move towards `parameters`, unless `applied`, a scalar, is 0: a skipped optimizer step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        weight = torch.as_tensor(applied * (1 - self.cur_decay_value), device=self.shadow_params[0].device)
        if weight.is_cpu:  # one pass over the memory
            for average, parameter in zip(self.shadow_params, parameters, strict=True):
                average.lerp_(parameter, weight)
            return
        # A few kernels for all weights; torch has no public name for these.
        change = torch._foreach_sub(list(parameters), self.shadow_params)  # noqa: SLF001
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self.shadow_params, change)


class UpdateGuard:
    """Skips updates that are not finite, counts them, and ends a run of nothing else.

    Args:
        limit: this many skipped in a row end the run.

    Attributes:
        skipped: steps skipped so far because of a non-finite loss or gradient.
        in_a_row: how many of the newest steps these are.
        scale_skipped: steps that fp16's loss scaling skipped to find its scale; not counted above.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self.accelerator, self.limit = accelerator, limit
        self.skipped = self.in_a_row = self.scale_skipped = 0
        self.waiting: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def update(self, optimizer: Any, grad_norm: torch.Tensor) -> torch.Tensor:
        """Step the prepared optimizer if the gradient norm is finite.

        Returns:
            1 if it did and 0 if not, a scalar on the device.
        """
        finite = torch.isfinite(grad_norm)
        # A loss scaler checks the gradients itself, and decides alike; the fused kernel is told.
        checked = self.accelerator.scaler is not None
        if not checked and optimizer.optimizer.defaults["fused"]:
            optimizer.optimizer.found_inf = (~finite).float()  # what a loss scaler would set
            checked = True
        if checked or bool(finite):
            optimizer.step()
        return finite.float()

    def watch(self, step: int, t: torch.Tensor, losses: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Remember a step (from 1) and this rank's timesteps and losses (B,), without a sync."""
        self.waiting.append((step, t, losses, grad_norm))

    def check(self) -> None:
        """Count and report the steps skipped since the last call. Collective.

        Raises:
            FloatingPointError: the last `limit` steps were all skipped.
        """
        waiting, self.waiting = self.waiting, []
        norms = torch.stack([norm for *_, norm in waiting]).tolist()
        before, description = self.skipped, ""
        for (step, t, losses, _), norm in zip(waiting, norms, strict=True):
            if math.isfinite(norm):
                self.in_a_row = 0
                continue
            # The norm is the same on all ranks, so all of them gather.
            t = self.accelerator.gather(t.to(losses.device)).cpu()
            losses = self.accelerator.gather(losses).cpu()
            scaler = self.accelerator.scaler
            if scaler is not None and losses.isfinite().all() and scaler.get_scale() >= 1:
                self.scale_skipped += 1
                continue
            self.skipped += 1
            self.in_a_row += 1
            description = describe(step, t, losses, norm)
            if self.in_a_row >= self.limit:
                raise FloatingPointError(
                    f"no finite update in {self.in_a_row} steps in a row (--max_nonfinite_steps); at the last one, "
                    f"{description}. The weights and their average are as they were before. A smaller --learning_rate "
                    "may help"
                )
        if self.skipped > before and self.accelerator.is_main_process:
            text = f"skipped {self.skipped - before} update(s) that were not finite, {self.skipped} so far"
            tqdm.write(f"WARNING: {text}; {description}", file=sys.stderr)  # above the progress bar

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "scale_skipped": self.scale_skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts of a checkpoint."""
        vars(self).update(state)


def describe(step: int, t: torch.Tensor, losses: torch.Tensor, grad_norm: float) -> str:
    """A skipped step in words: at which timesteps its loss is not finite, or largest."""
    bad = sorted(set(t[~losses.isfinite()].tolist()))
    some = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    # if only the gradient is not finite, the largest loss is the suspect
    where = f"not finite at timesteps {some}" if bad else f"largest at timestep {int(t[losses.argmax()])}"
    return f"step {step}: loss {float(losses.mean()):.4g} ({where}), gradient norm {grad_norm:.4g}"
