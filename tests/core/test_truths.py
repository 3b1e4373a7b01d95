"""The scheduler against the mathematics: closed forms, printed numbers, identities.

Every expected value is computed here, from the equations, in extended or arbitrary precision; the
library supplies the other side through its public methods alone. What is `printed` comes from
independent computations outside this file.

    alpha_bar_t = prod(1 - beta), alpha_bar_{-1} = 1 (s = -1 is the data)
    SNR = alpha_bar / (1 - alpha_bar)
    for a pair s < t:  a = alpha_bar_t / alpha_bar_s,  b = 1 - a,
    q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, pv),   c_0 = sqrt(alpha_bar_s) b / (1 - alpha_bar_t),
    c_t = sqrt(a) (1 - alpha_bar_s) / (1 - alpha_bar_t),
    pv = (1 - alpha_bar_s) b / (1 - alpha_bar_t)

(Ho et al. 2020, eqs. 4-7, for a step that may skip timesteps.) Below, `ab` is alpha_bar and `om` is
1 - alpha_bar.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddpm_notes_pipeline.core.schedules import BETA_SCHEDULES
from ddpm_notes_pipeline.oracles import CoinDenoiser, GaussianDenoiser
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler, discretized_gaussian_log_likelihood

LN2 = math.log(2)
SCHEDULES = BETA_SCHEDULES
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
many = settings(max_examples=40, deadline=None, derandomize=True)

# ---------------------------------------------------------------------- the independent computation


class Chain:
    """Tables of a schedule, in numpy's extended precision; index -1 is the data."""

    def __init__(self, betas: Any) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.log = np.append(np.cumsum(np.log1p(-self.betas.astype(np.longdouble))), np.longdouble(0))

    def pair(self, t: Any, s: Any) -> Any:
        """The numbers of a pair, float64, each of t's shape."""
        log_t, log_s = self.log[t], self.log[s]
        p = SimpleNamespace(ab_t=np.exp(log_t), ab_s=np.exp(log_s), om_t=-np.expm1(log_t), om_s=-np.expm1(log_s))
        p.a, p.b = np.exp(log_t - log_s), -np.expm1(log_t - log_s)
        p.pv, p.c_0, p.c_t = p.om_s * p.b / p.om_t, np.sqrt(p.ab_s) * p.b / p.om_t, np.sqrt(p.a) * p.om_s / p.om_t
        if np.all(np.asarray(s) >= 0):
            p.snr_difference = p.ab_s / p.om_s - p.ab_t / p.om_t
        return SimpleNamespace(**{name: np.float64(number) for name, number in vars(p).items()})


def betas_of(schedule: str, T: int) -> np.ndarray:
    """The named schedules with their usual ends, float64."""
    u = np.arange(T + 1, dtype=np.longdouble) / T
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, T)
    if schedule == "scaled_linear":
        return np.linspace(1e-4**0.5, 0.02**0.5, T) ** 2
    if schedule == "sigmoid":
        return (0.02 - 1e-4) / (1 + np.exp(-np.linspace(-6, 6, T))) + 1e-4
    if schedule == "log_snr":  # from 10 to -7
        ab = np.append(1, 1 / (1 + np.exp(-np.linspace(np.longdouble(10), np.longdouble(-7), T))))
        return (1 - ab[1:] / ab[:-1]).astype(np.float64)
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        ab = np.cos((u + np.longdouble("0.008")) / np.longdouble("1.008") * np.longdouble(math.pi) / 2) ** 2
    elif schedule != "laplace":
        raise ValueError(f"the formula of {schedule!r} is missing here")
    else:  # Hang et al. 2024, table 1: log SNR = -sgn(1/2 - u) log(1 - 2 |1/2 - u|) / 2, 1e-6 against log 0
        log_snr = -np.sign(0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + np.longdouble("1e-6")) / 2
        ab = np.append(1, 1 / (1 + np.exp(-log_snr[1:])))
    return np.minimum(1 - ab[1:] / ab[:-1], 0.999).astype(np.float64)


def printed(text: str) -> Any:
    """Equal to a printed number, to its last digit."""
    return pytest.approx(float(text), abs=0.5001 * 10.0 ** int(Decimal(text).as_tuple().exponent), rel=0)


def tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x))


def column(numbers: Any, x: Any) -> Any:
    """One number for each sample, shaped to multiply x."""
    return np.reshape(numbers, (-1, *[1] * (x.ndim - 1)))


def total(x: Any) -> Any:
    """Sum over the dims of each sample."""
    return x.reshape(len(x), -1).sum(1)


def close(actual: Any, expected: Any, scale: Any = 0.0, digits: float = 1e-12) -> None:
    """Equal to `digits` of the expected value, or of `scale`, the size of its summands."""
    error = np.abs(np.asarray(actual) - expected)
    assert error.shape == actual.shape  # the expected value may be one for all, not the actual one
    assert (error <= digits * (np.abs(expected) + np.abs(scale))).all(), f"{error.max()}: {actual} is not {expected}"


@dataclass(frozen=True)
class Case:
    """A schedule, a pair of steps for each sample, any x_0, x_t, and a network's guess of x_0."""

    betas: Any
    t: np.ndarray
    s: np.ndarray
    x_0: np.ndarray
    x_t: np.ndarray
    belief: np.ndarray

    def pair(self) -> Any:
        numbers = vars(Chain(self.betas).pair(self.t, self.s))
        return SimpleNamespace(**{name: column(number, self.x_0) for name, number in numbers.items()})

    def scheduler(self, **options: Any) -> DDPMNotesScheduler:
        options = {"prediction_type": "sample", "clip_sample": False, **options}
        return DDPMNotesScheduler(len(self.betas), trained_betas=[float(beta) for beta in self.betas], **options)

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tensor(self.t), tensor(self.s)

    def reverse(self, output: np.ndarray, clip: bool | None = None, **options: Any) -> Any:
        return self.scheduler(**options).reverse_mean_variance(tensor(output), tensor(self.x_t), *self.steps(), clip)

    def kl(self, output: np.ndarray, **options: Any) -> torch.Tensor:
        return self.scheduler(**options).vlb_terms(tensor(output), tensor(self.x_0), tensor(self.x_t), *self.steps())


