"""The posterior of a pixel's level against a sum over the 256 levels, written out in numpy."""

import math
import warnings

import numpy as np
import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.core.levels import LevelPosterior, Levels, to_model_range
from ddpm_notes_pipeline.oracles import CoinDenoiser, GaussianDenoiser

LEVELS = (2 * np.arange(256) - 255) / 255
UNIFORM = 2.0**-16


def weights(channels=1, occurring=range(256), seed=0):
    pi = np.zeros((channels, 256))
    pi[:, list(occurring)] = np.random.default_rng(seed).random((channels, len(occurring))) + 0.01
    return (pi / pi.sum(1, keepdims=True)).tolist()


def posterior(pi, decoder=1e-3, guess=1e-3, scale=None, T=1000):
    return LevelPosterior(Levels(pi, {0: decoder}, {0: guess, T - 1: guess}, scale), T)


def by_hand(pi, h, blur):
    """(256,) probabilities of one pixel, without the uniform share."""
    with np.errstate(divide="ignore"):
        logits = np.log(pi) - (LEVELS - h) ** 2 / (2 * blur)
    p = np.exp(logits - logits.max())
    return p / p.sum()


def config(pi, decoder=None, guess=None, **settings):
    return {"weights": pi, "decoder_blur": decoder or {0: 1e-3}, "guess_blur": guess or {}, **settings}


@pytest.mark.parametrize("occurring", [range(256), (0, 7, 200, 255), (3,)], ids=["all", "four", "one"])
def test_masses_and_moments_are_the_brute_force_sums(occurring):
    pi = weights(2, occurring)
    h = torch.tensor(np.random.default_rng(1).uniform(-1.2, 1.2, (2, 2, 3, 3)))
    blur = torch.tensor([1e-5, 3e-2]).double().reshape(2, 1, 1, 1)
    x_0 = to_model_range(torch.randint(0, 256, h.shape, dtype=torch.uint8)).double()
    model = posterior(pi)
    mass = model.log_mass(x_0, h, blur)
    mean, variance = model.mean_variance(h, blur)
    for index in np.ndindex(*h.shape):
        p = by_hand(pi[index[1]], float(h[index]), float(blur[index[0]]))
        k = round((float(x_0[index]) + 1) * 127.5)
        assert float(mass[index]) == pytest.approx(math.log((1 - UNIFORM) * p[k] + UNIFORM / 256), abs=1e-12)
        assert float(mean[index]) == pytest.approx(p @ LEVELS, abs=1e-13)
        assert float(variance[index]) == pytest.approx(p @ (LEVELS - p @ LEVELS) ** 2, abs=1e-13)


def test_the_masses_of_the_256_levels_sum_to_1_and_the_longest_code_is_24_bits():
    h = torch.linspace(-1.5, 1.5, 7).double().reshape(7, 1, 1).expand(7, 1, 256)
    x_0 = torch.tensor(LEVELS).expand(7, 1, 256)
    for pi in (weights(), weights(occurring=(0, 255))):
        for blur in (1e-7, 1e-3, 1.0):
            mass = posterior(pi).log_mass(x_0, h, torch.tensor(blur))
            np.testing.assert_allclose(mass.exp().sum(-1).numpy(), 1, rtol=0, atol=1e-12)
            assert float(-mass.min()) <= 24 * math.log(2) + 1e-12


@pytest.mark.parametrize("std", [1, 3, 10])
def test_with_flat_weights_and_a_blur_of_some_levels_the_guess_stays(std):
    blur = (std * 2 / 255) ** 2
    h = torch.linspace(-1, 1, 1001).double().reshape(1, 1, -1) * (1 - 8 * math.sqrt(blur))
    mean, _ = posterior([[1 / 256] * 256]).mean_variance(h, torch.tensor(blur))
    assert float((mean - h).abs().max()) <= 1e-7 * 2 / 255


def test_the_nearest_level_occurs_and_none_is_nearer():
    occurring = np.array([0, 16, 17, 200])
    x = torch.linspace(-1.3, 1.3, 997).reshape(1, 1, -1)
    found = posterior(weights(occurring=occurring)).nearest(x).flatten().numpy()
    distances = np.abs(LEVELS[occurring][None, :] - x.flatten().numpy()[:, None])
    np.testing.assert_allclose(np.abs(found - x.flatten().numpy()), distances.min(1), atol=1e-6)
    exact = to_model_range(torch.tensor(occurring, dtype=torch.uint8)).numpy()
    assert set(found.tolist()) <= set(exact.tolist())


