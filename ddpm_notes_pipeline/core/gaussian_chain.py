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

import math
from collections.abc import Callable
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
        return StepPair(first, last, self._table[first], self._table[last])

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


def cosine_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """alpha_bar(u) / alpha_bar(0) of arXiv 2102.09672, eq. 17; the two ends are not used."""
    return capped_betas(np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2)


def laplace_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """arXiv 2407.03297, table 1 (mu = 0, b = 0.5): alpha_bar = snr / (1 + snr)."""
    u = np.arange(1, T + 1) / T
    log_snr = -0.5 * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return capped_betas(np.append(1.0, 1 / (1 + np.exp(-log_snr))))


def log_snr_betas(T: int, log_snr_start: float, log_snr_end: float) -> np.ndarray:
    """log(alpha_bar / (1 - alpha_bar)) linear in t, from the first timestep's to the last's.

    With it the bound's weight of the squared eps error is the same at every s >= 0 (fixed_small),
    (exp(step) - 1) / 2: Algorithm 1 minimises the sum of its KLs (arXiv 2107.00630, eq. 13).
    """
    log_alpha_bar = -np.logaddexp(0, -np.linspace(log_snr_start, log_snr_end, T))
    return -np.expm1(np.diff(log_alpha_bar, prepend=0))


def capped_betas(alpha_bar: np.ndarray) -> np.ndarray:
    """The betas of an alpha_bar at 0..T, at most 0.999."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


# name -> (T, its two ends) -> betas, float64
SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "scaled_linear": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": lambda T, start, end: (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))) + start,
    "laplace": laplace_betas,
    "log_snr": log_snr_betas,
}
BETA_SCHEDULES = tuple(SCHEDULES)
LOG_SNR_RANGE = (10.0, -7.0)  # noise of 0.86 levels at the start, a prior of 7e-4 bits/dim at most


def make_betas(
    T: int,
    beta_start: float,
    beta_end: float,
    schedule: str,
    trained_betas: Any = None,
    log_snr_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """The T betas of a named schedule (or your own, checked), float64.

    Args:
        T: number of timesteps.
        beta_start, beta_end: ends of "linear", "scaled_linear" and "sigmoid".
        schedule: one of `BETA_SCHEDULES`.
        trained_betas: (T,) betas in the place of a schedule.
        log_snr_range: ends of "log_snr", the first above the last; None is `LOG_SNR_RANGE`.

    Raises:
        ValueError: a beta outside (0, 1) (the last may be 1), a wrong number of them, an unknown
            schedule, a log SNR that does not fall.
    """
    ends = (beta_start, beta_end)
    if schedule == "log_snr":
        given = list(log_snr_range or LOG_SNR_RANGE)
        if len(given) != 2 or not all(map(math.isfinite, given)) or given[0] <= given[1]:
            raise ValueError(f"log_snr_range is {given}; it must be two finite numbers, the first above the last")
        ends = (given[0], given[1])
    if trained_betas is not None:
        betas = np.asarray(trained_betas, dtype=np.float64)
        if betas.shape != (T,):
            raise ValueError(f"trained_betas has shape {betas.shape}; it must be ({T},), as num_train_timesteps says")
    elif schedule in SCHEDULES:
        betas = SCHEDULES[schedule](T, *ends)
    else:
        raise ValueError(f"beta_schedule is {schedule!r}; it must be one of {', '.join(BETA_SCHEDULES)}")
    wrong = ~((betas > 0) & (betas < 1))
    wrong[-1] &= betas[-1] != 1
    if wrong.any():
        source = f"beta_start {beta_start}, beta_end {beta_end}: schedule {schedule!r}"
        where = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{source if trained_betas is None else 'trained_betas'} has beta {betas[where]} at timestep {where}; "
            "it must be above 0 and below 1 (the last one may be 1)"
        )
    return betas


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose sqrt(alpha_bar) is shifted and scaled to start as before and end at exactly 0.

    arXiv 2305.08891, algorithm 1.

    Raises:
        ValueError: a single beta.
    """
    signal = np.exp(0.5 * np.cumsum(np.log1p(-betas[:-1] if betas[-1] == 1 else -betas)))
    signal = np.append(signal, 0.0) if betas[-1] == 1 else signal
    if len(signal) == 1:
        raise ValueError("rescale_betas_zero_snr is True with num_train_timesteps 1; it must be at least 2")
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alpha_bar = signal**2
    return np.append(betas[0], 1 - alpha_bar[1:] / alpha_bar[:-1])


def shorten(values: list) -> str:
    """A list for a message, its middle left out where it is long."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