@st.composite
def cases(draw: Any, lowest_s: int = 0) -> Case:
    schedule = draw(st.sampled_from((*SCHEDULES, "random")))
    if schedule == "random":  # rising: a small beta after much noise is lost in the rounding of log alpha_bar
        betas = np.sort(draw(st.lists(st.floats(1e-4, 0.3), min_size=2, max_size=40)))
    else:
        betas = betas_of(schedule, draw(st.integers(2, 1000)))
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    t = np.array([draw(st.integers(lowest_s + 1, len(betas) - 1)) for _ in range(shape[0])])
    s = np.array([draw(st.integers(lowest_s, int(k) - 1)) for k in t])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Case(betas, t, s, rng.uniform(-1, 1, shape), rng.normal(size=shape), rng.normal(size=shape))


# --------------------------------------------------------------- the forward process, the posterior


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [2, 3, 50, 1000])
def test_named_schedule_is_its_formula(schedule: str, T: int) -> None:
    scheduler, chain = DDPMNotesScheduler(T, beta_schedule=schedule), Chain(betas_of(schedule, T))
    p = chain.pair(np.arange(T), np.arange(T) - 1)
    mean, variance = scheduler.forward_mean_variance(torch.ones(T, 1, dtype=torch.float64), torch.arange(T))
    differences = ("squaredcos_cap_v2", "laplace", "log_snr")
    digits = 1e-10 if schedule in differences else 1e-12  # betas are differences of near-equals
    close(mean[:, 0], np.sqrt(p.ab_t), digits=digits)
    close(variance.flatten(), p.om_t, digits=digits)
    for table, exact in ((scheduler.betas, chain.betas), (scheduler.alphas, p.a), (scheduler.alphas_cumprod, p.ab_t)):
        assert table.dtype == torch.float32
        close(table.double(), exact, digits=2e-7)


@pytest.mark.parametrize("ends", [(10, -7), (8, -5)])
def test_with_log_snr_linear_in_t_algorithm_1_weighs_every_step_of_the_bound_alike(ends: Any) -> None:
    T = 100
    scheduler = DDPMNotesScheduler(T, beta_schedule="log_snr", log_snr_range=ends, prediction_type="epsilon")
    pair = scheduler.chain.pair(torch.arange(T), -1)
    close(pair.snr_t.log(), np.linspace(*ends, T), digits=1e-10)
    x_0, eps, error = (torch.randn(T - 1, 5, dtype=torch.float64) for _ in range(3))
    t = torch.arange(1, T)
    x_t = scheduler.add_noise(x_0, eps, t)
    kl = scheduler.vlb_terms(eps + error, x_0, x_t, t, t - 1, clip=False)
    step = (ends[0] - ends[1]) / (T - 1)
    close(kl, math.expm1(step) / 2 * error.pow(2).sum(1).numpy(), digits=1e-8)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (-7, 10), (math.inf, 0), (1.0,)])
def test_a_log_snr_that_does_not_fall_is_refused(ends: Any) -> None:
    with pytest.raises(ValueError, match="the first above the last"):
        DDPMNotesScheduler(beta_schedule="log_snr", log_snr_range=ends)


@given(cases(lowest_s=-1))
@many
def test_forward_jump_is_its_single_steps_composed(case: Case) -> None:
    """x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) noise, k = s+1..t, is one jump from s to t."""
    scheduler, p = case.scheduler(), case.pair()
    mean_t, variance_t = scheduler.forward_mean_variance(tensor(case.x_0), tensor(case.t))
    for i, (t, s) in enumerate(zip(case.t, case.s, strict=True)):
        x_0, a, b = case.x_0[i : i + 1], p.a[i].item(), p.b[i].item()
        mean_s, variance_s = scheduler.forward_mean_variance(tensor(x_0), int(s)) if s >= 0 else (x_0, 0 * x_0)
        mean, variance = np.asarray(mean_s, dtype=np.longdouble)[0], np.longdouble(variance_s.max().item())
        close(mean_t[i], np.float64(math.sqrt(a) * mean))
        close(variance_t[i], np.float64(a * variance + b))
        for beta in case.betas[s + 1 : t + 1].astype(np.longdouble):
            mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        close(mean_t[i], np.float64(mean))
        close(variance_t[i], np.float64(variance))


@given(cases())
@many
def test_add_noise_and_velocity_are_the_forward_jump(case: Case) -> None:
    p, scheduler, x_0, eps = case.pair(), case.scheduler(), case.x_0, case.belief
    arguments, scale = (tensor(x_0), tensor(eps), tensor(case.t)), np.abs(x_0) + np.abs(eps)
    close(scheduler.add_noise(*arguments), np.sqrt(p.ab_t) * x_0 + np.sqrt(p.om_t) * eps, scale)
    close(scheduler.get_velocity(*arguments), np.sqrt(p.ab_t) * eps - np.sqrt(p.om_t) * x_0, scale)


