"""The scheduler is `diffusers.DDPMScheduler` where that one is right, and right where it is not.

What is right is decided by `Reference`, a float64 computation from the equations that shares no
code with the scheduler. Where stock is wrong it is not compared; each of these has a test below
that is named after the symptom:

- the last step of a path that ends above t = 0: stock adds noise to the final image;
- trailing spacing with 61 and other numbers of steps: stock appends a timestep -1;
- beta_schedule "laplace": stock takes sqrt(alpha_bar) for alpha_bar;
- "fixed_large_log" and "learned": stock takes the square root of a log variance, NaN where that is
  negative;
- "learned_range" at s = -1: stock's lowest log variance is -46 there (its `step` never uses it);
- add_noise and get_velocity in bf16 and fp16: stock rounds alpha_bar before it takes 1 - alpha_bar.

The identities and closed-form truths are in test_truths.py.
"""

import contextlib
import copy
import json
import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import DummyObject

from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler, DDPMNotesSchedulerOutput
from tests.support.devices import DEVICE
from tests.support.no_sync import META, HostSync, no_sync

SHAPE = (2, 3, 4, 4)
DTYPES = [torch.bfloat16, torch.float16]
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the largest relative error of one rounding
NAN = float("nan")
MSE = np.geomspace(1e-5, 0.3, 1000).tolist()
OPTIMAL = {"variance_type": "optimal", "original_sample_mse": MSE}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, shape: tuple = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=gen(seed)).to(DEVICE, dtype)


def images(seed: int, shape: tuple = SHAPE) -> torch.Tensor:
    return (torch.rand(shape, generator=gen(seed)) * 2 - 1).to(DEVICE)


def array(x: torch.Tensor) -> np.ndarray:
    """float64."""
    return x.double().cpu().numpy()


def rms(got: torch.Tensor, expected) -> float:
    """||got - expected|| / ||expected||."""
    got, expected = got.double().cpu(), torch.as_tensor(expected).double().cpu()
    return ((got - expected).norm() / expected.norm()).item()


def like_stock(got: torch.Tensor, stock: torch.Tensor) -> bool:
    """Within the error of stock's float32 tables: up to 4e-4 of a posterior variance."""
    return rms(got, stock) < 1e-4 and (got - stock).abs().max() < 5e-4 * stock.abs().max()


