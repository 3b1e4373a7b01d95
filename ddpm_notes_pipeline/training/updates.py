"""An update of the weights and their average, taken whole or not at all.

A loss that is not finite is made to have a gradient that is not finite (`poisoned`). Gradients are averaged over the processes, so their norm
tells every process the same: whether this step is taken. The number stays on the accelerator, where AdamW's fused kernel and the average
read it: nobody waits for it. The host learns of steps that were left out when it next reads the losses.
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
    """The same loss (a number); where it is not finite, neither is its gradient (that of inf = (1e30)^2 would be a number)."""
    return loss * (1 + 0 * loss.detach())


class AveragedWeights(EMAModel):
    """Exponential moving average of the weights, which a step that was left out leaves as it is.

    Args:
        schedule: of the decay. "warmup": at step n it is 1 - (1 + (n - 1) / inv_gamma)^-power and at most `decay`: early weights are soon
            forgotten. "constant": `decay` from the second step on. Either way the average starts as the weights behind the first step.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], decay: float, schedule: str, inv_gamma: float, power: float
    ) -> None:
        lowest = decay if schedule == "constant" else 0.0
        super().__init__(
            parameters,
            decay=decay,
            min_decay=lowest,
            use_ema_warmup=True,
            inv_gamma=inv_gamma,
            power=power,
            foreach=True,
        )

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter], taken: torch.Tensor | None = None) -> None:
        """`taken`: 1 for a step of the optimizer that changed the weights, 0 for one that was left out; None: 1."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        if taken is None:
            taken = torch.ones((), device=self.shadow_params[0].device)
        weight = taken * (1 - self.cur_decay_value)
        if weight.device.type == "cpu":  # one pass; the three below write every change to memory and read it again
            for average, parameter in zip(self.shadow_params, parameters, strict=True):
                average.lerp_(parameter, weight)
            return
        change = torch._foreach_sub(list(parameters), self.shadow_params)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self.shadow_params, change)


class UpdateGuard:
    """Leaves out updates that are not finite, counts them, and ends a run that has nothing else.

    Args:
        limit: so many left out in a row end the run.

    Attributes:
        skipped: steps left out so far, by a loss or gradient that was not finite.
        in_a_row: of these, how many the newest steps are.
        scale_skipped: steps that fp16's loss scaling left out to find its scale: its normal behaviour, and not counted above.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self.accelerator, self.limit = accelerator, limit
        self.skipped = self.in_a_row = self.scale_skipped = 0
        self.waiting: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def update(self, optimizer: Any, grad_norm: torch.Tensor) -> torch.Tensor:
        """Step the (prepared) optimizer if the norm of its gradients is finite; returns 1 if it did and 0 if not, on the accelerator."""
        taken = torch.isfinite(grad_norm)
        inner = optimizer.optimizer
        if self.accelerator.scaler is not None:  # it reads the gradients itself, and decides alike
            optimizer.step()
        elif inner.defaults["fused"]:
            inner.found_inf = (~taken).float()  # what a loss scaler would set
            optimizer.step()
        elif bool(taken):
            optimizer.step()
        return taken.float()

    def watch(self, step: int, t: torch.Tensor, losses: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Remember a step (counted from 1) and this process's timesteps and losses (b,), without waiting for it."""
        self.waiting.append((step, t, losses, grad_norm))

    def check(self) -> None:
        """Read what has gathered, say what was left out. Called by every process.

        Raises:
            FloatingPointError: the last `limit` steps were all left out.
        """
        norms = torch.stack([norm for *_, norm in self.waiting]).tolist()
        before = self.skipped
        described = ""
        for (step, t, losses, _), norm in zip(self.waiting, norms, strict=True):
            if math.isfinite(norm):
                self.in_a_row = 0
                continue
            # The norm is the same for all processes, so that all come here.
            t = self.accelerator.gather(t.to(losses.device)).cpu()
            losses = self.accelerator.gather(losses).cpu()
            scaler = self.accelerator.scaler
            if scaler is not None and losses.isfinite().all() and scaler.get_scale() >= 1:
                self.scale_skipped += 1
                continue
            self.skipped += 1
            self.in_a_row += 1
            described = describe(step, t, losses, norm)
            if self.in_a_row >= self.limit:
                self.waiting.clear()
                raise FloatingPointError(
                    f"no finite update in {self.in_a_row} steps in a row (--max_nonfinite_steps); at the last one, {described}. The "
                    "weights and their average are as they were before. A smaller --learning_rate may help"
                )
        self.waiting.clear()
        if self.skipped > before and self.accelerator.is_main_process:
            text = (
                f"left out {self.skipped - before} update(s) that were not finite, {self.skipped} so far; {described}"
            )
            tqdm.write(f"WARNING: {text}", file=sys.stderr)  # clear of the progress bar

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "scale_skipped": self.scale_skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the counts of an earlier process."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.scale_skipped = state["scale_skipped"]


def describe(step: int, t: torch.Tensor, losses: torch.Tensor, grad_norm: float) -> str:
    """One step that was left out, in words: where its loss, if that is it, is not finite."""
    bad = sorted(set(t[~losses.isfinite()].tolist()))
    some = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    # all finite: the gradient alone is not, and the largest loss is the suspect
    where = f"not finite at timesteps {some}" if bad else f"largest at timestep {int(t[losses.argmax()])}"
    return f"step {step}: loss {float(losses.mean()):.4g} ({where}), gradient norm {grad_norm:.4g}"