@pytest.mark.parametrize(("t", "s"), [(1, 0), (20, 3), (500, 400), (500, 0), (999, 998), (999, 10)])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_posterior_is_bayes_rule_on_a_grid(schedule: str, t: int, s: int) -> None:
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0), divided by its sum over x_s."""
    p, x_0 = Chain(betas_of(schedule, 1000)).pair(t, s), -0.3
    x_t, mean_s = math.sqrt(p.ab_t) * x_0 + 0.7 * math.sqrt(p.om_t), math.sqrt(p.ab_s) * x_0
    x_s = mean_s + math.sqrt(p.om_s) * np.linspace(-9, 9, 200_001)
    log_joint = -((x_s - mean_s) ** 2) / (2 * p.om_s) - (x_t - math.sqrt(p.a) * x_s) ** 2 / (2 * p.b)
    density = np.exp(log_joint - log_joint.max())
    density /= density.sum() * (x_s[1] - x_s[0])
    scheduler = DDPMNotesScheduler(trained_betas=betas_of(schedule, 1000).tolist())
    mean, variance = (x.item() for x in scheduler.posterior_mean_variance(tensor([[x_0]]), tensor([[x_t]]), t, s))
    gaussian = np.exp(-((x_s - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    assert np.abs(density - gaussian).max() < 1e-9 * gaussian.max()


@given(cases(lowest_s=-1))
@many
def test_posterior_is_its_closed_form_and_the_data_at_s_minus_one(case: Case) -> None:
    p, data = case.pair(), case.s == -1
    mean, variance = case.scheduler().posterior_mean_variance(tensor(case.x_0), tensor(case.x_t), *case.steps())
    close(mean, p.c_0 * case.x_0 + p.c_t * case.x_t, p.c_0 * np.abs(case.x_0) + p.c_t * np.abs(case.x_t))
    close(variance, p.pv)
    assert (variance.flatten().numpy()[data] == 0).all()
    close(mean.numpy()[data], case.x_0[data])


# --------------------------------------------------------------------------------- the reverse step


@given(cases(lowest_s=-1))
@many
def test_three_parametrisations_of_one_belief_give_one_mean(case: Case) -> None:
    p, x_t = case.pair(), case.x_t
    eps = (x_t - np.sqrt(p.ab_t) * case.belief) / np.sqrt(p.om_t)
    outputs = (eps, case.belief, np.sqrt(p.ab_t) * eps - np.sqrt(p.om_t) * case.belief)
    for prediction_type, output in zip(PREDICTION_TYPES, outputs, strict=True):
        for clip_sample, clip in ((False, None), (True, None), (True, False), (False, True)):
            options = {"prediction_type": prediction_type, "clip_sample": clip_sample}
            x_0 = np.clip(case.belief, -1, 1) if (clip_sample if clip is None else clip) else case.belief
            scale = (np.abs(x_0) + np.abs(x_t) + 1) / np.sqrt(p.ab_t)  # eps and v carry x_0 under that much noise
            close(case.reverse(output, clip, **options)[0], p.c_0 * x_0 + p.c_t * x_t, p.c_0 * scale + np.abs(x_t))
            arguments = (tensor(output), tensor(x_t), tensor(case.t), clip)
            close(case.scheduler(**options).predict_original_sample(*arguments), x_0, scale)
            noise = (x_t - np.sqrt(p.ab_t) * x_0) / np.sqrt(p.om_t)
            close(case.scheduler(**options).predict_noise(*arguments), noise, scale * np.sqrt(p.ab_t / p.om_t))


@given(cases(lowest_s=-1))
@many
def test_mean_in_terms_of_eps_is_the_notes_formula(case: Case) -> None:
    """Figure 13 and Algorithm 2: mean = (x_t - b / sqrt(1 - alpha_bar_t) eps) / sqrt(a)."""
    p, eps = case.pair(), case.belief
    mean = (case.x_t - p.b / np.sqrt(p.om_t) * eps) / np.sqrt(p.a)
    close(case.reverse(eps, prediction_type="epsilon")[0], mean, (np.abs(case.x_t) + np.abs(eps)) / np.sqrt(p.a))


@given(cases(), st.floats(0, 1))
@many
@example(Case(betas_of("linear", 1000), *np.array([[999], [499]]), *np.full((3, 1, 1), 0.5)), 0.0)
def test_eta_gives_the_ddim_step_and_one_is_fixed_small(case: Case, any_eta: float) -> None:
    """Song et al. 2021, eq. 12, eps_hat from the clipped x0_hat; eta = 1 is the posterior."""
    p, x_0 = case.pair(), np.clip(case.belief, -1, 1)
    eps = (case.x_t - np.sqrt(p.ab_t) * x_0) / np.sqrt(p.om_t)
    for eta in (0.0, 1.0, any_eta):
        direction = np.sqrt(p.om_s - eta**2 * p.pv)
        # its rounding: that of 1 - alpha_bar_s - sigma^2, a difference that may leave little
        scale = np.abs(x_0) + np.abs(eps) * (p.om_s / direction if eta else np.sqrt(p.om_s))
        for variance_type in ("fixed_small", "fixed_large"):  # eta stands in the place of the variance type
            mean, variance = case.reverse(case.belief, clip_sample=True, eta=eta, variance_type=variance_type)
            close(mean, np.sqrt(p.ab_s) * x_0 + direction * eps, scale)
            close(variance, eta**2 * p.pv)
            if eta == 1:
                small_mean, small_variance = case.reverse(case.belief, clip_sample=True)
                close(mean, small_mean.numpy(), scale)
                close(variance, small_variance.numpy())


@given(cases(), st.sampled_from(["sample", "v_prediction"]))
@many
def test_zero_terminal_snr_forgets_x_t(case: Case, prediction_type: str) -> None:
    """Prior 0, mean sqrt(alpha_bar_s) x0_hat, variance 1 - alpha_bar_s, KL = SNR_s / 2 error^2."""
    root = np.exp(Chain(case.betas).log[:-1] / 2)  # Lin et al. 2024, algorithm 1
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    ab_s, om_s = (column(np.float64(x[case.s]), case.x_0) for x in (root**2, 1 - root**2))
    case = Case(case.betas, np.full_like(case.t, len(root) - 1), case.s, case.x_0, case.x_t, case.belief)
    options = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    output = case.belief if prediction_type == "sample" else -case.belief
    mean, variance = case.reverse(output, **options)
    digits = 1e-11  # the betas come out of differences of square roots
    close(mean, np.sqrt(ab_s) * case.belief, digits=digits)
    close(variance, om_s, digits=digits)
    assert (case.scheduler(**options).prior_kl(tensor(case.x_0)) == 0).all()
    close(case.kl(output, **options), total(ab_s / om_s / 2 * (case.x_0 - case.belief) ** 2), digits=digits)


def test_zero_terminal_snr_with_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        DDPMNotesScheduler(rescale_betas_zero_snr=True)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal", "learned_range"])
def test_step_is_the_mean_plus_noise_of_the_variance_and_the_mean_alone_at_the_data(variance_type: str) -> None:
    scheduler = DDPMNotesScheduler(variance_type=variance_type, original_sample_mse=[0.1] * 1000)
    x_t, eps, v = tensor(np.random.default_rng(5).normal(size=(3, 1, 100, 2, 50))).float()
    output = torch.cat([eps, v.tanh()], 1) if variance_type == "learned_range" else eps
    for t, s, path in ((699, 30, [699, 30]), (30, 5, [30, 5]), (30, -1, [699, 30]), (0, -1, [9, 0])):
        scheduler.set_timesteps(timesteps=path)
        sample = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(6)).prev_sample
        mean, variance = scheduler.reverse_mean_variance(output.double(), x_t.double(), t, s)
        if s == -1:
            torch.testing.assert_close(sample.double(), mean, rtol=0, atol=2e-6)
        else:
            z = (sample - mean) / variance.sqrt()
            for average, sd in ((z.mean(), 1.0), ((z * x_t).mean(), 1.0), (z.var() - 1, 2**0.5)):
                assert abs(average.item()) < 4 * sd / z.numel() ** 0.5


# ------------------------------------------------------------------------------- terms of the bound

KINDS: dict[
    str, tuple[str, float | None, Callable[..., Any]]
] = {  # type, the network's v, variance; V = error of x0_hat
    "fixed_small is pv": ("fixed_small", None, lambda p, v, V: p.pv),
    "fixed_small_log is pv": ("fixed_small_log", None, lambda p, v, V: p.pv),
    "fixed_large is b": ("fixed_large", None, lambda p, v, V: p.b),
    "fixed_large_log is b": ("fixed_large_log", None, lambda p, v, V: p.b),
    "optimal is pv + c_0^2 V": ("optimal", None, lambda p, v, V: p.pv + p.c_0**2 * V),
    "learned_range at -1 is fixed_small": ("learned_range", -1.0, lambda p, v, V: p.pv),
    "learned_range at 1 is fixed_large": ("learned_range", 1.0, lambda p, v, V: p.b),
    "learned_range goes between in the logarithm, and beyond": (
        *("learned_range", math.nan),
        lambda p, v, V: np.exp((v + 1) / 2 * np.log(p.b) + (1 - v) / 2 * np.log(p.pv)),
    ),
    "learned is the exponential": ("learned", math.nan, lambda p, v, V: np.exp(v)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(cases())
@settings(many, max_examples=20)
def test_variance_is_its_formula_and_the_kl_that_of_two_gaussians_never_negative(kind: str, case: Case) -> None:
    variance_type, fixed, formula = KINDS[kind]
    p, rng = case.pair(), np.random.default_rng(1)
    V, v = rng.uniform(0, 1, len(case.betas)), rng.uniform(-1.5, 1.5, case.x_0.shape)  # v is not clamped
    v = v if fixed is None or math.isnan(fixed) else np.full_like(v, fixed)
    expected = formula(p, v, column(V[case.t], case.x_0))
    options = {"variance_type": variance_type, "original_sample_mse": V.tolist()}
    for belief in (case.belief, case.x_0):  # at a perfect mean the variance alone is left
        output = belief if fixed is None else np.concatenate([belief, v], 1)
        mean, variance = case.reverse(output, **options)
        close(mean, p.c_0 * belief + p.c_t * case.x_t, p.c_0 * np.abs(belief) + p.c_t * np.abs(case.x_t))
        close(variance.log(), np.log(expected), 1 + np.abs(np.log(p.pv)))
        log_ratio = np.broadcast_to(np.log(expected / p.pv), case.x_0.shape)
        pixels = log_ratio + np.expm1(-log_ratio) + (p.c_0 * (case.x_0 - belief)) ** 2 / expected
        kl = case.kl(output, **options)
        close(kl, total(pixels) / 2, total(np.abs(log_ratio) + np.exp(-log_ratio)))
        assert (kl >= 0).all()


@given(cases())
@many
def test_kl_of_fixed_small_is_half_the_snr_difference_times_squared_error(case: Case) -> None:
    close(case.kl(case.belief), total(case.pair().snr_difference / 2 * (case.x_0 - case.belief) ** 2))


@given(cases())
@many
def test_weight_of_squared_eps_error_is_what_algorithm_1_drops(case: Case) -> None:
    """KL = b / (2 a (1 - alpha_bar_s)) times the squared error of eps; "simple" weighs it by 1."""
    p = case.pair()
    weight = p.b / (2 * p.a * p.om_s)
    error = (case.x_t - np.sqrt(p.ab_t) * case.x_0) / np.sqrt(p.om_t) - case.belief
    # x_0 - x0_hat is divided by sqrt(1 - alpha_bar) on the way back to eps, and so is its rounding
    rounding = total(weight * np.abs(error) * (np.abs(case.x_t) + np.abs(case.belief) + 1) / np.sqrt(p.om_t))
    close(case.kl(case.belief, prediction_type="epsilon"), total(weight * error**2), rounding)


@given(cases(), st.floats(0.01, 4))
@many
def test_optimal_variance_has_the_least_expected_kl_on_gaussian_data(case: Case, s2: float) -> None:
    """V_t = s^2 (1 - alpha_bar) / (alpha_bar s^2 + 1 - alpha_bar); the KL is quadratic."""
    chain = Chain(case.betas)
    V = s2 / (np.float64(np.exp(chain.log[:-1]) / -np.expm1(chain.log[:-1])) * s2 + 1)
    p, V_t, nothing = chain.pair(case.t, case.s), V[case.t], np.zeros((len(case.t), 1))
    pixel = Case(
        case.betas, case.t, case.s, np.sqrt(V_t)[:, None], nothing, nothing
    )  # E[KL] is the KL at error sqrt(V)
    kinds = ("fixed_small", "fixed_large", "optimal")
    small, large, best = (pixel.kl(nothing, variance_type=k, original_sample_mse=V.tolist()) for k in kinds)
    close(small, p.snr_difference / 2 * V_t)
    close(best, np.log1p(p.c_0**2 * V_t / p.pv) / 2, 1e-2)
    assert (best <= small * (1 + 1e-12)).all() and (best <= large * (1 + 1e-12) + 1e-15).all()


@given(cases())
@many
def test_prior_kl_is_that_of_two_gaussians(case: Case) -> None:
    p = case.pair()
    pixels = (p.ab_t * case.x_0**2 + p.om_t - 1 - np.log(p.om_t)) / 2
    close(case.scheduler().prior_kl(tensor(case.x_0), tensor(case.t)), total(pixels), case.x_0[0].size * 1e-2)


# -------------------------------------------------------------------------------------- the decoder

LEVELS = np.arange(256) / 127.5 - 1


def exact_log_mass(level: int, mean: Any, std: Any) -> Any:
    """log of the mass of N(mean, std^2) on the level's bin, in 60 digits."""
    with mpmath.workdps(60):
        x, half = mpmath.mpf(level) / mpmath.mpf("127.5") - 1, mpmath.mpf(1) / 255
        lower = -mpmath.inf if level == 0 else (x - half - mean) / mpmath.mpf(std)
        upper = mpmath.inf if level == 255 else (x + half - mean) / mpmath.mpf(std)
        if lower > 0:
            lower, upper = -upper, -lower
        return mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower))