class Reference:
    """Algorithm 2 in float64 numpy, from the equations, with products for alpha_bar."""

    def __init__(self, T=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", trained_betas=None, **config):
        self.config, i = config, np.arange(T)
        if trained_betas is not None:
            betas = np.array(trained_betas)
        elif beta_schedule == "linear":
            betas = beta_start + (beta_end - beta_start) * i / (T - 1)
        elif beta_schedule == "scaled_linear":
            betas = (beta_start**0.5 + (beta_end**0.5 - beta_start**0.5) * i / (T - 1)) ** 2
        elif beta_schedule == "sigmoid":
            betas = beta_start + (beta_end - beta_start) / (1 + np.exp(6 - 12 * i / (T - 1)))
        else:
            curve = [np.cos((u / T + 0.008) / 1.008 * np.pi / 2) ** 2 for u in range(T + 1)]
            betas = np.array([min(1 - curve[u + 1] / curve[u], 0.999) for u in range(T)])
        root = np.sqrt(np.cumprod(1 - betas))
        if config.get("rescale_betas_zero_snr"):
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.alpha_bar = np.append(root**2, 1.0)  # [-1] is the data

    def target(self, x_0, eps, t):
        """What the network of this prediction type is trained to return."""
        signal, noise = np.sqrt(self.alpha_bar[t]), np.sqrt(1 - self.alpha_bar[t])
        kind = self.config.get("prediction_type", "epsilon")
        return {"epsilon": eps, "sample": x_0, "v_prediction": signal * eps - noise * x_0}[kind]

    def add_noise(self, x_0, eps, t):
        return np.sqrt(self.alpha_bar[t]) * array(x_0) + np.sqrt(1 - self.alpha_bar[t]) * array(eps)

    def step(self, output, t, s, x_t, z):
        """x_s and x0_hat."""
        output, x_t, z = array(output), array(x_t), array(z)
        config, kind = self.config, self.config.get("prediction_type", "epsilon")
        abar_t, abar_s = self.alpha_bar[t], self.alpha_bar[s]
        output, v = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        if kind == "epsilon":
            x_0 = (x_t - np.sqrt(1 - abar_t) * output) / np.sqrt(abar_t)
        else:
            x_0 = output if kind == "sample" else np.sqrt(abar_t) * x_t - np.sqrt(1 - abar_t) * output
        if config.get("thresholding"):
            limit = np.quantile(
                np.abs(x_0), config.get("dynamic_thresholding_ratio", 0.995), axis=(1, 2, 3), keepdims=True
            )
            limit = np.minimum(np.maximum(limit, 1), config.get("sample_max_value", 1.0))
            x_0 = np.clip(x_0, -limit, limit) / limit
        elif config.get("clip_sample", True):
            x_0 = np.clip(x_0, -config.get("clip_sample_range", 1.0), config.get("clip_sample_range", 1.0))
        b = 1 - abar_t / abar_s
        mean = np.sqrt(abar_s) * b / (1 - abar_t) * x_0 + np.sqrt(1 - b) * (1 - abar_s) / (1 - abar_t) * x_t
        if s == -1:
            return mean, x_0
        posterior, variance_type = (1 - abar_s) / (1 - abar_t) * b, config.get("variance_type", "fixed_small")
        if variance_type == "learned_range":
            variance = b ** ((v + 1) / 2) * posterior ** ((1 - v) / 2)
        elif variance_type == "learned":
            variance = np.exp(v)
        elif variance_type == "optimal":
            variance = posterior + abar_s * (b / (1 - abar_t)) ** 2 * config["original_sample_mse"][t]
        else:
            variance = b if "large" in variance_type else posterior
        return mean + np.sqrt(variance) * z, x_0


def network_output(reference: Reference, t: int, shape: tuple = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and an imperfect network's output, with a variance half where the type has one."""
    seed = 10 * t
    x_0, eps = images(seed, shape), randn(seed + 1, shape)
    x_t = torch.from_numpy(reference.add_noise(x_0, eps, t)).float().to(DEVICE)
    output = (reference.target(x_0, eps, t) + 0.3 * randn(seed + 2, shape)).float()
    if reference.config.get("variance_type") in ("learned", "learned_range"):
        output = torch.cat([output, images(seed + 3, shape)], dim=1)
    return x_t, output


# ------------------------------------------------------------------------------------ a drop-in

SAME_AS_STOCK = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained_betas": {"trained_betas": ...},
    "zero_snr_v": ZERO_SNR,
    "zero_snr_sample": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    "zero_snr_cosine": {**ZERO_SNR, "beta_schedule": "squaredcos_cap_v2"},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "unclipped": {"clip_sample": False},
    "clip_2": {"clip_sample_range": 2.0},
    "thresholding": {"thresholding": True},
    "thresholding_3": {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9},
    "fixed_small_log": {"variance_type": "fixed_small_log"},
    "fixed_large": {"variance_type": "fixed_large", "prediction_type": "v_prediction"},
    "learned_range": {"variance_type": "learned_range", "clip_sample": False},
}
RIGHT_WHERE_STOCK_IS_NOT = {
    "fixed_large_log": {"variance_type": "fixed_large_log"},
    "learned": {"variance_type": "learned"},
    "optimal": {"variance_type": "optimal", "original_sample_mse": ...},
}


def settings(case: str, T: int) -> dict:
    config = {**SAME_AS_STOCK, **RIGHT_WHERE_STOCK_IS_NOT}[case]
    tables = {"trained_betas": np.geomspace(1e-4, 0.05, T), "original_sample_mse": np.geomspace(1e-5, 0.3, T)}
    return {name: tables[name].tolist() if value is ... else value for name, value in config.items()}


@pytest.mark.parametrize("T", [10, 100, 1000])
@pytest.mark.parametrize("case", [*SAME_AS_STOCK, *RIGHT_WHERE_STOCK_IS_NOT])
def test_steps_agree_with_stock_and_with_float64(case, T):
    config, compare = settings(case, T), case in SAME_AS_STOCK
    reference = Reference(T, **config)
    for spacing, offset in (("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)):
        ours = DDPMNotesScheduler(T, timestep_spacing=spacing, steps_offset=offset, **config)
        stock = DDPMScheduler(T, timestep_spacing=spacing, steps_offset=offset, **config) if compare else None
        if stock is not None:  # its own tables are float32: on some processors a beta is off by 1e-3
            stock.alphas_cumprod = torch.from_numpy(reference.alpha_bar[:-1])
        paths = [{"num_inference_steps": n} for n in (1, 7, 50, T) if n <= T - offset]
        paths += [{"timesteps": [T - 1, T // 2, 3, 2]}, {"timesteps": [T - 2, 0]}] if spacing == "leading" else []
        for path in paths:
            ours.set_timesteps(**path)
            if compare:
                stock.set_timesteps(**path)
                assert torch.equal(ours.timesteps, stock.timesteps)
            for i in np.unique(np.linspace(0, len(ours.timesteps) - 1, 8).astype(int)):
                t = ours.timesteps[i]
                s = ours.previous_timestep(t)
                where = f"{spacing} {path} t={int(t)}"
                x_t, output = network_output(reference, int(t))
                got = ours.step(output, t, x_t, generator=gen(7))
                x_s, x_0 = reference.step(output, int(t), s, x_t, randn(7))
                # x0_hat = (x_t - noise eps) / signal: float32 has fewer digits left at a small
                # signal
                signal = reference.alpha_bar[t] ** 0.5 if ours.config.prediction_type == "epsilon" else 1
                digits = 1e-6 * max(1, 0.02 / signal)
                assert rms(got.prev_sample, x_s) < digits and rms(got.pred_original_sample, x_0) < digits, where

                mean, variance = ours.reverse_mean_variance(output.double(), x_t.double(), int(t), s)
                z = 0 if s == -1 else randn(7).double()
                assert rms(mean + variance.sqrt() * z, x_s) < 1e-10, where
                if not compare:
                    continue
                want = stock.step(output, t, x_t, generator=gen(7))
                assert s == stock.previous_timestep(t)
                assert rms(got.pred_original_sample, want.pred_original_sample) < 2 * digits, where
                if s >= 0 or t == 0:  # the rest is stock's noise in the final image
                    assert rms(got.prev_sample, want.prev_sample) < 2 * digits, where


@pytest.mark.parametrize("T", [10, 100, 1000])
@pytest.mark.parametrize("case", ["linear", "scaled_linear", "cosine", "sigmoid", "trained_betas", "zero_snr_v"])
def test_forward_process_agrees_with_stock_and_with_float64(case, T):
    config = settings(case, T)
    ours, stock, reference = DDPMNotesScheduler(T, **config), DDPMScheduler(T, **config), Reference(T, **config)
    for name in ("betas", "alphas", "alphas_cumprod"):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and rms(mine, theirs) < 1e-5
    np.testing.assert_allclose(ours.alphas_cumprod.numpy(), reference.alpha_bar[:-1], rtol=1e-6, atol=0)

    t = torch.linspace(0, T - 1, 20).long()
    x_0, eps, shaped = images(0, (20, 3, 4, 4)), randn(1, (20, 3, 4, 4)), t.numpy().reshape(-1, 1, 1, 1)
    x_t, v = ours.add_noise(x_0, eps, t), ours.get_velocity(x_0, eps, t)
    reference.config["prediction_type"] = "v_prediction"
    v_64 = reference.target(array(x_0), array(eps), shaped)
    for got, exact, want in (
        (x_t, reference.add_noise(x_0, eps, shaped), stock.add_noise(x_0, eps, t)),
        (v, v_64, stock.get_velocity(x_0, eps, t)),
    ):
        assert rms(got, exact) < 1e-6 and like_stock(got, want)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", ["linear", "v_prediction", "zero_snr_v", "sample"])
def test_eta_is_that_of_the_ddim_scheduler(eta, case):
    config = settings(case, 1000)
    ours, ddim, reference = DDPMNotesScheduler(eta=eta, **config), DDIMScheduler(**config), Reference(**config)
    ours.set_timesteps(20), ddim.set_timesteps(20)
    for t in ours.timesteps:
        x_t, output = network_output(reference, int(t))
        got = ours.step(output, t, x_t, generator=gen(7)).prev_sample
        noise = randn(7) if t > 0 else torch.zeros(SHAPE, device=DEVICE)  # DDIM's pv(0, -1) is 0
        want = ddim.step(output, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
        assert like_stock(got, want)


@pytest.mark.parametrize("n", [None, 7])
def test_surface_of_the_stock_scheduler(n):
    ours, stock = DDPMNotesScheduler(), DDPMScheduler()
    if n:
        ours.set_timesteps(n, "cpu"), stock.set_timesteps(n, "cpu")
    assert torch.equal(ours.timesteps, stock.timesteps) and ours.timesteps.dtype == stock.timesteps.dtype
    for t in [*ours.timesteps.tolist(), *ours.timesteps]:
        assert ours.previous_timestep(t) == stock.previous_timestep(t)
    for name in ("init_noise_sigma", "order", "num_inference_steps", "custom_timesteps", "variance_type"):
        assert getattr(ours, name) == getattr(stock, name)
    assert len(ours) == len(stock) == 1000
    assert {c.__name__ for c in ours.compatibles} == {c.__name__ for c in stock.compatibles}
    x_t = randn(0)
    assert ours.scale_model_input(x_t, 5) is x_t
    assert as_dict(ours.config) == as_dict(stock.config)


def as_dict(config) -> dict:
    """A config without our private entry; the names of defaults, listed in any order, as a set."""
    values = {name: value for name, value in config.items() if name != "_ddpm_notes"}
    return values | {name: set(values[name]) for name in ["_use_default_values"] if name in values}


def test_the_previous_timestep_is_a_tensor_where_the_stock_one_is():
    """A 0-d int64 tensor; before `set_timesteps` t - 1, of whatever type t has."""
    ours, stock = DDPMNotesScheduler(), DDPMScheduler()
    forms = [999, torch.tensor(999), torch.tensor([999]), torch.tensor(999, dtype=torch.int32), np.int64(999), 0]
    paths = [None, {"num_inference_steps": 7}, {"timesteps": [999, 500, 3]}, {"num_inference_steps": 1000}]
    for path in paths:
        if path is not None:
            ours.set_timesteps(**path), stock.set_timesteps(**path)
            forms = [form for t in ours.timesteps for form in (t, int(t), t[None], t.int())]
        for t in forms:
            got, want = ours.previous_timestep(t), stock.previous_timestep(t)
            assert type(got) is type(want) and got == want, (path, t)
            if isinstance(want, torch.Tensor):
                assert (got.dtype, got.shape, got.device) == (want.dtype, want.shape, want.device), (path, t)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"num_train_timesteps": 50},
        {"beta_start": 0.0002, "variance_type": "fixed_large"},
        {"_class_name": "DDIMScheduler", "num_train_timesteps": 50, "set_alpha_to_one": True},
        "stock",
        "optimal",
    ],
    ids=str,
)
def test_a_config_names_the_same_settings_as_left_at_their_defaults_as_the_stock_one(saved, tmp_path):
    if isinstance(saved, str):
        scheduler = DDPMScheduler() if saved == "stock" else DDPMNotesScheduler(**OPTIMAL)
        saved = json.loads(scheduler.to_json_string())
    saved = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.42.1"} | saved
    (tmp_path / "scheduler_config.json").write_text(json.dumps(saved))
    for load in (
        lambda cls: cls.from_pretrained(tmp_path),
        lambda cls: cls.from_config(dict(saved)),
        lambda cls: cls.from_config(DDPMScheduler.from_pretrained(tmp_path).config),
        lambda cls: cls.from_config(DDPMNotesScheduler.from_pretrained(tmp_path).config),
    ):
        assert as_dict(load(DDPMNotesScheduler).config) == as_dict(load(DDPMScheduler).config)


def test_step_takes_every_form_of_a_timestep_and_leaves_its_inputs_alone():
    scheduler = DDPMNotesScheduler()
    scheduler.set_timesteps(10)
    x_t, output = randn(0), randn(1)
    kept = x_t.clone(), output.clone()
    forms = [900, torch.tensor(900), scheduler.timesteps[0], next(iter(scheduler.timesteps)), torch.tensor([900])]
    steps = [scheduler.step(output, t, x_t, generator=gen(0)) for t in forms]
    assert isinstance(steps[0], DDPMNotesSchedulerOutput)
    assert all(torch.equal(step.prev_sample, steps[0].prev_sample) for step in steps)
    assert torch.equal(x_t, kept[0]) and torch.equal(output, kept[1])
    pair = scheduler.step(output, 900, x_t, generator=gen(0), return_dict=False)
    assert type(pair) is tuple and len(pair) == 2
    assert torch.equal(pair[0], steps[0].prev_sample) and torch.equal(pair[1], steps[0].pred_original_sample)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 4), (2, 3, 2, 4, 4), (2, 3)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_step_takes_sequences_images_and_videos(shape, variance_type):
    scheduler, reference = DDPMNotesScheduler(variance_type=variance_type), Reference(variance_type=variance_type)
    x_t, output = network_output(reference, 400, shape)
    got = scheduler.step(output, 400, x_t, generator=gen(7)).prev_sample
    assert rms(got, reference.step(output, 400, 399, x_t, randn(7, shape))[0]) < 1e-6


def test_step_draws_from_one_generator_one_an_image_or_the_global_one():
    scheduler, stock, x_t, output = DDPMNotesScheduler(), DDPMScheduler(), randn(0), randn(1)
    listed = scheduler.step(output, 900, x_t, generator=[gen(3), gen(4)]).prev_sample
    alone = [scheduler.step(output[i : i + 1], 900, x_t[i : i + 1], generator=gen(3 + i)).prev_sample for i in (0, 1)]
    assert torch.equal(listed, torch.cat(alone))
    assert rms(listed, stock.step(output, 900, x_t, generator=[gen(3), gen(4)]).prev_sample) < 1e-4
    torch.manual_seed(5)
    got = scheduler.step(output, 900, x_t).prev_sample
    torch.manual_seed(5)
    assert rms(got, stock.step(output, 900, x_t).prev_sample) < 1e-4


@pytest.mark.parametrize(
    "config", [{}, {"variance_type": "learned_range", "eta": 0.5}, OPTIMAL], ids=["", "eta", "optimal"]
)
def test_a_variance_half_that_is_not_used_changes_nothing(config):
    scheduler = DDPMNotesScheduler(**config)
    plain = DDPMNotesScheduler(eta=0.5) if "eta" in config else scheduler
    x_t, output = randn(0), randn(1)
    doubled = torch.cat([output, randn(2)], dim=1)
    for t in (500, 0):
        got = scheduler.step(doubled, t, x_t, generator=gen(3)).prev_sample
        assert torch.equal(got, plain.step(output, t, x_t, generator=gen(3)).prev_sample)
        assert torch.equal(scheduler.predict_noise(doubled, x_t, t), plain.predict_noise(output, x_t, t))
        means = [s.reverse_mean_variance(o, x_t, t, t - 1) for s, o in ((scheduler, doubled), (plain, output))]
        assert all(torch.equal(*both) for both in zip(*means))
        if "eta" not in config:
            x_0 = (images(4) * 127.5 + 127.5).round() / 127.5 - 1
            terms = [scheduler.vlb_terms(o, x_0, x_t, t, t - 1) for o in (doubled, output)]
            assert torch.equal(*terms) and terms[0].shape == (2,)


LEVELS = {
    "weights": [[1.0] * 128 + [0.0] * 128] * 3,
    "decoder_blur": {0: 1e-3, 999: 1e-2},
    "guess_blur": {0: 1e-3, 900: 0.1},
    "decoder_scale": 1.5,
}


WITH_LEVELS = {
    f"{case} with levels": case for case in ("linear", "learned", "learned_range", "optimal", "v_prediction")
}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("case", [*SAME_AS_STOCK, *RIGHT_WHERE_STOCK_IS_NOT, "eta", *WITH_LEVELS])
def test_no_call_waits_for_the_device(case, where):
    """With timesteps on the CPU, which are checked there, and on the device, which are not."""
    config = {"eta": 0.5} if case == "eta" else settings(WITH_LEVELS.get(case, case), 1000)
    scheduler = DDPMNotesScheduler(levels=LEVELS if case in WITH_LEVELS else None, **config)
    scheduler.set_timesteps(3, device=where)
    channels = 6 if case.startswith("learned") else 3
    x_t, output = torch.empty(SHAPE, device=META), torch.empty(2, channels, 4, 4, device=META)
    steps = torch.tensor([900, 5], device=where)
    pairs = [(torch.tensor([901, 6]), torch.tensor(s, device=where)) for s in ([900, 5], [900, -1], [-1, -1])]
    with no_sync():
        for t in scheduler.timesteps:
            result = scheduler.step(output, t, x_t)
            assert result.prev_sample.device == result.pred_original_sample.device == META
            assert result.prev_sample.shape == SHAPE and result.prev_sample.dtype == torch.float32
            assert scheduler.previous_timestep(t).device.type == where
        assert scheduler.previous_timestep(333).device.type == where
        scheduler.add_noise(x_t, x_t, steps), scheduler.get_velocity(x_t, x_t, steps)
        scheduler.prior_kl(x_t), scheduler.prior_kl(x_t, steps)
        scheduler.forward_mean_variance(x_t, steps), scheduler.posterior_mean_variance(x_t, x_t, steps, steps - 1)
        for clip in (True, False):
            scheduler.predict_noise(output, x_t, steps, clip)
        for t, s in pairs:
            scheduler.reverse_mean_variance(output, x_t, t, s)
            if case != "eta":
                terms = scheduler.vlb_terms(output, x_t, x_t, t, s)
                assert terms.shape == (2,) and terms.device == META


@pytest.mark.parametrize("method", ["add_noise", "get_velocity", "predict_noise", "prior_kl"])
def test_timesteps_of_another_device_are_read_once_they_have_arrived(method):
    """A copy to the CPU that is not waited for holds whatever was in that memory."""
    scheduler, t, x = DDPMNotesScheduler(), torch.tensor([900, 5], device=META), randn(0).cpu()
    images = [x] if method == "prior_kl" else [x, x]
    with no_sync(), pytest.raises(HostSync, match="waits for its values"):
        getattr(scheduler, method)(*images, t)


def test_the_default_device_of_torch_changes_no_number():
    """A scheduler made and used where new tensors go to another device by default."""
    config = {"variance_type": "learned_range", "levels": LEVELS}
    x_0, x_t, output = images(0), randn(1), torch.cat([randn(2), images(3)], dim=1)

    def everything() -> list[torch.Tensor]:
        scheduler = DDPMNotesScheduler(**config)
        scheduler.set_timesteps(7)
        results = [scheduler.timesteps, scheduler.prior_kl(x_0)]
        for t in scheduler.timesteps:
            s = scheduler.previous_timestep(t)
            results += [scheduler.add_noise(x_0, x_t, int(t)), scheduler.vlb_terms(output, x_0, x_t, t, s)]
            results += scheduler.step(output, t, x_t, generator=gen(4), return_dict=False)
        return results

    expected = everything()
    with META:
        found = everything()
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_timesteps_on_the_device_give_the_steps_of_timesteps_on_the_cpu(monkeypatch):
    """The look-ups of an accelerator, on the CPU: `is_cpu` is what tells the two apart."""
    scheduler = DDPMNotesScheduler(variance_type="learned_range")
    scheduler.set_timesteps(7)
    x_0, x_t, output = images(0), randn(0), torch.cat([randn(1), images(2)], dim=1)

    def everything():
        found = []
        for t in scheduler.timesteps:
            s = scheduler.previous_timestep(t)
            found += [scheduler.step(output, t, x_t, generator=gen(3)).prev_sample]
            found += [*scheduler.reverse_mean_variance(output, x_t, t, s), scheduler.vlb_terms(output, x_0, x_t, t, s)]
        return found

    expected = everything()
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    for value, right in zip(everything(), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0)


# ----------------------------------------------------------------------- stock's defects stay fixed


@pytest.mark.parametrize("T", [10, 100, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_steps_gives_that_many_falling_timesteps_in_range(T, spacing):
    # stock: trailing appends -1 for 61 and 61 other numbers up to 1000, and its loop then saturates
    # the images
    ours, stock = DDPMNotesScheduler(T, timestep_spacing=spacing), DDPMScheduler(T, timestep_spacing=spacing)
    for n in range(T, 0, -1 if spacing == "trailing" or T < 1000 else -13):
        ours.set_timesteps(n), stock.set_timesteps(n)
        path = ours.timesteps.tolist()
        assert len(path) == n and min(path) >= 0 and max(path) < T and path == sorted(set(path), reverse=True), n
        assert path == [t for t in stock.timesteps.tolist() if t >= 0], n


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_log_variances_do_not_give_nan(variance_type):
    # stock: sqrt(log variance) is NaN, always (fixed_large_log) or for every negative output
    # (learned)
    scheduler = DDPMNotesScheduler(variance_type=variance_type)
    log_variance = 2 * images(4) - 2 if variance_type == "learned" else torch.empty(2, 0, 4, 4, device=DEVICE)
    for t in scheduler.timesteps[::37]:
        assert scheduler.step(torch.cat([randn(0), log_variance], dim=1), t, randn(1)).prev_sample.isfinite().all()


def test_learned_range_at_the_decoder_starts_from_the_floor_of_the_papers():
    # stock: log variance -46 (a variance of 1e-20) at t = 0; improved-diffusion: log pv(1, 0) =
    # -9.8
    scheduler = DDPMNotesScheduler(variance_type="learned_range")
    x_t, v = randn(0), torch.full(SHAPE, -1.0, device=DEVICE)
    low = scheduler.reverse_mean_variance(torch.cat([randn(1), v], dim=1), x_t, 0, -1)[1]
    high = scheduler.reverse_mean_variance(torch.cat([randn(1), -v], dim=1), x_t, 0, -1)[1]
    torch.testing.assert_close(low, torch.full(SHAPE, 5.453188e-05, device=DEVICE), rtol=1e-6, atol=0)
    torch.testing.assert_close(high, torch.full(SHAPE, 1e-4, device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_noise_is_added_in_half_precision(beta_schedule, dtype):
    # stock: 1 - alpha_bar is 0 in bf16 at 10 / 16 / 21 / 12 timesteps, and the image comes back
    # without any noise
    scheduler, reference = DDPMNotesScheduler(beta_schedule=beta_schedule), Reference(beta_schedule=beta_schedule)
    shape = (1, 1, 64, 64)
    x_0, eps = images(0, shape).to(dtype), randn(1, shape, dtype)
    for t in [*range(60), *range(60, 1000, 50)]:
        index = torch.tensor([t])
        x_t, v = scheduler.add_noise(x_0, eps, index), scheduler.get_velocity(x_0, eps, index)
        assert x_t.dtype == v.dtype == dtype
        exact = torch.from_numpy(reference.add_noise(x_0, eps, t)).to(DEVICE)
        rounding = HALF_ULP[dtype] * exact.abs() * (1 + 1e-4) + 1e-7
        assert ((x_t.double() - exact).abs() <= rounding).all(), t
        # what was added to the image has the standard deviation asked for
        std = (1 - reference.alpha_bar[t]) ** 0.5
        added = x_t.double() - reference.alpha_bar[t] ** 0.5 * x_0.double()
        assert abs(added.std().item() - std * eps.double().std().item()) < rounding.square().mean().sqrt().item(), t
        exact_v = reference.alpha_bar[t] ** 0.5 * eps.double() - std * x_0.double()
        assert ((v.double() - exact_v).abs() <= HALF_ULP[dtype] * exact_v.abs() * (1 + 1e-4) + 1e-7).all(), t


@pytest.mark.parametrize("T", [10, 100, 1000])
def test_laplace_schedule_is_snr_over_one_plus_snr(T):
    # stock: the square root of it, so that alpha_bar ends at 0.0316 and a tenth of the image is
    # left in x_T
    got = DDPMNotesScheduler(T, beta_schedule="laplace").alphas_cumprod.double().numpy()
    for i, alpha_bar in enumerate(got):
        distance = 0.5 - (i + 1) / T
        snr = np.exp(-0.5 * np.copysign(1, distance) * np.log(1 - 2 * abs(distance) + 1e-6))
        np.testing.assert_allclose(alpha_bar, snr / (1 + snr), rtol=2e-6)
    np.testing.assert_allclose(got[-1], 1e-3 / 1.001, rtol=1e-5)


@pytest.mark.parametrize("case", ["linear", "fixed_large", "learned_range", "optimal", "learned", "eta"])
@pytest.mark.parametrize("path", [{"num_inference_steps": 10}, {"num_inference_steps": 1}, {"timesteps": [999, 30]}])
def test_the_final_image_has_no_noise_on_a_path_that_ends_above_0(case, path):
    # stock: noise wherever t > 0, of standard deviation 0.3 at the end of a trailing path of 10
    # with fixed_large
    config = {"eta": 1.0} if case == "eta" else settings(case, 1000)
    scheduler, reference = DDPMNotesScheduler(timestep_spacing="trailing", **config), Reference(**config)
    scheduler.set_timesteps(**path)
    last = int(scheduler.timesteps[-1])
    assert last > 0 and scheduler.previous_timestep(last) == -1
    x_t, output = network_output(reference, last)
    one, two = (scheduler.step(output, last, x_t, generator=gen(seed)) for seed in (0, 1))
    assert torch.equal(one.prev_sample, two.prev_sample)
    assert torch.equal(one.prev_sample, one.pred_original_sample)
    mean, variance = scheduler.reverse_mean_variance(output, x_t, last, -1)
    torch.testing.assert_close(one.prev_sample, mean)
    assert (variance > 0).all()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("extra", [{}, OPTIMAL, {"variance_type": "fixed_large"}, {"eta": 0.0}, {"eta": 1.0}])
@pytest.mark.parametrize("zero", [{"rescale_betas_zero_snr": True}, {"trained_betas": [*[0.01] * 999, 1.0]}])
def test_zero_terminal_snr_is_finite_everywhere(prediction_type, extra, zero):
    config = {"prediction_type": prediction_type, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDPMNotesScheduler(**config, **zero, **extra)
    assert scheduler.alphas_cumprod[-1] == 0
    x_0, x_t = images(0), randn(1)
    assert torch.equal(scheduler.add_noise(x_0, x_t, torch.tensor([999, 999])), x_t)
    assert torch.equal(scheduler.prior_kl(x_0, 999), torch.zeros(2, dtype=torch.float64, device=DEVICE))
    assert scheduler.predict_noise(x_0, x_t, 999).isfinite().all()
    if scheduler.eta is None:
        assert scheduler.vlb_terms(x_0, x_0, x_t, 999, 900).isfinite().all()
    for n in (3, 100):
        scheduler.set_timesteps(n)
        first, second = scheduler.timesteps[:2].tolist()
        mean, variance = scheduler.reverse_mean_variance(0.1 * x_t, x_t, first, second)
        assert first == 999 and mean.isfinite().all() and variance.isfinite().all()
        for t in scheduler.timesteps:
            x_t = scheduler.step(0.1 * x_t, t, x_t, generator=gen(int(t))).prev_sample
            assert x_t.isfinite().all()


def test_thresholding_at_ratio_1_brings_the_largest_value_to_one():
    config = {"prediction_type": "sample", "thresholding": True, "sample_max_value": 100.0}
    notes = DDPMNotesScheduler(**config, dynamic_thresholding_ratio=1.0)
    x_0 = 3 * randn(1)
    expected = x_0 / x_0.abs().amax((1, 2, 3), keepdim=True)
    assert rms(notes.predict_original_sample(x_0, randn(2), 500), expected) < 1e-6


# ------------------------------------------------------------------------ errors name what is wrong


def refusal(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def words(value) -> str:
    """A test's id: what the message must say."""
    return " ".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_train_timesteps", [0, -3, 10.5, 10.0, NAN, None, "10"]),
        ("beta_start", [0.0, -0.1, NAN]),
        ("beta_end", [1.5, -0.1]),
        ("beta_schedule", ["exponential"]),
        ("variance_type", ["tiny", None]),
        ("prediction_type", ["noise"]),
        ("timestep_spacing", ["even"]),
        ("steps_offset", [-1, 0.5]),
        ("clip_sample_range", [0.0, -1.0, NAN]),
        ("dynamic_thresholding_ratio", [0.0, 1.1, NAN]),
        ("sample_max_value", [0.0, -1.0, NAN]),
        ("rescale_betas_zero_snr", [True]),  # with the default "epsilon": stock divides by sqrt(alpha_bar) = 0
        ("decoder_variance", [0.0, -1.0, NAN]),
        ("eta", [1.1, -0.1, NAN]),
    ],
    ids=words,
)
def test_settings_out_of_range_are_refused_by_name(name, values):
    for value in values:
        message = refusal(lambda value=value: DDPMNotesScheduler(**{name: value}))
        assert name in message and (str(value) in message or value is True), message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trained_betas": [0.1, 0.1]}, ["trained_betas", "(2,)", "(3,)"]),
        ({"trained_betas": [0.1, 1.2, 0.1]}, ["trained_betas", "1.2", "timestep 1"]),
        ({"trained_betas": [0.1, 1.0, 0.1]}, ["trained_betas", "1.0", "timestep 1"]),
        ({"trained_betas": [0.0, 0.1, 0.1]}, ["trained_betas", "0.0", "timestep 0"]),
        ({"trained_betas": [0.1, 0.1, NAN]}, ["trained_betas", "nan", "timestep 2"]),
        ({"trained_betas": [0.1, 0.1, 1.0]}, ["prediction_type", "epsilon", "v_prediction"]),
        ({"beta_schedule": "scaled_linear", "beta_end": -0.1}, ["beta_end", "-0.1"]),
        ({"variance_type": "optimal"}, ["original_sample_mse", "None"]),
        ({**OPTIMAL, "original_sample_mse": [0.1] * 2}, ["original_sample_mse", "2", "3"]),
        ({**OPTIMAL, "original_sample_mse": [0.1, -0.5, 0.1]}, ["original_sample_mse", "-0.5"]),
        ({**OPTIMAL, "original_sample_mse": [0.1, 0.1, NAN]}, ["original_sample_mse", "finite"]),
        ({"decoder_variance": {3: 0.1}}, ["decoder_variance", "timestep 3"]),
        ({"decoder_variance": {1: -0.1}}, ["decoder_variance", "-0.1", "timestep 1"]),
    ],
    ids=words,
)
def test_lists_and_settings_that_do_not_fit_are_refused_by_name(config, said):
    message = refusal(lambda: DDPMNotesScheduler(3, **config))
    assert all(word in message for word in said), message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[({"num_inference_steps": n}, ["num_inference_steps", str(n)]) for n in (0, -5, 1001, 50.5, NAN)],
        ({}, ["num_inference_steps", "timesteps", "None"]),
        ({"num_inference_steps": 5, "timesteps": [9, 5]}, ["num_inference_steps", "timesteps", "5", "[9, 5]"]),
        ({"timesteps": []}, ["timesteps", "empty"]),
        *[({"timesteps": path}, ["timesteps", str(path)]) for path in ([5, 5], [5, 9], [9, 5, 6])],
        *[({"timesteps": [t, 5]}, ["timesteps", str(t)]) for t in (-3, 1000, 9.5, NAN)],
        ({"timesteps": torch.tensor([9.5, 5.0])}, ["timesteps", "9.5"]),
        ({"num_inference_steps": 5, "eta": 1.5}, ["eta", "1.5"]),
    ],
    ids=words,
)
def test_bad_paths_are_refused_by_name_and_change_nothing(arguments, said):
    scheduler = DDPMNotesScheduler()
    scheduler.set_timesteps(7)
    message = refusal(lambda: scheduler.set_timesteps(**{"eta": 0.5, **arguments}))
    assert all(word in message for word in said), message
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 7 and scheduler.eta is None


def test_a_path_may_be_refused_late_and_whole_floats_are_whole_numbers():
    assert "steps_offset is 1" in refusal(lambda: DDPMNotesScheduler(steps_offset=1).set_timesteps(1000))
    assert "9.5" in refusal(lambda: DDPMNotesScheduler().set_timesteps(timesteps=iter([9.5, 5])))
    for spacing in ("leading", "linspace", "trailing"):
        one, two = DDPMNotesScheduler(timestep_spacing=spacing), DDPMNotesScheduler(timestep_spacing=spacing)
        one.set_timesteps(50), two.set_timesteps(50.0)
        assert torch.equal(one.timesteps, two.timesteps)


X = images(0)
LEARNED = DDPMNotesScheduler(variance_type="learned_range")
DDIM = DDPMNotesScheduler(eta=0.0)
NOTES = DDPMNotesScheduler()
NOTES.set_timesteps(10)
TWO, THREE = torch.tensor([5, 6]), torch.tensor([5, 6, 7])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: NOTES.step(X, 905, X), ["timestep", "905", "900"]),
        (lambda: NOTES.step(X, 900.5, X), ["timestep", "900.5"]),
        (lambda: NOTES.step(X, torch.tensor(900.5), X), ["timestep", "900.5"]),
        (lambda: NOTES.step(X, torch.tensor([900, 800]), X), ["timestep", "900"]),
        (lambda: NOTES.step(X, -1, X), ["timestep", "-1"]),
        (lambda: NOTES.previous_timestep(905), ["timestep", "905"]),
        (lambda: NOTES.step(X[:, :2], 900, X), ["model_output", "(2, 2, 4, 4)", "(2, 3, 4, 4)"]),
        (lambda: NOTES.step(X[:1], 900, X), ["model_output", "(1, 3, 4, 4)"]),
        (lambda: NOTES.step(torch.cat([X] * 3, 1), 900, X), ["model_output", "(2, 9, 4, 4)"]),
        (lambda: NOTES.step(X.int(), 900, X), ["model_output", "int32"]),
        (lambda: NOTES.step(X, 900, X.int()), ["sample", "int32"]),
        (lambda: LEARNED.step(X, 5, X), ["model_output", "3 channels", "6", "learned_range"]),
        # stock: uint8 levels are scaled as they are and wrap around, off by up to 254
        (lambda: NOTES.add_noise(X.byte(), randn(1), TWO), ["original_samples", "uint8", "127.5"]),
        (lambda: NOTES.add_noise(X.long(), randn(1), TWO), ["original_samples", "int64", "127.5"]),
        (lambda: NOTES.get_velocity(X.byte(), randn(1), TWO), ["sample", "uint8"]),
        (lambda: NOTES.prior_kl(X.byte()), ["x_0", "uint8"]),
        (lambda: NOTES.vlb_terms(X, X.byte(), X, 5, 4), ["x_0", "uint8"]),
        (lambda: NOTES.add_noise(X, X[:, :2], TWO), ["noise", "(2, 2, 4, 4)", "original_samples", "(2, 3, 4, 4)"]),
        (lambda: NOTES.add_noise(X, X, torch.tensor([5, 1000])), ["timesteps", "1000", "999"]),
        (lambda: NOTES.add_noise(X, X, torch.tensor([-1, 5])), ["timesteps", "-1"]),
        (lambda: NOTES.add_noise(X, X, THREE), ["3 timesteps", "2 images"]),
        (lambda: NOTES.add_noise(X, X, torch.tensor([5.0, 6.0])), ["timesteps", "float32"]),
        (lambda: NOTES.posterior_mean_variance(X, X[:, :1], 5, 4), ["x_t", "(2, 1, 4, 4)", "x_0"]),
        (lambda: NOTES.posterior_mean_variance(X, X, 1000, 4), ["t has", "1000"]),
        (lambda: NOTES.posterior_mean_variance(X, X, 5, -2), ["s has", "-2"]),
        (lambda: NOTES.posterior_mean_variance(X, X, 5, 5), ["s < t", "(5, 5)"]),
        (lambda: NOTES.posterior_mean_variance(X, X, torch.tensor([9, 3]), 5), ["s < t", "(3, 5)"]),
        (lambda: NOTES.posterior_mean_variance(X, X, 5.0, 4), ["t is 5.0"]),
        (lambda: NOTES.reverse_mean_variance(X, X, THREE, 4), ["3 timesteps", "2 images"]),
        (lambda: NOTES.reverse_mean_variance(X, X, TWO, THREE - 5), ["t has 2", "s has 3"]),
        (lambda: NOTES.predict_original_sample(X, X, THREE), ["3 timesteps", "2 images"]),
        (lambda: NOTES.forward_mean_variance(X, THREE), ["3 timesteps", "2 images"]),
        (lambda: NOTES.prior_kl(X, THREE), ["3 timesteps", "2 images"]),
        (lambda: NOTES.prior_kl(X[:1], THREE), ["3 timesteps", "1 images"]),
        (lambda: NOTES.vlb_terms(X, X, X[:1], 5, 4), ["x_t", "(1, 3, 4, 4)"]),
        (lambda: DDIM.vlb_terms(X, X, X, 5, 4), ["eta", "0.0"]),
        (lambda: DDPMNotesScheduler(eta=0.5).vlb_terms(X, X, X, 5, 4), ["eta", "0.5"]),
    ],
    ids=words,
)
def test_bad_arguments_are_refused_by_name(call, said):
    message = refusal(call)
    assert all(word in message for word in said), message


