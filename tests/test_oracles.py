"""The exact denoisers are Bayes' rule, know their own error, and replace a UNet2DModel."""

from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_notes_pipeline.oracles import CoinDenoiser, ExactDenoiser, GaussianDenoiser
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler

ALPHA_BAR = np.exp(np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000))))
BOTH = [CoinDenoiser, GaussianDenoiser]


def denoiser(cls: type[ExactDenoiser], **options: Any) -> Any:
    return cls(alphas_cumprod=ALPHA_BAR.tolist(), **options)


def noisy(x_0: torch.Tensor, t: int, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ALPHA_BAR[t] ** 0.5 * x_0.double() + (1 - ALPHA_BAR[t]) ** 0.5 * noise


@pytest.mark.parametrize("t", [0, 10, 250, 700, 999])
def test_gaussian_answer_is_bayes_rule_on_a_grid(t: int) -> None:
    model = denoiser(GaussianDenoiser, mean=0.3, variance=0.2, prediction_type="sample")
    x_t = noisy(model.images(1, torch.Generator().manual_seed(0))[..., :2, :4].contiguous(), t).reshape(-1)
    grid = np.linspace(-5, 5, 100_001)
    for x, answer in zip(x_t.tolist(), model(x_t[:, None], t).sample[:, 0].tolist(), strict=True):
        log_joint = -((grid - 0.3) ** 2) / 0.4 - (x - ALPHA_BAR[t] ** 0.5 * grid) ** 2 / (2 * (1 - ALPHA_BAR[t]))
        weight = np.exp(log_joint - log_joint.max())
        mean = (weight * grid).sum() / weight.sum()
        assert answer == pytest.approx(mean, abs=1e-11)
        assert model.denoising_error(t).item() == pytest.approx(
            (weight * (grid - mean) ** 2).sum() / weight.sum(), rel=1e-9
        )


@pytest.mark.parametrize("t", [0, 10, 250, 700, 999])
def test_coin_answer_is_bayes_rule_on_two_points(t: int) -> None:
    x_t = torch.linspace(-3, 3, 25, dtype=torch.float64)
    log_likelihood = [-((x_t - x_0 * ALPHA_BAR[t] ** 0.5) ** 2) / (2 * (1 - ALPHA_BAR[t])) for x_0 in (-1, 1)]
    heads = torch.softmax(torch.stack(log_likelihood), 0)[1]
    answer = denoiser(CoinDenoiser, prediction_type="sample")(x_t[:, None], t).sample[:, 0]
    torch.testing.assert_close(answer, 2 * heads - 1, rtol=0, atol=1e-11)


@pytest.mark.parametrize("t", [20, 50, 100, 300, 700, 999])
def test_coin_denoising_error_is_the_integral_of_one_minus_tanh_squared(t: int) -> None:
    snr = mpmath.mpf(ALPHA_BAR[t]) / (1 - mpmath.mpf(ALPHA_BAR[t]))

    def integrand(u: Any) -> Any:  # u = atanh(E[x_0 | x_t]) given x_0 = 1, u ~ N(SNR, SNR); sech^2 = 1 - tanh^2
        return mpmath.sech(u) ** 2 * mpmath.npdf(u, snr, mpmath.sqrt(snr))

    width = 15 * min(1.0, float(snr) ** 0.5)  # the mass lies around 0, where sech is, or around SNR, where u is
    cuts = sorted(
        {k * width / 5 for k in range(-15, 16)} | {float(snr) + k * float(snr) ** 0.5 for k in range(-12, 13)}
    )
    exact = float(mpmath.quad(integrand, cuts))
    assert denoiser(CoinDenoiser).denoising_error(t).item() == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("cls", BOTH)
def test_denoising_error_is_what_monte_carlo_finds(cls: type[ExactDenoiser]) -> None:
    model = denoiser(cls, prediction_type="sample")
    x_0 = model.images(200, torch.Generator().manual_seed(2))
    steps = torch.tensor([100, 200, 500, 999])
    for t, exact in zip(steps.tolist(), model.denoising_error(steps).tolist(), strict=True):
        error = (model(noisy(x_0, t), t).sample - x_0).square()
        standard_error = error.std().item() / error.numel() ** 0.5
        assert abs(error.mean().item() - exact) < 4 * standard_error


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 5), (4, 1, 3, 2), (4, 1, 2, 3, 2)])
def test_three_parametrisations_say_one_thing(cls: type[ExactDenoiser], shape: tuple[int, ...]) -> None:
    t = torch.tensor([0, 40, 600, 999])
    alpha_bar = torch.from_numpy(ALPHA_BAR)[t].reshape(-1, *[1] * (len(shape) - 1))
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_0, eps, v = (denoiser(cls, prediction_type=kind)(x_t, t).sample for kind in ("sample", "epsilon", "v_prediction"))
    torch.testing.assert_close(alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps, x_t, rtol=0, atol=1e-14)
    torch.testing.assert_close(alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v, x_0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cls", BOTH)
def test_alpha_bar_zero_leaves_the_data_alone_to_go_by(cls: type[ExactDenoiser]) -> None:
    x_t = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    options: dict[str, Any] = {"mean": 0.5, "variance": 0.2} if cls is GaussianDenoiser else {}
    mean, variance = (0.5, 0.2) if cls is GaussianDenoiser else (0.0, 1.0)
    for kind, sign in (("sample", 1), ("v_prediction", -1)):
        model: Any = cls(alphas_cumprod=[0.9, 0.0], prediction_type=kind, **options)
        assert (model(x_t, 1).sample == sign * mean).all()
        assert model.denoising_error(1).item() == pytest.approx(variance, rel=1e-14)


@pytest.mark.parametrize("cls", BOTH)
def test_timestep_may_be_a_number_or_one_for_each_image(cls: type[ExactDenoiser]) -> None:
    model, x_t = denoiser(cls), torch.randn(3, 1, 4, 4)
    expected = torch.cat([model(x_t[i : i + 1], t).sample for i, t in enumerate((7, 7, 500))])
    assert torch.equal(model(x_t, torch.tensor([7, 7, 500])).sample, expected)
    for same in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7], dtype=torch.int32)):
        assert torch.equal(model(x_t, same).sample[:2], expected[:2])
    assert torch.equal(model(x_t, 7, class_labels=torch.tensor([1, 2, 3]), return_dict=False)[0][:2], expected[:2])