def test_blurs_between_fitted_timesteps_are_interpolated_and_the_guess_is_left_beyond_the_last():
    model = LevelPosterior(Levels(weights(), {0: 1e-4, 9: 1e-2}, {1: 2e-4, 3: 8e-4}), 20)
    assert float(model.decoder_blur.values[0]) == pytest.approx(1e-4)
    middle = 1e-4 * 100 ** (math.log(4) / math.log(10))
    assert float(model.decoder_blur.values[3]) == pytest.approx(middle)
    assert float(model.decoder_blur.values[19]) == pytest.approx(1e-2)
    assert (model.guess_blur.values > 0).tolist() == [True] * 4 + [False] * 16
    assert float(model.guess_blur.values[0]) == pytest.approx(2e-4)


def test_bayes_rule_on_the_levels_makes_the_plain_sight_of_a_coin_the_exact_denoiser():
    """h = x_t / sqrt(alpha_bar) has blur 1 / SNR; its mean is tanh(sqrt(abar) x_t / (1 - abar))."""
    T = 1000
    plain = DDPMNotesScheduler(prediction_type="sample", clip_sample=False)
    alpha_bar = plain.chain.log_alpha_bar[:-1].exp()
    blurs = {t: float((1 - alpha_bar[t]) / alpha_bar[t]) for t in range(T)}
    pi = [[0.5] + [0.0] * 254 + [0.5]]
    levels = config(pi, decoder={0: 1e-7}, guess=blurs)
    scheduler = DDPMNotesScheduler.from_config(plain.config, levels=levels)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 2, (64, 1, 8, 8), generator=generator).double() * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    for t in (1, 30, 500, 999):
        x_t = scheduler.add_noise(x_0, noise, t)
        sight = x_t / alpha_bar[t].sqrt()
        exact = torch.tanh(alpha_bar[t].sqrt() * x_t / (1 - alpha_bar[t]))
        found = scheduler.predict_original_sample(sight, x_t, t)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
        assert torch.equal(scheduler.predict_original_sample(sight, x_t, t, clip=False), sight)
    x_t = scheduler.add_noise(x_0, noise, 0)
    decoder = scheduler.vlb_terms(x_t / alpha_bar[0].sqrt(), x_0, x_t, 0, -1)
    bits = float((decoder + scheduler.prior_kl(x_0)).mean()) / (64 * math.log(2))
    assert bits <= 1e-4