# ------------------------------------------------------------------------------------ configuration

OURS = {
    "default": {},
    "optimal": {**OPTIMAL, "decoder_variance": {0: 1e-3, 99: 2e-2}},
    "eta": {"eta": 0.5, "decoder_variance": 0.01, "timestep_spacing": "trailing"},
    "learned_range": {"variance_type": "learned_range", "clip_sample": False},
}
COMPATIBLES = [c for c in sorted(DDPMScheduler().compatibles, key=str) if not isinstance(c, DummyObject)]


@contextlib.contextmanager
def everything_said():
    """Collects diffusers' log messages and Python's warnings."""
    said, handler, logger = [], logging.Handler(), logging.getLogger("diffusers")
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        logger.removeHandler(handler)
    said.extend(str(warning.message) for warning in caught)


def ours_of(scheduler) -> tuple:
    return scheduler.variance_type, scheduler.original_sample_mse, scheduler.decoder_variance, scheduler.eta


def stock_twin(scheduler: DDPMNotesScheduler) -> DDPMScheduler:
    """The stock scheduler made with the same arguments, those left at their defaults left too."""
    defaults = scheduler.config["_use_default_values"]
    return DDPMScheduler(**{k: v for k, v in scheduler.config.items() if k not in defaults and k[0] != "_"})