@pytest.mark.parametrize("cls", BOTH)
def test_arithmetic_is_float64_and_the_answer_float32_at_least(cls: type[ExactDenoiser]) -> None:
    model, x_t = denoiser(cls).to(torch.bfloat16), torch.randn(2, 1, 4, 4).bfloat16()
    assert model.dtype == torch.bfloat16
    exact = model(x_t.double(), 3).sample
    assert exact.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float32):
        answer = model(x_t.to(dtype), 3).sample
        assert answer.dtype == torch.float32
        torch.testing.assert_close(answer, exact.float(), rtol=0, atol=0)


@pytest.mark.parametrize("cls", BOTH)
def test_saved_and_loaded_denoiser_is_the_same(cls: type[ExactDenoiser], tmp_path: Path) -> None:
    options: dict[str, Any] = {"mean": -0.2, "variance": 0.1} if cls is GaussianDenoiser else {}
    model = denoiser(cls, prediction_type="v_prediction", sample_size=(4, 6), channels=2, **options)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for name in ("alphas_cumprod", "prediction_type", "channels", "in_channels", "out_channels", *options):
        assert loaded.config[name] == model.config[name]
    assert loaded.images(3).shape == (3, 2, 4, 6)
    x_t = torch.randn(2, 2, 4, 6)
    assert torch.equal(loaded(x_t, 321).sample, model(x_t, 321).sample)


def test_denoiser_stands_in_the_place_of_a_unet(tmp_path: Path) -> None:
    """In diffusers' own pipeline and scheduler, also after a save and a load."""
    scheduler = DDPMScheduler()
    unet = CoinDenoiser.from_scheduler(scheduler, sample_size=(6, 10), channels=3)
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size) == (3, 3, (6, 10))
    assert (unet.dtype, unet.device.type) == (torch.float32, "cpu")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        batch_size=8, num_inference_steps=50, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (8, 6, 10, 3)
    assert np.minimum(images, 1 - images).max() < 1e-5
    assert abs(images.mean() - 0.5) < 4 * 0.5 / images.size**0.5


def test_from_scheduler_takes_the_float64_table_and_the_prediction_type() -> None:
    exact = CoinDenoiser.from_scheduler(DDPMNotesScheduler(prediction_type="v_prediction"))
    np.testing.assert_allclose(exact.config.alphas_cumprod, ALPHA_BAR, rtol=1e-13)
    assert exact.config.prediction_type == "v_prediction"
    rounded = CoinDenoiser.from_scheduler(DDPMScheduler())  # has float32 betas to offer, and nothing else
    np.testing.assert_allclose(rounded.config.alphas_cumprod, ALPHA_BAR, rtol=1e-5)


def test_images_are_the_data_that_the_denoiser_knows() -> None:
    def draw(model: ExactDenoiser) -> torch.Tensor:
        return model.images(50, torch.Generator().manual_seed(4))

    coin = denoiser(CoinDenoiser, sample_size=(8, 16), channels=2)
    x_0 = draw(coin)
    assert x_0.shape == (50, 2, 8, 16) and x_0.dtype == torch.float32
    assert x_0.unique().tolist() == [-1, 1] and abs(x_0.mean().item()) < 4 / x_0.numel() ** 0.5
    assert torch.equal(draw(coin), x_0)
    x_0 = draw(denoiser(GaussianDenoiser, mean=0.3, variance=0.04))
    assert x_0.mean().item() == pytest.approx(0.3, abs=4 * 0.2 / x_0.numel() ** 0.5)
    assert x_0.var().item() == pytest.approx(0.04, rel=4 * (2 / x_0.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alphas_cumprod", {"alphas_cumprod": [0.9, 1.0]}),
        ("alphas_cumprod", {"alphas_cumprod": [0.9, float("nan")]}),
        ("prediction_type", {"prediction_type": "noise"}),
        ("variance", {"variance": 0.0}),
    ],
)
def test_bad_argument_is_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{name} (is|has) .*; it must be"):
        GaussianDenoiser(**{"alphas_cumprod": [0.9, 0.5], **options})


@pytest.mark.parametrize("t", [-1, 1000, 3.5, torch.tensor([0, -1])])
def test_timestep_off_the_table_is_refused(t: Any) -> None:
    with pytest.raises(ValueError, match=r"timestep is .*; it must be an integer from 0 to 999"):
        denoiser(CoinDenoiser)(torch.zeros(2, 1, 2, 2), t)
