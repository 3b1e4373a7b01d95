"""Noise schedules by name: the T betas of each, float64. numpy alone, as flags list their names."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


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