@pytest.mark.parametrize("case", OURS)
def test_saved_settings_survive_a_round_trip_also_through_the_stock_class(case, tmp_path, capfd):
    scheduler = DDPMNotesScheduler(**OURS[case])
    capfd.readouterr()
    with everything_said() as said:
        scheduler.save_config(tmp_path / "a")
        again = DDPMNotesScheduler.from_pretrained(tmp_path / "a")
        stock = DDPMScheduler.from_pretrained(tmp_path / "a")
        stock.save_config(tmp_path / "b")
        third = DDPMNotesScheduler.from_pretrained(tmp_path / "b")
    assert not said and capfd.readouterr() == ("", "")
    assert ours_of(again) == ours_of(third) == ours_of(scheduler)
    assert again.to_json_string() == third.to_json_string() == scheduler.to_json_string()
    assert stock.variance_type == OURS[case].get("variance_type", "fixed_small").replace("optimal", "fixed_small")
    saved = json.loads((tmp_path / "a" / "scheduler_config.json").read_text())
    # in memory as well: by this name diffusers' `from_config` knows which settings to pass over
    # without a warning
    assert saved["_class_name"] == scheduler.config["_class_name"] == again.config["_class_name"] == "DDPMScheduler"
    assert saved.keys() - {"_ddpm_notes"} == json.loads(DDPMScheduler().to_json_string()).keys()