@given(st.floats(-3, 3), st.floats(1e-3, 10))
@settings(many, max_examples=200)
def test_masses_of_the_256_levels_sum_to_one(mean: float, std: float) -> None:
    means, log_variances = torch.full((2, 256), mean, dtype=torch.float64), torch.tensor(2 * math.log(std)).double()
    log_mass = discretized_gaussian_log_likelihood(tensor(LEVELS), means, log_variances)
    assert log_mass.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)


@given(st.integers(0, 255), st.floats(-3, 3), st.floats(1e-3, 10))
@settings(many, max_examples=200)
@example(128, LEVELS[128] + 8 * 0.01, 0.01)
@example(128, LEVELS[128] - 8 * 0.01, 0.01)
@example(0, -1 + 8 * 0.05, 0.05)
@example(255, 1 + 8 * 0.05, 0.05)
@example(255, -1.0, 0.001)
def test_log_mass_is_right_near_and_far_into_the_tails(level: int, mean: float, std: float) -> None:
    log_variance = 2 * math.log(std)
    arguments = (torch.tensor([x], dtype=torch.float64) for x in (LEVELS[level], mean, log_variance))
    log_mass = discretized_gaussian_log_likelihood(*arguments).item()
    exact = float(exact_log_mass(level, mean, mpmath.exp(mpmath.mpf(log_variance) / 2)))
    distance = (abs(LEVELS[level] - mean) + 0.01) / std  # how much the rounding of an edge, in std, counts
    assert log_mass == pytest.approx(exact, rel=1e-12, abs=1e-12 + 1e-15 * distance / std)


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("std", [1e-3, 0.0073845, 0.1, 10.0])
def test_decoder_gradient_is_finite_and_right_at_the_edges_and_in_the_tails(level: int, std: float) -> None:
    means = [-3.0, -1.0, LEVELS[level], 0.3, 1.0, 3.0]
    for dtype in (torch.float32, torch.float64):
        x_0, mean, log_variance = torch.tensor([[LEVELS[level]] * 6, means, [2 * math.log(std)] * 6], dtype=dtype)
        inputs = (mean.requires_grad_(), log_variance.requires_grad_())
        log_mass = discretized_gaussian_log_likelihood(x_0, *inputs)
        by_mean, by_log_variance = torch.autograd.grad(log_mass.sum(), inputs)
        assert all(x.isfinite().all() for x in (log_mass, by_mean, by_log_variance))
    for i, m in enumerate(means):
        slope = mpmath.diff(lambda x: exact_log_mass(level, x, std), mpmath.mpf(m))
        growth = mpmath.diff(lambda x, m=m: exact_log_mass(level, m, mpmath.exp(x / 2)), 2 * mpmath.log(std))
        # torch differentiates log_ndtr as exp(difference of two logarithms of this size)
        rel = 1e-9 + 1e-15 * ((LEVELS[level] - m) / std) ** 2
        assert by_mean[i].item() == pytest.approx(float(slope), rel=rel, abs=1e-9 / std)
        assert by_log_variance[i].item() == pytest.approx(float(growth), rel=rel, abs=1e-9)


