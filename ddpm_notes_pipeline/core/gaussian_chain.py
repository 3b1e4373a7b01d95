"""The Gaussian chain of DDPM (Ho et al. 2020, arXiv 2006.11239): every coefficient, written once.

A fixed chain adds noise to an image x_0 in T small steps, beta_t at a time. With alpha_bar_t the
product of 1 - beta up to t, any x_t is one jump away from the image:

    q(x_t | x_0)      = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)               forward jump
    q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, posterior_variance I)   for s < t      posterior
    p(x_s | x_t)      = N(c_0 x0_hat(x_t) + c_t x_t, variance I)                    reverse step

A network supplies x0_hat, its guess of x_0 (directly, as the noise eps, or as the velocity v).

Timesteps are counted as diffusers does, t = 0..T-1, and **s = -1 is the data x_0** (alpha_bar = 1).
The tables are float64 and logarithmic, so that 1 - alpha_bar keeps its digits at both ends.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

Timesteps = int | torch.Tensor


def widest_float(device: torch.device) -> torch.dtype:
    """float64; float32 on mps, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_device(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x on a device; nobody waits for a copy to an accelerator.

    A copy to the CPU is waited for: its values could be read before they have arrived.
    """
    return x.to(device, dtype or x.dtype, non_blocking=x.is_cpu)


class Table:
    """A 1-d tensor on the CPU, looked up on the device of its index, where it is copied once."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """All values on a device."""
        if device not in self._copies:
            dtype = widest_float(device) if self.values.is_floating_point() else self.values.dtype
            self._copies[device] = to_device(self.values, device, dtype)
        return self._copies[device]

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.on(index.device)[index]


@dataclass(frozen=True)
class StepPair:
    """The coefficients of steps from t to s, float64, each of shape (B,) or (1,), on t's device.

    Attributes:
        t, s: the timesteps, int64, s < t; s = -1 is the data.
        log_alpha_bar_t, log_alpha_bar_s: what all the others are computed from.
    """

    t: torch.Tensor
    s: torch.Tensor
    log_alpha_bar_t: torch.Tensor
    log_alpha_bar_s: torch.Tensor

    def to(self, device: torch.device) -> "StepPair":
        """The same on another device."""
        steps = (to_device(x, device) for x in (self.t, self.s))
        logs = (to_device(x, device, widest_float(device)) for x in (self.log_alpha_bar_t, self.log_alpha_bar_s))
        return StepPair(*steps, *logs)

    @cached_property
    def alpha_bar_t(self) -> torch.Tensor:
        return self.log_alpha_bar_t.exp()

    @cached_property
    def alpha_bar_s(self) -> torch.Tensor:
        return self.log_alpha_bar_s.exp()

    @cached_property
    def one_minus_alpha_bar_t(self) -> torch.Tensor:
        return -torch.expm1(self.log_alpha_bar_t)

    @cached_property
    def one_minus_alpha_bar_s(self) -> torch.Tensor:
        return -torch.expm1(self.log_alpha_bar_s)

    @cached_property
    def a(self) -> torch.Tensor:
        """alpha_bar_t / alpha_bar_s: the signal that a jump from s to t keeps."""
        return (self.log_alpha_bar_t - self.log_alpha_bar_s).exp()

    @cached_property
    def b(self) -> torch.Tensor:
        """1 - a: the noise that a jump from s to t adds (beta_t where s = t - 1)."""
        return -torch.expm1(self.log_alpha_bar_t - self.log_alpha_bar_s)

    @cached_property
    def c_0(self) -> torch.Tensor:
        """Coefficient of x_0 in the posterior's mean (Ho et al. 2020, eq. 7)."""
        return self.alpha_bar_s.sqrt() * self.b / self.one_minus_alpha_bar_t

    @cached_property
    def c_t(self) -> torch.Tensor:
        """Coefficient of x_t in the posterior's mean."""
        return self.a.sqrt() * self.one_minus_alpha_bar_s / self.one_minus_alpha_bar_t

    @cached_property
    def posterior_variance(self) -> torch.Tensor:
        """Variance of q(x_s | x_t, x_0); 0 at the data."""
        return self.one_minus_alpha_bar_s * self.b / self.one_minus_alpha_bar_t

    @cached_property
    def snr_t(self) -> torch.Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t)."""
        return self.alpha_bar_t / self.one_minus_alpha_bar_t

    @cached_property
    def snr_gain(self) -> torch.Tensor:
        """SNR_s - SNR_t = c_0^2 / posterior variance (arXiv 2107.00630, eq. 13); inf at s = -1."""
        return self.alpha_bar_s * self.b / (self.one_minus_alpha_bar_t * self.one_minus_alpha_bar_s)

    def prior_kl(self, mean_square: Any) -> torch.Tensor:
        """KL(q(x_t | x_0), N(0, I)) in nats per dim, (B,), of images with this mean of x_0^2."""
        alpha_bar = self.alpha_bar_t
        # log(1 - alpha_bar), by whichever of its two forms keeps its digits
        log_noise = torch.where(alpha_bar < 0.5, torch.log1p(-alpha_bar), self.one_minus_alpha_bar_t.log())
        return 0.5 * (alpha_bar * (mean_square - 1) - log_noise)

    @property
    def all_at_data(self) -> bool:
        """Whether every s is the data; False on an accelerator, as telling would force a sync."""
        return self.s.is_cpu and bool((self.s < 0).all())

    @property
    def none_at_data(self) -> bool:
        """Whether no s is the data; False on an accelerator."""
        return self.s.is_cpu and not bool((self.s < 0).any())


class GaussianChain:
    """The chain of T betas: the coefficients of any pair of timesteps.

    Args:
        betas: (T,) float64, each in (0, 1); the last may be 1 (zero terminal SNR).

    Attributes:
        betas: as given.
        log_alpha_bar: (T + 1,) float64; the last entry, which is index -1, is 0 for the data.
    """

    def __init__(self, betas: np.ndarray) -> None:
        self.betas = betas
        log_alpha = np.log1p(-betas, where=betas < 1, out=np.full_like(betas, -np.inf))
        self.log_alpha_bar = torch.from_numpy(np.append(np.cumsum(log_alpha), 0.0))
        self._table = Table(self.log_alpha_bar)

    def __len__(self) -> int:
        return len(self.betas)

    def pair(self, t: Timesteps, s: Timesteps) -> StepPair:
        """The coefficients of steps from t to s (s = -1 is the data), looked up on t's device.

        Args:
            t: 0..T-1, an int or an integer tensor of shape (B,).
            s: -1..T-2, the same; below t.

        Raises:
            ValueError: timesteps of another type, out of range, or with s >= t. Timesteps on an
                accelerator are not checked, as that would force a device sync.
        """
        first, last = self._timesteps(t, "t", 0), self._timesteps(s, "s", -1)
        if first.device != last.device:
            device = last.device if first.is_cpu else first.device  # never to the CPU: a sync
            first, last = to_device(first, device), to_device(last, device)
        if first.numel() != last.numel() and 1 not in (first.numel(), last.numel()):
            raise ValueError(
                f"t has {first.numel()} entries and s has {last.numel()}; they must be as many, or one of them single"
            )
        first, last = torch.broadcast_tensors(first, last)
        if first.is_cpu and bool((last >= first).any()):
            worst = int((last - first).argmax())
            raise ValueError(
                f"the pair (t, s) is ({int(first[worst])}, {int(last[worst])}); it must have s < t (s = -1 is the data)"
            )
        return self.unchecked_pair(first, last)

    def unchecked_pair(self, t: torch.Tensor, s: torch.Tensor) -> StepPair:
        """`pair` of timesteps known to be right: int64, both (B,) or (1,), on one device."""
        return StepPair(t, s, self._table[t], self._table[s])

    def _timesteps(self, value: Timesteps, name: str, lowest: int) -> torch.Tensor:
        """An int or an integer tensor as int64 of shape (B,) or (1,), checked if on the CPU."""
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.ndim > 1:
                raise ValueError(
                    f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}; "
                    "timesteps must be an int, or integers of shape (B,)"
                )
            index = value.reshape(-1).long()
            if index.device.type == "mps":  # it has no float64
                index = index.cpu()
        elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            index = torch.tensor([int(value)], device="cpu")
        else:
            raise ValueError(f"{name} is {value!r}; timesteps must be an int, or an integer tensor of shape (B,)")
        if index.is_cpu and index.numel() and not lowest <= int(index.min()) <= int(index.max()) < len(self):
            outside = [i for i in index.tolist() if not lowest <= i < len(self)]
            raise ValueError(f"{name} has timesteps {shorten(outside)}; they must be from {lowest} to {len(self) - 1}")
        return index


def shorten(values: list) -> str:
    """A list for a message, its middle left out where it is long."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
