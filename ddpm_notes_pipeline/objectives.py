"""What training minimises: Algorithm 1 of DDPM, the bound, and weighted relatives of the two.

Maximising the bound means, at a random step t, a least-squares problem in x_0, in eps or in v (the
notes' figure 14):

    |eps - eps_hat|^2 = SNR |x_0 - x0_hat|^2 = alpha_bar |v - v_hat|^2
    SNR = alpha_bar / (1 - alpha_bar)

The bound gives |eps - eps_hat|^2 the weight b / (2 a (1 - alpha_bar_s)). Algorithm 1 gives it the
weight 1: "simple" is the bound reweighted, towards the noisy steps that shape what one sees.
"hybrid" keeps that for the mean and adds the bound for a learned variance. Each objective is a mean
over t; how t is drawn changes the variance of its estimate, never its expectation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .core.gaussian_chain import to_device
from .names import LEARNED_VARIANCES, OBJECTIVES, TIMESTEP_SAMPLINGS, WEIGHTINGS
from .scheduling_ddpm_notes import DDPMNotesScheduler


@dataclass
class Objective:
    """The loss of a batch of images at given timesteps, one number an image.

    Args:
        scheduler: the math; its `prediction_type` says what the network outputs and so its target.
            Levels that it has are left out: between two levels their gradient explodes.
        kind: "simple": squared error of the network's target, mean over dims (Ho et al. 2020,
            eq. 14, for "epsilon").
            "vlb": T times one term of the bound in bits/dim, so that its mean over t is the bound
            (without the prior).
            "hybrid": simple + 0.001 vlb, the mean detached inside vlb (Nichol & Dhariwal, arXiv
            2102.09672, eq. 16): the bound trains the variance alone. Needs a learned variance.
        weighting: of "simple" over t. "none", or "min_snr": error of x_0 times min(SNR, gamma)
            (arXiv 2303.09556).
        snr_gamma: gamma of "min_snr".

    Raises:
        ValueError: an unknown name; "hybrid" without a learned variance; a weighting of the bound.
    """

    scheduler: DDPMNotesScheduler
    kind: str = "simple"
    weighting: str = "none"
    snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        for name, value, choice in (("kind", self.kind, OBJECTIVES), ("weighting", self.weighting, WEIGHTINGS)):
            if value not in choice:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choice)}")
        if self.scheduler.levels is not None:
            self.scheduler = DDPMNotesScheduler.from_config(self.scheduler.config, levels=None)
        variance_type = self.scheduler.variance_type
        given = f"kind is {self.kind!r} with variance_type {variance_type!r}"
        if self.kind == "hybrid" and variance_type not in LEARNED_VARIANCES:
            raise ValueError(f"{given}; it must be one of {', '.join(LEARNED_VARIANCES)}")
        if self.kind == "simple" and variance_type in LEARNED_VARIANCES:
            raise ValueError(f"{given}, whose variance it would never train; it must be 'hybrid' or 'vlb'")
        if self.kind == "vlb" and self.weighting != "none":
            raise ValueError(f"weighting is {self.weighting!r} with kind 'vlb', the bound itself; it must be 'none'")

    def __call__(
        self,
        network: Callable[..., Any],
        x_0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each image, (B,), differentiable.

        Args:
            network: called as network(x_t, t, class_labels=..., return_dict=False)[0], as is a
                `UNet2DModel`.
            x_0: images in [-1, 1], (B, C, H, W). noise: standard normal, same shape.
            t: timesteps, (B,). On the CPU they are checked without a device sync.
        """
        x_t = self.scheduler.add_noise(x_0, noise, t)
        model_output = network(x_t, to_device(t, x_t.device), class_labels=class_labels, return_dict=False)[0].float()
        if self.kind == "vlb":
            return self._vlb(model_output, x_0, x_t, t)
        output = model_output[:, : x_0.shape[1]]
        target = self._target(x_0, noise, t)
        simple = (output - target).pow(2).flatten(1).mean(1)
        if self.weighting != "none":
            simple = simple * to_device(self.weight(t), simple.device, simple.dtype)
        if self.kind == "simple":
            return simple
        held = torch.cat([output.detach(), model_output[:, x_0.shape[1] :]], dim=1)
        return simple + 0.001 * self._vlb(held, x_0, x_t, t)

    def _target(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network's output is compared with."""
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        return x_0 if prediction_type == "sample" else self.scheduler.get_velocity(x_0, noise, t)

    def _vlb(self, model_output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """T times the bound's term at t, in bits/dim: the mean over t is the sum over the chain."""
        nats = self.scheduler.vlb_terms(model_output, x_0, x_t, t, t - 1, clip=False)
        return (len(self.scheduler) / (x_0[0].numel() * math.log(2)) * nats).float()

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight "min_snr" of the squared error of the network's target at t, (B,) float64."""
        pair = self.scheduler.chain.pair(t, -1)
        of_x_0 = pair.snr_t.clamp(max=self.snr_gamma)
        # the same weight, of another target's error (module docstring)
        of_target = {
            "epsilon": of_x_0 / pair.snr_t,
            "sample": of_x_0,
            "v_prediction": of_x_0 * pair.one_minus_alpha_bar_t,
        }
        return of_target[self.scheduler.config.prediction_type]


class TimestepSampler:
    """Draws the timesteps of a batch, and the weight that keeps each loss unbiased.

    It maps uniform numbers, which come from (seed, step, position), so that the timesteps do too.

    Args:
        num_train_timesteps: T.
        sampling: "uniform": each t independent.
            "stratified": position i of a global batch of B draws from the i-th of B equal parts of
            0..T-1, for less noise in the batch's mean.
            "loss_second_moment": p(t) ~ sqrt(E[loss_t^2]) over the last `history` losses of each t,
            uniform until every t has that many (Nichol & Dhariwal, arXiv 2102.09672, eq. 18); for
            "vlb", whose terms differ by orders of magnitude. The next step waits for these losses:
            on an accelerator, a host sync at each step, which the other two do without.
        history: losses remembered of each t. uniform_share: of p(t), what stays uniform.
    """

    def __init__(
        self, num_train_timesteps: int, sampling: str = "uniform", history: int = 10, uniform_share: float = 0.001
    ) -> None:
        if sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(f"sampling is {sampling!r}; it must be one of {', '.join(TIMESTEP_SAMPLINGS)}")
        self.num_train_timesteps = num_train_timesteps
        self.sampling = sampling
        self.uniform_share = uniform_share
        self.losses = torch.zeros(num_train_timesteps, history, dtype=torch.float64, device="cpu")
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64, device="cpu")

    def probabilities(self) -> torch.Tensor:
        """p(t), (T,) float64, sums to 1."""
        T = self.num_train_timesteps
        uniform = torch.full((T,), 1 / T, dtype=torch.float64, device="cpu")
        if self.sampling != "loss_second_moment" or int(self.counts.min()) < self.losses.shape[1]:
            return uniform
        weights = self.losses.pow(2).mean(1).sqrt()
        if weights.sum() == 0:
            return uniform
        return (1 - self.uniform_share) * weights / weights.sum() + self.uniform_share * uniform

    def sample(self, u: torch.Tensor, position: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (B,) int64, and the weights 1 / (T p(t)) (B,) float64 of their losses.

        Args:
            u: uniform in [0, 1), (B,) float64.
            position: of each image in the global batch, (B,).
            batch_size: of the global batch.
        """
        T = self.num_train_timesteps
        if self.sampling == "stratified":
            u = (position + u) / batch_size
        if self.sampling != "loss_second_moment":
            return (u * T).long().clamp(max=T - 1), torch.ones_like(u)
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=T - 1)
        return t, 1 / (T * p[t])

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember the finite, unweighted losses (B,) of the global batch at t (B,), in order."""
        for index, loss in zip(t.tolist(), losses.tolist()):
            if math.isfinite(loss):
                self.losses[index, int(self.counts[index]) % self.losses.shape[1]] = loss
                self.counts[index] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The history, for a checkpoint."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a history of the same T and length; ValueError for another shape."""
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"losses has shape {tuple(state['losses'].shape)}; it must be {tuple(self.losses.shape)}")
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