def test_a_stock_config_loads_and_may_be_changed_while_loading(tmp_path):
    saved = DDPMScheduler(beta_schedule="scaled_linear", thresholding=True, steps_offset=1)
    saved.save_config(tmp_path)
    with everything_said() as said:
        loaded = DDPMNotesScheduler.from_pretrained(tmp_path)
        changed = DDPMNotesScheduler.from_pretrained(tmp_path, **OPTIMAL)
    assert not said
    assert loaded.to_json_string() == saved.to_json_string()
    assert ours_of(loaded) == ("fixed_small", None, None, None) and ours_of(changed) == ("optimal", MSE, None, None)


@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
@pytest.mark.parametrize("case", ["default", "optimal", "learned_range"])
@pytest.mark.parametrize("other", COMPATIBLES, ids=lambda c: c.__name__)
def test_configs_pass_through_other_schedulers_as_stock_ones_do(other, case, loaded, tmp_path):
    ours = DDPMNotesScheduler(**OURS[case])
    stock = stock_twin(ours)
    if loaded:
        ours.save_config(tmp_path / "ours"), stock.save_config(tmp_path / "stock")
        ours = DDPMNotesScheduler.from_pretrained(tmp_path / "ours")
        stock = DDPMScheduler.from_pretrained(tmp_path / "stock")

    with everything_said() as want_said:
        want = other.from_config(stock.config)
    with everything_said() as got_said:
        got = other.from_config(ours.config)
    assert got_said == want_said
    assert {k: v for k, v in got.config.items() if k[0] != "_"} == {k: v for k, v in want.config.items() if k[0] != "_"}
    with everything_said() as said:
        back = DDPMNotesScheduler.from_config(got.config)
    assert not said and ours_of(back) == ours_of(ours)