def test_step_ends_on_the_occurring_level_nearest_to_the_mean():
    occurring = (0, 100, 255)
    scheduler = DDPMNotesScheduler(prediction_type="sample", levels=config(weights(occurring=occurring), {0: 0.05}))
    x_t = torch.linspace(-1.2, 1.2, 64).reshape(1, 1, 8, 8)
    x_s = scheduler.step(x_t, 0, x_t).prev_sample
    mean, variance = scheduler.reverse_mean_variance(x_t, x_t, 0, -1)
    levels = to_model_range(torch.tensor(occurring, dtype=torch.uint8))
    nearest = levels[(mean.reshape(-1, 1) - levels).abs().argmin(1)].reshape(x_t.shape)
    assert torch.equal(x_s, nearest)
    assert len(x_s.unique()) == 3
    assert float(variance.min()) >= 0


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal", "learned_range", "learned"])
def test_a_refined_guess_and_decoder_are_the_brute_force_sums_in_every_method(variance_type):
    T, t, s = 50, 3, 1
    measured = {"original_sample_mse": [0.01] * T} if variance_type == "optimal" else {}
    levels = config(weights(occurring=(0, 90, 255)), {0: 2e-3}, {0: 1e-3, 5: 1e-3}, decoder_scale=3.0)
    settings = {"num_train_timesteps": T, "prediction_type": "sample", "variance_type": variance_type, **measured}
    with_levels = DDPMNotesScheduler(**settings, levels=levels)
    plain = DDPMNotesScheduler(**settings)
    generator = torch.Generator().manual_seed(1)
    x_0 = to_model_range(torch.tensor([0, 90, 255], dtype=torch.uint8))[
        torch.randint(0, 3, (2, 1, 4, 4), generator=generator)
    ].double()
    h = x_0 + 0.05 * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    x_t = with_levels.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=torch.float64), t)
    learned = variance_type.startswith("learned")
    v = torch.rand(x_0.shape, generator=generator, dtype=torch.float64) - (8 if variance_type == "learned" else 0)
    output = torch.cat([h, v], 1) if learned else h
    pi = levels["weights"][0]
    refined = torch.tensor([by_hand(pi, float(value), 1e-3) @ LEVELS for value in h.flatten()]).reshape(h.shape)
    refined_output = torch.cat([refined, v], 1) if learned else refined

    for ours, theirs in zip(
        with_levels.reverse_mean_variance(output, x_t, t, s),
        plain.reverse_mean_variance(refined_output, x_t, t, s, clip=False),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        with_levels.vlb_terms(output, x_0, x_t, t, s),
        plain.vlb_terms(refined_output, x_0, x_t, t, s, clip=False),
        rtol=1e-11,
        atol=1e-12,
    )
    # at the data the raw guess counts, with the decoder's own blur
    own_variance = plain.reverse_mean_variance(output, x_t, 0, -1)[1].expand_as(h)
    blur = (3.0 * own_variance if learned else torch.full_like(h, 2e-3)).flatten().tolist()
    k = ((x_0 + 1) * 127.5).round().long().flatten().tolist()
    masses = [by_hand(pi, float(value), b)[i] for value, b, i in zip(h.flatten(), blur, k, strict=True)]
    expected = -np.log((1 - UNIFORM) * np.array(masses) + UNIFORM / 256).reshape(2, -1).sum(1)
    np.testing.assert_allclose(with_levels.vlb_terms(output, x_0, x_t, 0, -1).numpy(), expected, rtol=1e-11)
    # one call with both kinds of steps
    both = with_levels.vlb_terms(output, x_0, x_t, torch.tensor([t, 0]), torch.tensor([s, -1]))
    assert float(both[1]) == pytest.approx(expected[1], rel=1e-11)
    assert float(both[0]) == pytest.approx(float(with_levels.vlb_terms(output, x_0, x_t, t, s)[0]), rel=1e-12)


@pytest.mark.parametrize("with_levels", [False, True])
def test_the_terms_of_pixels_add_up_to_the_images(with_levels):
    levels = config(weights(), {0: 1e-2}, {0: 1e-3, 9: 1e-3}) if with_levels else None
    scheduler = DDPMNotesScheduler(prediction_type="sample", levels=levels)
    x_0 = to_model_range(torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)).double()
    t, s = torch.tensor([700, 5, 0]), torch.tensor([650, 2, -1])
    arguments = (x_0 * 0.9, x_0, scheduler.add_noise(x_0, torch.randn_like(x_0), t), t, s)
    pixels = scheduler.vlb_terms(*arguments, per_pixel=True)
    assert pixels.shape == x_0.shape
    torch.testing.assert_close(pixels.flatten(1).sum(1), scheduler.vlb_terms(*arguments), rtol=1e-13, atol=0)
    prior = scheduler.prior_kl(x_0, per_pixel=True)
    torch.testing.assert_close(prior.flatten(1).sum(1), scheduler.prior_kl(x_0), rtol=1e-10, atol=1e-14)