@pytest.mark.parametrize(("level", "bits"), [(128, "1.305378"), (3, "1.305378"), (0, "0.509825"), (255, "0.509825")])
def test_perfect_mean_decoder_has_the_printed_bits(level: int, bits: str) -> None:
    x_0 = torch.full((1, 1), LEVELS[level], dtype=torch.float64)
    term = DDPMNotesScheduler(prediction_type="sample").vlb_terms(x_0, x_0, torch.zeros_like(x_0), 0, -1).item() / LN2
    assert term == printed(bits)
    exact = exact_log_mass(level, LEVELS[level], math.sqrt(USUAL.pair(1, 0).pv))
    assert term == pytest.approx(float(-exact) / LN2, rel=1e-11)


MSE = np.linspace(0, 0.5, 1000).tolist()


@pytest.mark.parametrize(
    ("options", "path", "exact"),
    [
        *(
            ({"variance_type": "fixed_small"}, path, above)
            for path, above in (([9, 0], (1, 0)), ([199, 99], (199, 99)))
        ),
        *(
            ({"variance_type": "fixed_large"}, path, above)
            for path, above in (([9, 0], (1, 0)), ([199, 99], (199, 99)))
        ),
        ({"variance_type": "fixed_small"}, [99], (100, 99)),
        ({"variance_type": "optimal", "original_sample_mse": MSE}, [9, 0], 1e-6),
        ({"variance_type": "optimal", "original_sample_mse": MSE}, [199, 99], MSE[99]),
        ({"variance_type": "optimal", "original_sample_mse": MSE, "decoder_variance": {99: 0.02}}, [199, 99], 0.02),
        ({"decoder_variance": 3e-4}, [9, 0], 3e-4),
    ],
)
def test_decoder_variance_follows_the_end_of_the_path(options: dict, path: list[int], exact: Any) -> None:
    """pv(1, 0) at t = 0; the path's last pair where it ends higher; V_t, or a fitted number."""
    scheduler = DDPMNotesScheduler(**options)
    scheduler.set_timesteps(timesteps=path)
    x = torch.zeros(1, 1, dtype=torch.float64)
    exact = USUAL.pair(*exact).pv if isinstance(exact, tuple) else exact
    assert scheduler.reverse_mean_variance(x, x, path[-1], -1)[1].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("v", [-1.0, 0.2, 1.0])