def test_a_setting_given_by_position_is_not_lost_by_from_config():
    """Stock: DDPMScheduler.from_config(DDPMScheduler(50).config) has 1000 timesteps."""
    scheduler = DDPMNotesScheduler(50, 0.001, variance_type="optimal", original_sample_mse=[0.1] * 50)
    for config in (scheduler.config, DDPMScheduler.from_config(scheduler.config).config):
        again = DDPMNotesScheduler.from_config(config)
        assert again.to_json_string() == scheduler.to_json_string() and torch.equal(again.betas, scheduler.betas)


def test_settings_given_to_from_config_win_over_the_saved_ones():
    scheduler = DDPMNotesScheduler(**OURS["optimal"])
    load = DDPMNotesScheduler.from_config
    assert load(scheduler.config, variance_type="fixed_large").variance_type == "fixed_large"
    assert load(scheduler.config, variance_type="fixed_small").variance_type == "fixed_small"
    assert load(scheduler.config, eta=0.25).eta == 0.25 and load(scheduler.config, eta=0.25).variance_type == "optimal"
    assert load(load(scheduler.config, eta=0.25).config, eta=None).eta is None
    assert load(scheduler.config, original_sample_mse=[0.5] * 1000).original_sample_mse == [0.5] * 1000
    # and so does a type that somebody chose while the config was a stock scheduler's
    stock = DDPMScheduler.from_config(scheduler.config, variance_type="fixed_large")
    assert load(stock.config).variance_type == "fixed_large"
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
    assert ours_of(load(solver.config)) == ours_of(scheduler)
    config = copy.deepcopy(dict(scheduler.config))
    load(scheduler.config, eta=0.5)
    assert dict(scheduler.config) == config