def test_levels_stay_in_the_private_entry_and_survive_saving(tmp_path):
    from diffusers import DDIMScheduler, DDPMScheduler

    levels = config(weights(occurring=(0, 9)), {0: 1e-3, 40: 2e-2}, {2: 1e-4}, decoder_costs={0: 0.2, 40: 0.5})
    DDPMNotesScheduler(num_train_timesteps=50, levels=levels).save_pretrained(tmp_path)
    loaded = DDPMNotesScheduler.from_pretrained(tmp_path)
    first, again = LevelPosterior(Levels.from_config(levels), 50), LevelPosterior(Levels.from_config(loaded.levels), 50)
    for name in ("decoder_blur", "guess_blur"):
        assert torch.equal(getattr(first, name).values, getattr(again, name).values)
    assert Levels.from_config(loaded.levels) == Levels.from_config(levels)
    for stock in (DDPMScheduler, DDIMScheduler):
        assert "levels" not in stock.from_pretrained(tmp_path).config
    assert DDPMNotesScheduler.from_config(loaded.config, levels=None).levels is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"weights": [[1.0] * 255]}, "has 255 weights for channel 0; it must have 256"),
        ({"weights": [[-1.0] + [1.0] * 255]}, "from -1.0 to 1.0"),
        ({"weights": [[math.nan] + [1.0] * 255]}, "must be finite"),
        ({"weights": [[math.inf] + [1.0] * 255]}, "must be finite"),
        ({"weights": [[0.0] * 256]}, "not all 0"),
        ({"decoder_blur": {0: 0.0}}, "blur of 0.0 at timestep 0"),
        ({"guess_blur": {3: -1.0}}, "blur of -1.0 at timestep 3"),
        ({"guess_blur": {3: math.nan}}, "blur of nan at timestep 3"),
        ({"decoder_blur": {}}, "must have both"),
        ({"decoder_scale": 0.0}, "blur of 0.0 at timestep 0"),
        ({"decoder_costs": {3: math.inf}}, "cost of inf at timestep 3"),
    ],
)
def test_levels_that_are_no_probabilities_or_blurs_are_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        DDPMNotesScheduler(levels={**config(weights()), **changed})


def test_a_model_of_other_channels_than_the_levels_is_refused():
    scheduler = DDPMNotesScheduler(levels=config(weights(channels=3)))
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="weights of 3 channel"):
        scheduler.step(x, 0, x)


def test_samples_have_only_levels_that_occur():
    pipeline = DDPMNotesPipeline(
        CoinDenoiser.from_scheduler(DDPMNotesScheduler(num_train_timesteps=20), sample_size=4),
        DDPMNotesScheduler(num_train_timesteps=20, levels=config(weights(occurring=(0, 255)), {0: 1e-3})),
    )
    pixels = pipeline(8, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert set(pixels.unique().tolist()) <= {-1.0, 1.0}


def test_pixels_of_levels_that_no_training_image_had_have_finite_bits_and_are_counted_in_a_warning():
    """One level of weight 0 in each of two channels, another in the second."""
    pi = np.ones((2, 256))
    pi[0, 7] = pi[1, 9] = 0
    levels = config((pi / 256).tolist())
    scheduler = DDPMNotesScheduler(10, beta_end=0.9, levels=levels)
    network = GaussianDenoiser(scheduler.alphas_cumprod.tolist(), sample_size=4, channels=2)
    pipeline = DDPMNotesPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pixels = torch.full((3, 2, 4, 4), 128, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.bits_per_dim(pixels)
    pixels[0, 0, 0, :3] = 7
    pixels[1, :, 1, 1] = 9  # occurs in the first channel
    pixels[2, 0, 2, 2] = 7
    with pytest.warns(UserWarning, match="5 of 96 pixels have levels of weight 0"):
        assert math.isfinite(pipeline.bits_per_dim(pixels).total)


def test_pixels_are_taken_in_parts_that_fit_into_memory(monkeypatch):
    """At most LOGITS_AT_ONCE logits, pixels times levels that occur, and the same result."""
    generator = torch.Generator().manual_seed(0)
    x_0 = to_model_range(torch.randint(0, 256, (5, 1, 8, 8), generator=generator, dtype=torch.uint8))
    h, blur = x_0 + 0.1 * torch.randn(x_0.shape, generator=generator), torch.tensor(0.01)
    posterior = LevelPosterior(Levels([[1 / 256] * 256], {0: 0.01}, {0: 0.01}), 10)
    expected = posterior.log_mass(x_0, h, blur)
    monkeypatch.setattr("ddpm_notes_pipeline.core.levels.LOGITS_AT_ONCE", 256 * 7)
    with torch.profiler.profile(record_shapes=True) as profile:
        found = posterior.log_mass(x_0, h, blur)
    torch.testing.assert_close(found, expected)
    assert max(math.prod(shape) for event in profile.events() for shape in event.input_shapes) == 256 * 7