def test_learned_decoder_variance_is_the_networks_own_with_pv_1_0_as_its_floor(v: float) -> None:
    x, output = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[0.0, v]], dtype=torch.float64)
    b, pv = USUAL.pair(0, -1).b, USUAL.pair(1, 0).pv
    for variance_type, exact in (("learned", math.exp(v)), ("learned_range", b ** ((v + 1) / 2) * pv ** ((1 - v) / 2))):
        _, variance = DDPMNotesScheduler(variance_type=variance_type).reverse_mean_variance(output, x, 0, -1)
        assert variance.item() == pytest.approx(exact, rel=1e-12)


# ----------------------------------------------- printed numbers: linear betas 1e-4..0.02, T = 1000

USUAL = Chain(betas_of("linear", 1000))
SIGNAL, NOISE = (np.float64(np.sqrt(x)) for x in (np.exp(USUAL.log[:-1]), -np.expm1(USUAL.log[:-1])))
ALL = np.arange(1000)
S2 = 0.25  # variance of the Gaussian data
ONE = torch.ones(1, 1, dtype=torch.float64)


def normal_grid(reach: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the trapezoid rule for z ~ N(0, 1)."""
    z = np.linspace(-reach, reach, n)
    return z, np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)


def error_of_coin(scale: float = 1.0, clip: bool = False) -> np.ndarray:
    """V_t = E(1 - x0_hat)^2 given x_0 = 1, for all t; x0_hat = tanh(..), or that of `scale` eps."""
    z, weight = normal_grid(10, 2001)  # not the grid that the scheduler's terms are integrated on
    signal, noise = SIGNAL[:, None], NOISE[:, None]
    x_t = signal + noise * z
    x_0 = np.tanh(signal * x_t / noise**2)
    x_0 = x_0 if scale == 1 else (x_t - scale * (x_t - signal * x_0)) / signal
    return ((1 - (np.clip(x_0, -1, 1) if clip else x_0)) ** 2 * weight).sum(1)


V = {"coin": error_of_coin(), "gaussian": S2 * NOISE**2 / (SIGNAL**2 * S2 + NOISE**2)}


def kl_sums(path: Any, mse: np.ndarray) -> dict[str, float]:
    """Expected KL of all pairs of a rising path, bits/dim, of a network whose error is `mse`."""
    p, error = USUAL.pair(path[1:], path[:-1]), mse[path[1:]]
    variances = {"fixed_small": p.pv, "fixed_large": p.b, "optimal": p.pv + p.c_0**2 * error}
    return {k: (np.log(v / p.pv) + (p.pv + p.c_0**2 * error) / v - 1).sum() / (2 * LN2) for k, v in variances.items()}


def terms(
    data: str, scheduler: DDPMNotesScheduler, path: Any, x_0: float = 1.0, scale: float = 1.0, clip: bool | None = None
) -> np.ndarray:
    """The scheduler's expected term of each pair of a rising path, bits/dim: a pixel on a grid."""
    if data == "coin":  # given x_0
        z, weight = normal_grid(8.5, 171)
        x, unet = np.full_like(z, x_0), CoinDenoiser.from_scheduler(scheduler)
    else:  # Gauss-Hermite in x_0 and the noise, exact for the quadratics that these KLs are
        node, weight = np.polynomial.hermite_e.hermegauss(3)
        x, z = (grid.ravel() for grid in np.meshgrid(math.sqrt(S2) * node, node))
        weight, unet = np.outer(weight, weight).ravel() / (2 * math.pi), GaussianDenoiser.from_scheduler(scheduler)
        clip = False
    t, s = (tensor(np.repeat(steps, len(z))) for steps in (path[1:], path[:-1]))
    x, z = (tensor(np.tile(grid, len(path) - 1)).reshape(-1, 1, 1, 1) for grid in (x, z))
    x_t = tensor(column(SIGNAL[t], x)) * x + tensor(column(NOISE[t], x)) * z
    result = scheduler.vlb_terms(unet(x_t, t).sample * scale, x, x_t, t, s, clip=clip).reshape(-1, len(weight))
    return result.numpy() @ weight / LN2


def usual(variance_type: str, mse: Any, **options: Any) -> DDPMNotesScheduler:
    return DDPMNotesScheduler(variance_type=variance_type, original_sample_mse=mse.tolist(), **options)


def test_alpha_bar_T_and_first_posterior_variance() -> None:
    assert DDPMNotesScheduler().forward_mean_variance(ONE, 999)[0].item() ** 2 == printed("4.035830e-05")
    assert DDPMNotesScheduler().alphas_cumprod[-1].item() == printed("4.035830e-05")
    assert DDPMNotesScheduler().posterior_mean_variance(ONE, ONE, 1, 0)[1].item() == printed("5.453188e-05")


@pytest.mark.parametrize(
    ("variance_type", "data", "text"),
    [
        ("fixed_small", "coin", "0.523013"),
        ("fixed_large", "coin", "0.598100"),
        ("optimal", "gaussian", "0.542948"),
        ("optimal", "coin", "0.598077"),
    ],
)
def test_variances_of_the_pair_500_400(variance_type: str, data: str, text: str) -> None:
    assert usual(variance_type, V[data]).reverse_mean_variance(ONE, ONE, 500, 400)[1].item() == printed(text)
    assert DDPMNotesScheduler().posterior_mean_variance(ONE, ONE, 500, 400)[1].item() == printed("0.523013")


EVEN = np.arange(0, 1000, 111)


@pytest.mark.parametrize(
    ("data", "path", "variance_type", "bits"),
    [
        ("coin", ALL, "fixed_small", "1.006812"),
        ("coin", ALL, "fixed_large", "1.487154"),
        ("coin", ALL, "optimal", "1.004909"),
        ("coin", EVEN, "fixed_small", "96.462161"),
        ("coin", EVEN, "fixed_large", "5.893717"),
        ("coin", EVEN, "optimal", "4.902171"),
        ("gaussian", ALL, "fixed_small", "6.302437"),
        ("gaussian", ALL, "fixed_large", "5.645641"),
        ("gaussian", ALL, "optimal", "5.644065"),
    ],
)
def test_kl_sum_is_the_printed_number_and_its_formula(data: str, path: Any, variance_type: str, bits: str) -> None:
    scheduler = usual(variance_type, V[data], timestep_spacing="linspace")
    scheduler.set_timesteps(len(path))
    assert scheduler.timesteps.tolist() == path[::-1].tolist()
    found = terms(data, scheduler, path).sum()
    assert found == printed(bits)
    assert found == pytest.approx(kl_sums(path, V[data])[variance_type], rel=1e-9)
    if data == "coin":
        assert terms(data, scheduler, path, x_0=-1.0).sum() == pytest.approx(found, rel=1e-12)


def test_expected_kl_of_gaussian_data_in_nats_a_dim() -> None:
    assert terms("gaussian", DDPMNotesScheduler(), np.array([400, 500]))[0] * LN2 == printed("0.0190577")
    p = USUAL.pair(ALL[1:], ALL[:-1])
    exact = p.snr_difference / 2 * S2 * p.om_t / (p.ab_t * S2 + p.om_t)
    np.testing.assert_allclose(terms("gaussian", DDPMNotesScheduler(), ALL) * LN2, exact, rtol=1e-9)


@pytest.mark.parametrize("x_0", [-1.0, 1.0])
def test_bound_of_the_coin_is_prior_plus_kls_plus_decoder(x_0: float) -> None:
    scheduler = DDPMNotesScheduler()
    prior = scheduler.prior_kl(x_0 * ONE).item() / LN2
    assert prior == printed("2.911295e-05")
    decoder, *kls = terms("coin", scheduler, np.arange(-1, 1000), x_0=x_0)
    assert decoder == printed("0.509825")
    assert prior + sum(kls) + decoder == printed("1.516666")


def test_coin_on_the_best_path_of_ten() -> None:
    """The cheapest 9 edges from 999 to 0; (t, s) costs log(optimal / posterior variance) / 2."""
    t, s = np.nonzero(ALL[:, None] > ALL)
    p, cost = USUAL.pair(t, s), np.full((1000, 1000), np.inf)
    cost[t, s] = np.log1p(p.c_0**2 * V["coin"][t] / p.pv) / 2
    best, came_from = np.where(ALL == 0, 0.0, np.inf), []
    for _ in range(9):
        came_from.append((cost + best).argmin(1))
        best = (cost + best).min(1)
    path = [999]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    assert terms("coin", usual("optimal", V["coin"]), np.array(path[::-1])).sum() == printed("1.150355")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("K", [10, 100, 1000])
def test_optimal_variance_is_best_for_an_imperfect_network_too(K: int, clip: bool) -> None:
    """eps 2 % too large on the coin: V is that of x0_hat as used; no fixed variance is better."""
    mse, path = error_of_coin(1.02, clip), np.linspace(0, 999, K).round().astype(int)
    found = {kind: terms("coin", usual(kind, mse), path, 1.0, 1.02, clip).sum() for kind in kl_sums(path, mse)}
    assert found == pytest.approx(kl_sums(path, mse), rel=1e-3 if clip else 1e-9)  # clipping has a kink, grids see it
    assert found["optimal"] < min(found["fixed_small"], found["fixed_large"])
    if K == 100:
        assert found["fixed_small"] == printed("1.08")


@pytest.mark.parametrize(("t", "bits"), [(900, "1.949666e-4"), (500, "0.0584216")])
def test_prior_of_black_and_white_pixels(t: int, bits: str) -> None:
    x_0 = tensor(np.where(np.arange(12) % 3, 1.0, -1.0).reshape(1, 3, 2, 2))
    scheduler = DDPMNotesScheduler()
    assert scheduler.prior_kl(x_0, t).item() / (12 * LN2) == printed(bits)
    scheduler.set_timesteps(timesteps=[t, 10, 0])
    assert scheduler.prior_kl(x_0).item() / (12 * LN2) == printed(bits)  # the path's first timestep


def test_prior_of_a_hundred_usual_betas() -> None:
    scheduler = DDPMNotesScheduler(100)
    assert scheduler.forward_mean_variance(ONE, 99)[0].item() ** 2 == printed("0.363563")
    zero, one, half = (scheduler.prior_kl(x * ONE).item() / LN2 for x in (0.0, 1.0, -0.5))
    assert zero == printed("0.063700")
    assert one - zero == printed("0.262255")
    assert half - zero == pytest.approx((one - zero) / 4, rel=1e-12)


# --------------------------------------------------- why noise? samplers on Gaussian data, trailing

SAMPLERS: dict[str, dict[str, Any]] = {
    "small": {"variance_type": "fixed_small"},
    "large": {"variance_type": "fixed_large"},
    "optimal": {"variance_type": "optimal", "original_sample_mse": V["gaussian"].tolist()},
    "ddim": {"eta": 0.0},
}
SAMPLE_VARIANCE = [
    *((10, "small", "0.111206"), (10, "large", "0.243938"), (10, "optimal", "0.171325"), (10, "ddim", "0.136867")),
    *((100, "small", "0.219229"), (100, "large", "0.256767"), (100, "optimal", "0.248116"), (100, "ddim", "0.235659")),
    *(
        (1000, "small", "0.246125"),
        (1000, "large", "0.250752"),
        (1000, "optimal", "0.249900"),
        (1000, "ddim", "0.248498"),
    ),
]


def sampler(kind: str, K: int) -> tuple[DDPMNotesScheduler, Any]:
    scheduler = DDPMNotesScheduler(timestep_spacing="trailing", clip_sample=False, **SAMPLERS[kind])
    scheduler.set_timesteps(K)
    return scheduler, GaussianDenoiser.from_scheduler(scheduler, variance=S2)


def slopes_and_variances(kind: str, K: int) -> tuple[np.ndarray, np.ndarray]:
    """x_s = slope x_t + sqrt(variance) z for each step, from the scheduler at x_t = 0 and 1."""
    scheduler, unet = sampler(kind, K)
    t, s = scheduler.timesteps, torch.cat([scheduler.timesteps[1:], torch.tensor([-1])])
    at = [torch.full((K, 1, 1, 1), x, dtype=torch.float64) for x in (0.0, 1.0)]
    (zero, _), (one, variance) = (scheduler.reverse_mean_variance(unet(x, t).sample, x, t, s) for x in at)
    assert zero.abs().max() < 1e-14
    return one.flatten().numpy(), np.where(s < 0, 0.0, variance.flatten().numpy())  # no noise at the data


@cache
def exact_sample_variance(K: int, kind: str) -> float:
    """The recursion from the equations: x0_hat = gain x_t, eps_hat is what x0_hat leaves of x_t."""
    result = 1.0
    for t, s in pairwise([*(round(1000 - i * 1000 / K) - 1 for i in range(K)), -1]):
        p = USUAL.pair(t, s)
        gain = math.sqrt(p.ab_t) * S2 / (p.ab_t * S2 + p.om_t)
        slope, optimal = p.c_0 * gain + p.c_t, p.pv + p.c_0**2 * V["gaussian"][t]
        if kind == "ddim":
            slope = math.sqrt(p.ab_s) * gain + math.sqrt(p.om_s / p.om_t) * (1 - math.sqrt(p.ab_t) * gain)
        added = {"small": p.pv, "large": p.b, "optimal": optimal, "ddim": 0.0}[kind]
        result = slope**2 * result + (added if s >= 0 else 0.0)
    return result


@pytest.mark.parametrize(("K", "kind", "text"), SAMPLE_VARIANCE)
def test_sample_variance_of_the_scheduler_s_coefficients(K: int, kind: str, text: str) -> None:
    result = 1.0
    for slope, variance in zip(*slopes_and_variances(kind, K), strict=True):
        result = slope**2 * result + variance
    assert result == printed(text)
    assert result == pytest.approx(exact_sample_variance(K, kind), rel=1e-11)


@pytest.mark.parametrize("K", [10, 100])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_sample_variance_of_real_samples(kind: str, K: int) -> None:
    scheduler, unet = sampler(kind, K)
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(64, 1, 32, 32, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    exact = exact_sample_variance(K, kind)
    assert x.double().var().item() == pytest.approx(exact, rel=4 * math.sqrt(2 / x.numel()))
    assert abs(x.mean().item()) < 4 * math.sqrt(exact / x.numel())


@pytest.mark.parametrize("K", [10, 100, 1000])
@pytest.mark.parametrize("kind", ["small", "large", "optimal"])
def test_mean_alone_collapses_at_every_number_of_steps(kind: str, K: int) -> None:
    """z = 0 leaves alpha_bar_T s^4 / (alpha_bar_T s^2 + 1 - alpha_bar_T)^2 of the variance s^2."""
    ab = math.exp(USUAL.log[999])
    collapsed = ab * S2**2 / (ab * S2 + 1 - ab) ** 2
    assert (slopes_and_variances(kind, K)[0] ** 2).prod() == pytest.approx(collapsed, rel=1e-10)
    assert collapsed == printed("2.5e-6")
