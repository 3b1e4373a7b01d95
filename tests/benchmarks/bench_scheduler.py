"""One call of the scheduler: `step`, `add_noise`, `vlb_terms`."""

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDPMScheduler

from ddpm_notes_pipeline import DDPMNotesScheduler
from measure import Row, interleave, ratio_row

SIZES = {"1x1x8x8": (1, 1, 8, 8), "64x3x32x32": (64, 3, 32, 32)}


def step() -> list[Row]:
    """Beside diffusers' step, and beside drawing the noise and touching the sample once."""
    rows = []
    for name, size in SIZES.items():
        ours, peer = DDPMNotesScheduler(), DDPMScheduler()
        for scheduler in (ours, peer):
            scheduler.set_timesteps(1000)
        x, eps = torch.randn(size), torch.randn(size)
        once = torch.empty_like(x)

        def floor(x: torch.Tensor = x, once: torch.Tensor = once) -> torch.Tensor:
            return once.normal_(0, 0.1).add_(x, alpha=0.9)

        def call(scheduler: object, x: torch.Tensor = x, eps: torch.Tensor = eps) -> Callable[[], torch.Tensor]:
            t = scheduler.timesteps[500]  # type: ignore[attr-defined]
            return lambda: scheduler.step(eps, t, x).prev_sample  # type: ignore[attr-defined]

        torch.manual_seed(0)
        expected = call(peer)()
        torch.manual_seed(0)
        torch.testing.assert_close(call(ours)(), expected, atol=1e-5, rtol=1e-5)
        times = interleave({"peer": call(peer), "ours": call(ours), "floor": floor})
        what, floor_name = f"`step` {name}", "noise + one fused read and write"
        rows.append(ratio_row(what, "`DDPMScheduler.step`", times["peer"], times["ours"]))
        rows.append(ratio_row(what, floor_name, times["floor"], times["ours"], limit=True))
    return rows


def terms() -> list[Row]:
    """`add_noise` and the terms of the bound."""
    rows = []
    for what, size in SIZES.items():
        ours, peer = DDPMNotesScheduler(), DDPMScheduler()
        x, eps, t = torch.randn(size), torch.randn(size), torch.randint(0, 1000, size[:1])
        torch.testing.assert_close(ours.add_noise(x, eps, t), peer.add_noise(x, eps, t), atol=1e-5, rtol=1e-5)
        inputs = x, eps, t
        times = interleave(
            {
                name: lambda scheduler=scheduler, inputs=inputs: scheduler.add_noise(*inputs)
                for name, scheduler in (("peer", peer), ("ours", ours))
            }
        )
        rows.append(ratio_row(f"`add_noise` {what}", "`DDPMScheduler`", times["peer"], times["ours"]))

    scheduler, peer_terms = DDPMNotesScheduler(), ImprovedDiffusionTerms()
    for name, size in {"64x1x8x8": (64, 1, 8, 8), "64x3x32x32": (64, 3, 32, 32)}.items():
        x_0, eps = torch.randint(0, 256, size) / 127.5 - 1, torch.randn(size)
        t = torch.randint(1, 1000, size[:1])  # 15 of 16 such batches hold no t = 0
        timesteps = {"": t, ", one image at t = 0": t.index_fill(0, torch.tensor([0]), 0)}
        for with_decoder, t in timesteps.items():
            x_t, s = scheduler.add_noise(x_0, eps, t), t - 1
            output = eps + 0.1 * torch.randn(size)
            bits = scheduler.vlb_terms(output, x_0, x_t, t, s) / (x_0[0].numel() * math.log(2))
            # Not at t = 0: there the decoder of improved-diffusion approximates the normal CDF by a
            # tanh, and its variance follows another rule.
            torch.testing.assert_close(bits[1:], peer_terms(output, x_0, x_t, t).double()[1:], atol=1e-4, rtol=2e-3)
            times = interleave(
                {
                    "peer": lambda o=output, t=t, x=x_t, y=x_0: peer_terms(o, y, x, t),
                    "ours": lambda o=output, t=t, x=x_t, y=x_0, s=s: scheduler.vlb_terms(o, y, x, t, s),
                }
            )
            what = f"`vlb_terms` {name}{with_decoder}"
            rows.append(ratio_row(what, "improved-diffusion's terms", times["peer"], times["ours"]))
    return rows


class ImprovedDiffusionTerms:
    """Terms of the bound in bits/dim as in improved-diffusion (arXiv 2102.09672), fixed variance.

    Each use of a float64 numpy table moves all of it to the device, gathers the batch's entries,
    rounds them to float32 and expands them to the images. KL of two diagonal Gaussians; discretized
    likelihood with a tanh for the normal CDF; both are computed for every image, and one is chosen
    afterwards.
    """

    def __init__(self, T: int = 1000) -> None:
        betas = np.linspace(1e-4, 0.02, T)
        abar = np.cumprod(1 - betas)
        abar_s = np.append(1.0, abar[:-1])
        variance = betas * (1 - abar_s) / (1 - abar)
        self.recip, self.recip_m1 = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)
        self.c_0 = betas * np.sqrt(abar_s) / (1 - abar)
        self.c_t = (1 - abar_s) * np.sqrt(1 - betas) / (1 - abar)
        self.variance, self.log_variance = variance, np.log(np.append(variance[1], variance[1:]))

    @staticmethod
    def extract(table: np.ndarray, t: torch.Tensor, size: torch.Size) -> torch.Tensor:
        values = torch.from_numpy(table).to(t.device)[t].float()
        while values.ndim < len(size):
            values = values[..., None]
        return values.expand(size)

    def posterior(self, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = self.extract(self.c_0, t, x_t.shape) * x_0 + self.extract(self.c_t, t, x_t.shape) * x_t
        return mean, self.extract(self.variance, t, x_t.shape), self.extract(self.log_variance, t, x_t.shape)

    def predicted(self, eps: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.extract(self.variance, t, x_t.shape)  # improved-diffusion returns the variance as well
        log_variance = self.extract(self.log_variance, t, x_t.shape)
        x_0 = self.extract(self.recip, t, x_t.shape) * x_t - self.extract(self.recip_m1, t, x_t.shape) * eps
        mean, _, _ = self.posterior(x_0.clamp(-1, 1), x_t, t)
        return mean, log_variance

    @staticmethod
    def normal_kl(mean: torch.Tensor, log_v: torch.Tensor, mean_p: torch.Tensor, log_v_p: torch.Tensor) -> torch.Tensor:
        ratio = torch.exp(log_v - log_v_p)
        return 0.5 * (-1.0 + log_v_p - log_v + ratio + (mean - mean_p) ** 2 * torch.exp(-log_v_p))

    @staticmethod
    def log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        def cdf(z: torch.Tensor) -> torch.Tensor:
            return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

        inverse = torch.exp(-log_std)
        upper, lower = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
        log_upper, log_rest = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
        inside = (upper - lower).clamp(min=1e-12).log()
        return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_rest, inside))

    def __call__(self, eps: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mean, _, log_v = self.posterior(x_0, x_t, t)
        mean_p, log_v_p = self.predicted(eps, x_t, t)
        kl = self.normal_kl(mean, log_v, mean_p, log_v_p).flatten(1).mean(1) / math.log(2)
        decoder = -self.log_likelihood(x_0, mean_p, 0.5 * log_v_p).flatten(1).mean(1) / math.log(2)
        return torch.where(t == 0, decoder, kl)