@pytest.mark.parametrize("learned", ["learned", "learned_range"])
def test_stock_classes_read_a_learned_type_for_the_optimal_variance_of_a_learned_model(learned, tmp_path):
    """They need it to split the network's output; one that somebody chose since wins."""
    load = DDPMNotesScheduler.from_config
    optimal = load(DDPMNotesScheduler(variance_type=learned, eta=0.5).config, **OPTIMAL)
    optimal.save_config(tmp_path)
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert stock.variance_type == stock.config.variance_type == optimal.config.variance_type == learned
    loaded = [DDPMNotesScheduler.from_pretrained(tmp_path), load(optimal.config), load(stock.config)]
    loaded += [load(DDIMScheduler.from_config(stock.config).config), copy.deepcopy(optimal)]
    for scheduler in loaded:
        assert ours_of(scheduler) == ("optimal", MSE, None, 0.5)
        assert scheduler.to_json_string() == optimal.to_json_string()
    scheduler, unused = load(optimal.config, return_unused_kwargs=True, other=1)
    assert scheduler.to_json_string() == optimal.to_json_string() and unused["other"] == 1
    # the way back, and other choices
    assert load(optimal.config, variance_type=learned).variance_type == learned
    for other in {"fixed_small", "fixed_large", "learned", "learned_range"} - {learned}:
        assert load(DDPMScheduler.from_config(optimal.config, variance_type=other).config).variance_type == other


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_step_the_same(case, how):
    scheduler, reference = DDPMNotesScheduler(**OURS[case]), Reference(**OURS[case])
    scheduler.set_timesteps(7)
    twin = copy.deepcopy(scheduler) if how == "deepcopy" else pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(twin.timesteps, scheduler.timesteps) and twin.to_json_string() == scheduler.to_json_string()
    for t in scheduler.timesteps:
        x_t, output = network_output(reference, int(t))
        one, two = (s.step(output, t, x_t, generator=gen(0)).prev_sample for s in (scheduler, twin))
        assert torch.equal(one, two)
    twin.set_timesteps(3)
    assert len(scheduler.timesteps) == 7 and scheduler.previous_timestep(t) == -1


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("sampler", ["noise", "eta=0"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_chain_of_1000_steps_keeps_its_digits(prediction_type, sampler):
    # the best denoiser for Gaussian pixels of variance 0.25, in float64, its answers rounded as a
    # network's are
    config = {"prediction_type": prediction_type, "clip_sample": False}
    scheduler, reference = DDPMNotesScheduler(eta=0.0 if sampler == "eta=0" else None, **config), Reference(**config)
    scheduler.set_timesteps(1000)
    start, *noise = torch.randn((1000, 4, 1, 8, 8), generator=gen(0), dtype=torch.float64)

    def chain(dtype: torch.dtype, output_dtype: torch.dtype) -> torch.Tensor:
        x = start.to(dtype)
        for t in range(999, -1, -1):
            abar, x_64 = reference.alpha_bar[t], x.double()
            x_0 = abar**0.5 * 0.25 / (abar * 0.25 + 1 - abar) * x_64
            output = reference.target(x_0, (x_64 - abar**0.5 * x_0) / (1 - abar) ** 0.5, t).to(output_dtype)
            if sampler == "eta=0":
                x = scheduler.step(output, t, x).prev_sample
            else:  # `step` draws other numbers in float64 than in float32
                mean, variance = scheduler.reverse_mean_variance(output, x, t, t - 1)
                x = mean + (variance.sqrt() * noise[t - 1].to(dtype) if t > 0 else 0)
            assert x.dtype == dtype
        return x

    exact = chain(torch.float64, torch.float64)
    assert 0.4 < exact.std() < 0.6
    assert rms(chain(torch.float32, torch.float32), exact) < 1e-5
    for dtype in DTYPES:
        assert rms(chain(torch.float32, dtype), exact) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["default", "optimal", "eta", "learned_range"])
def test_a_stock_loop_in_half_precision_runs_and_keeps_its_dtype(case, dtype):
    scheduler, reference = DDPMNotesScheduler(**OURS[case]), Reference(**OURS[case])
    scheduler.set_timesteps(50)
    x = randn(0, dtype=dtype)
    for t in scheduler.timesteps:
        _, output = network_output(reference, int(t))
        step = scheduler.step(output.to(dtype), t, x, generator=gen(int(t)))
        # computed in float32 and rounded once
        exact = scheduler.step(output.to(dtype).float(), t, x.float(), generator=gen(int(t)))
        assert torch.equal(step.prev_sample, exact.prev_sample.to(dtype))
        assert torch.equal(step.pred_original_sample, exact.pred_original_sample.to(dtype))
        x = step.prev_sample
        assert x.dtype == dtype and x.isfinite().all()


@pytest.mark.parametrize("s", [-1, 4])
def test_one_pair_for_all_images_is_that_pair_for_each(s):
    """Of two images and of one, at the decoder too, where it alone is computed."""
    scheduler = DDPMNotesScheduler(10)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 256, (3, 1, 4, 4), generator=generator) / 127.5 - 1
    noise, output = torch.randn((2, 3, 1, 4, 4), generator=generator)
    t = max(s + 1, 0)
    x_t = scheduler.add_noise(x_0, noise, t)
    each = scheduler.vlb_terms(output, x_0, x_t, torch.full((3,), t), torch.full((3,), s))
    alone = [scheduler.vlb_terms(output[i : i + 1], x_0[i : i + 1], x_t[i : i + 1], t, s) for i in range(3)]
    torch.testing.assert_close(scheduler.vlb_terms(output, x_0, x_t, t, s), each, atol=0, rtol=1e-12)
    torch.testing.assert_close(torch.cat(alone), each, atol=0, rtol=1e-6)
    for value in (t, torch.tensor(t), torch.tensor([t])):
        torch.testing.assert_close(scheduler.add_noise(x_0, noise, value), x_t, atol=0, rtol=0)
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match="must be from 0 to 9"):
            scheduler.add_noise(x_0, noise, torch.tensor([wrong]))
