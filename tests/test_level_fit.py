"""The fit of levels and blurs: what it finds where the truth is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.core.levels import to_model_range, to_uint8
from ddpm_notes_pipeline.evaluation.level_reports import fit_text
from ddpm_notes_pipeline.level_fit import Guesses, fit_levels, level_counts, most_likely
from ddpm_notes_pipeline.oracles import CoinDenoiser
from ddpm_notes_pipeline.variances import best_timesteps, measure_original_sample_mse, optimal_scheduler, step_costs

T = 60
LEVELS = (2 * np.arange(256) - 255) / 255


class PlainSight(CoinDenoiser):
    """No denoiser: x_t / sqrt(alpha_bar), which is a level with noise of variance 1 / SNR."""

    def original_sample(self, x_t, alpha_bar):
        return x_t / alpha_bar.sqrt()


def noisy_start(**settings):
    """Noise at t = 0 that leaves the levels 0, 128 and 255 in doubt."""
    betas = np.linspace(0.3, 0.5, T).tolist()
    return DDPMNotesScheduler(num_train_timesteps=T, trained_betas=betas, clip_sample=False, **settings)


def plain_sight(scheduler=None, size=16, channels=1):
    scheduler = scheduler or noisy_start()
    network = PlainSight.from_scheduler(scheduler, sample_size=size, channels=channels)
    pipeline = DDPMNotesPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def three_levels(n, size=16, seed=0):
    """Independent pixels of the levels 0, 128 and 255 with probabilities 0.7, 0.1 and 0.2."""
    drawn = np.random.default_rng(seed).choice([0, 128, 255], (n, 1, size, size), p=[0.7, 0.1, 0.2])
    return torch.from_numpy(drawn.astype(np.uint8))


def test_of_a_plain_sight_the_fit_finds_the_shares_themselves_and_the_noise():
    pipeline = plain_sight()
    fit = fit_levels(pipeline, three_levels(128))
    assert fit.gamma == pytest.approx(1, abs=0.05)
    chain = pipeline.scheduler.chain
    for t in list(fit.levels["decoder_blur"])[:4]:
        blur = 1 / float(chain.pair(t, -1).snr_t)
        assert fit.levels["decoder_blur"][t] == pytest.approx(blur, rel=0.1)
    assert np.flatnonzero(fit.levels["weights"][0]).tolist() == [0, 128, 255]


@pytest.mark.slow
def test_levels_that_gain_nothing_are_not_used():
    """All levels are equally likely and the Gaussian has the noise's own variance: it is right."""
    noise = 1 / float(DDPMNotesScheduler(T).chain.pair(0, -1).snr_t)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 1, 16, 16), dtype=np.uint8))
    right, wrong = (
        fit_levels(plain_sight(DDPMNotesScheduler(T, clip_sample=False, decoder_variance=variance)), images)
        for variance in (noise, noise / 4)
    )
    assert right.levels is None and right.own_cost[0] == pytest.approx(right.decoder_costs[0][0], rel=0.01)
    assert "not used, as they gain too little" in fit_text(right)
    assert wrong.levels is not None and wrong.own_cost[0] > 1.1 * wrong.decoder_costs[0][0]


def test_fitted_levels_make_a_plain_sight_as_good_as_bayes_rule():
    """The decoder's cost at t = 0 is the conditional entropy, by quadrature; no model has less."""
    pipeline = plain_sight()
    fit = fit_levels(pipeline, three_levels(128, seed=1))
    pipeline.scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config, levels=fit.levels)
    result = pipeline.bits_per_dim(three_levels(400), timesteps=[0])
    std = float(pipeline.scheduler.chain.pair(0, -1).snr_t) ** -0.5
    h = np.linspace(-1 - 9 * std, 1 + 9 * std, 20001)
    joint = np.array([0.7, 0.1, 0.2])[:, None] * np.exp(-((h - LEVELS[[0, 128, 255], None]) ** 2) / (2 * std**2))
    joint /= std * math.sqrt(2 * math.pi)
    entropy = -np.trapezoid((joint * np.log2(joint / joint.sum(0))).sum(0), h)
    assert result.decoder == pytest.approx(entropy, abs=4 * result.standard_errors["decoder"])
    assert fit.decoder_costs[0][0] / math.log(2) == pytest.approx(entropy, rel=0.03)


def test_levels_take_a_coin_to_its_entropy():
    scheduler = DDPMNotesScheduler(num_train_timesteps=300, beta_end=0.06)
    pipeline = DDPMNotesPipeline(CoinDenoiser.from_scheduler(scheduler, sample_size=8), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    coins = to_uint8(pipeline.unet.images(96, torch.Generator().manual_seed(0)))
    before = pipeline.bits_per_dim(coins[64:])
    fit = fit_levels(pipeline, coins[:64])
    pipeline.scheduler = DDPMNotesScheduler.from_config(scheduler.config, levels=fit.levels)
    after = pipeline.bits_per_dim(coins[64:])
    assert before.decoder > 0.4
    assert after.decoder < 1e-3
    assert after.total == pytest.approx(1, abs=0.02 + 3 * after.standard_error)


@pytest.mark.slow
def test_with_levels_few_evaluations_have_the_mean_of_the_full_sum_and_the_errors_they_say():
    """Over 20 seeds: a guess that snaps to the wrong level is rare and costs much."""
    scheduler = DDPMNotesScheduler(num_train_timesteps=300, beta_end=0.06)
    pipeline, images = plain_sight(scheduler, size=4), three_levels(64, size=4)
    levels = fit_levels(pipeline, three_levels(100, size=4, seed=1)).levels
    assert len(levels["guess_blur"]) > 2
    pipeline.scheduler = DDPMNotesScheduler.from_config(scheduler.config, levels=levels)
    full = [pipeline.bits_per_dim(images, full=True, seed=seed) for seed in range(20)]
    few = [pipeline.bits_per_dim(images, seed=seed) for seed in range(20)]
    truth, of_truth = (np.mean([result.total for result in full]), np.std([result.total for result in full], ddof=1))
    totals, spread = [result.total for result in few], np.std([result.total for result in few], ddof=1)
    assert abs(np.mean(totals) - truth) < 3.5 * math.hypot(spread, of_truth) / math.sqrt(20)
    # the images are the same each time: their own spread, which the standard error has too, is not
    of_images = np.stack([result.per_image.numpy() for result in full]).mean(0).var(ddof=1) / 64
    said = math.sqrt(np.mean([result.standard_error**2 for result in few]) - of_images)
    assert 0.6 < spread / said < 1.5
    assert sum(abs(result.total - truth) < 1.96 * result.standard_error for result in few) >= 17


def test_with_levels_the_best_path_may_end_above_0_and_its_bound_is_not_higher():
    """A coin is known from x_t long before t = 0: the steps below cost, the decoder does not."""
    scheduler = DDPMNotesScheduler(num_train_timesteps=300, beta_end=0.06)
    pipeline = DDPMNotesPipeline(CoinDenoiser.from_scheduler(scheduler, sample_size=16), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    coins = to_uint8(pipeline.unet.images(128, torch.Generator().manual_seed(0)))
    levels = fit_levels(pipeline, coins[:64]).levels
    pipeline.scheduler = DDPMNotesScheduler.from_config(scheduler.config, levels=levels)
    mse = measure_original_sample_mse(pipeline, coins[:64], timesteps_per_image=300).original_sample_mse
    pipeline.scheduler = optimal_scheduler(pipeline.scheduler, mse)
    free, to_zero = (best_timesteps(pipeline.scheduler, 5, decoder_costs=costs) for costs in (None, {0: 0.0}))
    assert free[-1] > 0 and to_zero[-1] == 0 and free[0] == to_zero[0] == 299
    results = [pipeline.bits_per_dim(coins[64:], timesteps=path) for path in (free, to_zero)]
    difference = results[0].per_image - results[1].per_image
    assert float(difference.mean()) < 2 * float(difference.std()) / math.sqrt(len(difference))
    # what the path was chosen by is what it costs
    cost = sum(step_costs(pipeline.scheduler)[t, s] for t, s in itertools.pairwise(free))
    cost += levels["decoder_costs"][free[-1]]
    expected = cost / math.log(2) + results[0].prior
    assert results[0].total == pytest.approx(expected, abs=4 * results[0].standard_error)


def test_the_best_path_of_a_learned_variance_ends_at_its_own_decoder():
    """The network gives each pixel's decoder its blur at timestep 0 alone."""
    levels = {"weights": [[1.0] * 256], "decoder_blur": {0: 0.1, 9: 0.1}, "guess_blur": {}}
    levels |= {"decoder_costs": {0: 0.5, 9: 0.4}, "decoder_scale": 1.0}
    ends = {}
    for variance, scale in (("optimal", 1.0), ("learned_range", 1.0), ("learned_range", None)):
        scheduler = DDPMNotesScheduler(
            40,
            beta_end=0.4,
            variance_type=variance,
            original_sample_mse=[0.1] * 40,
            levels=levels | {"decoder_scale": scale},
        )
        ends[variance, scale] = best_timesteps(scheduler, 5)[-1]
    assert ends == {("optimal", 1.0): 9, ("learned_range", 1.0): 0, ("learned_range", None): 9}


def test_a_learned_variance_has_the_cost_of_one_blur_beside_its_own():
    """best_timesteps is about "optimal", whose decoder has one blur for all pixels."""
    scheduler = noisy_start(variance_type="learned_range")
    pipeline = plain_sight(scheduler, size=8)
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, t, **settings: (torch.cat([forward(x, t, **settings)[0], 9 * x], 1),)
    fit = fit_levels(pipeline, three_levels(64, 8))
    costs = fit.levels["decoder_costs"]
    assert costs[0] != pytest.approx(fit.decoder_costs[0][0], rel=1e-3)
    assert costs[5] == pytest.approx(fit.decoder_costs[5][0], rel=1e-5)
    pipeline.scheduler = DDPMNotesScheduler.from_config(
        scheduler.config, variance_type="fixed_small", levels=fit.levels
    )
    result = pipeline.bits_per_dim(three_levels(400, 8), timesteps=[0])
    error = math.hypot(result.standard_errors["decoder"], fit.decoder_costs[0][1] / math.log(2))
    assert costs[0] / math.log(2) == pytest.approx(result.decoder, abs=3 * error)
    assert abs(fit.decoder_costs[0][0] / math.log(2) - result.decoder) > 5 * error


@pytest.mark.parametrize("channels", [1, 2])
def test_the_likeliest_gamma_and_precision_are_those_of_a_grid(channels):
    """The second channel has the other shares of 0 and 255, and pixels of its own."""
    generator = torch.Generator().manual_seed(3)
    images = torch.cat([three_levels(64, 4), 255 - three_levels(64, 4, seed=1)], dim=1)[:, :channels]
    images[images == 127] = 128
    x_0 = to_model_range(images).flatten(2).double()
    raw = 0.8 * x_0 + 0.5 * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    guess = Guesses(0, raw, raw, None, torch.ones_like(raw))
    shares = torch.zeros(channels, 256, dtype=torch.float64)
    shares[:, [0, 128, 255]] = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.1, 0.7]]).double()[:channels]
    gamma, precision = most_likely(shares, x_0, guess)

    def mean_log_likelihood(gamma, precision):
        levels = torch.tensor(LEVELS[[0, 128, 255]])
        log_shares = shares[:, None, [0, 128, 255]].log()  # of each channel's pixels
        logits = gamma * log_shares - precision * (levels - raw[..., None]) ** 2 / 2
        own = (x_0[..., None] - levels).abs().argmin(-1)
        return float(logits.log_softmax(-1).gather(-1, own[..., None]).mean())

    best = mean_log_likelihood(gamma, precision)
    for other in [
        (gamma + 0.02, precision),
        (gamma - 0.02, precision),
        (gamma, precision * 1.03),
        (gamma, precision / 1.03),
    ]:
        assert mean_log_likelihood(*other) < best
    fixed, one = most_likely(shares, x_0, guess, gamma=1.0)
    assert fixed == 1
    assert all(mean_log_likelihood(1, one) > mean_log_likelihood(1, one * factor) for factor in (0.97, 1.03))


def test_a_learned_variance_scales_each_pixels_blur():
    """Pixels whose guesses are noisier by a known variance: the scale is 1, one blur is worse."""
    generator = torch.Generator().manual_seed(4)
    x_0 = to_model_range(three_levels(64)).flatten(2).double()
    variance = torch.where(torch.rand(x_0.shape, generator=generator) < 0.5, 0.05, 1.5).double()
    raw = x_0 + variance.sqrt() * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    shares = torch.zeros(1, 256, dtype=torch.float64)
    shares[0, [0, 128, 255]] = torch.tensor([0.7, 0.1, 0.2]).double()
    gamma, precision = most_likely(shares, x_0, Guesses(0, raw, raw, variance, torch.ones_like(raw)))
    assert 1 / precision == pytest.approx(1, rel=0.06)
    assert gamma == pytest.approx(1, abs=0.06)


def test_the_fit_does_not_depend_on_batches_and_ignores_levels_that_are_there():
    pipeline, images = plain_sight(size=8), three_levels(16, 8)
    fit = fit_levels(pipeline, images)
    assert fit_levels(pipeline, images.split(5), batch_size=7).levels == fit.levels
    assert fit_levels(pipeline, images, seed=1).levels != fit.levels
    pipeline.scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config, levels=fit.levels)
    assert fit_levels(pipeline, images).levels == fit.levels


def test_counts_of_the_whole_set_give_weights_to_levels_that_the_images_lack():
    pipeline, images = plain_sight(size=8), three_levels(8, 8)
    whole = images.clone()
    whole[0, 0, 0, 0] = 99
    assert fit_levels(pipeline, images, counts=level_counts([whole])).levels["weights"][0][99] > 0


def test_levels_are_counted_by_channel():
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    counts = level_counts(images.split(3))
    assert counts.tolist() == [np.bincount(images[:, c].flatten().numpy(), minlength=256).tolist() for c in range(3)]
    with pytest.raises(ValueError, match="at least one image"):
        level_counts([])


def test_each_channel_has_the_shares_of_its_own_levels():
    """The second channel is the first upside down: 255 is as likely there as 0 is here."""
    first = three_levels(64, 8)
    images = torch.cat([first, 255 - first], dim=1)
    fit = fit_levels(plain_sight(size=8, channels=2), images)
    weights = torch.tensor(fit.levels["weights"])
    # 1 - 128/255 is level 127
    assert [row.nonzero().flatten().tolist() for row in weights] == [[0, 128, 255], [0, 127, 255]]
    torch.testing.assert_close(weights[1], weights[0].flip(0), rtol=1e-5, atol=1e-7)
    assert weights[0][0] > 0.5 > 0.35 > weights[0][255]
    assert fit.gamma == pytest.approx(1, abs=0.1)  # not if the shares were those of the other channel


def test_an_eta_of_the_scheduler_does_not_touch_the_fit():
    """A bound has none: steps of variance 0 would give every error infinite weight."""
    pipeline, images = plain_sight(size=8), three_levels(16, 8)
    expected = fit_levels(pipeline, images)
    pipeline.scheduler = DDPMNotesScheduler.from_config(pipeline.scheduler.config, eta=0.0)
    found = fit_levels(pipeline, images)
    assert found.levels == expected.levels and found.decoder_costs == expected.decoder_costs


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        fit_levels(plain_sight(size=8), [], counts=level_counts([three_levels(2, 8)]))


def test_the_guess_is_refined_by_the_blur_of_least_squared_error():
    """Of a plain sight the best mean is that of Bayes' rule: the blur is that of the noise."""
    pipeline = plain_sight()
    fit = fit_levels(pipeline, three_levels(128))
    refined = fit.levels["guess_blur"]
    assert len(refined) > 5
    for t in list(refined)[:4]:
        assert refined[t] == pytest.approx(1 / float(pipeline.scheduler.chain.pair(t, -1).snr_t), rel=0.2)
        assert fit.guess_errors[t][1] < fit.guess_errors[t][0]


def test_a_guess_that_is_bayes_rule_already_is_left_alone():
    """Refining tanh by the same rule would sharpen it twice."""
    pipeline = DDPMNotesPipeline(CoinDenoiser.from_scheduler(noisy_start(), sample_size=16), noisy_start())
    pipeline.set_progress_bar_config(disable=True)
    coins = to_uint8(pipeline.unet.images(64, torch.Generator().manual_seed(0)))
    assert fit_levels(pipeline, coins).levels["guess_blur"] == {}


def test_levels_that_all_occur_alike_say_next_to_nothing_and_the_guess_stays():
    pipeline = plain_sight(DDPMNotesScheduler(T, beta_start=1e-4, beta_end=2e-4, clip_sample=False), 8)
    # none near black or white, beyond which a guess is surely wrong
    images = torch.randint(60, 190, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fit = fit_levels(pipeline, images, counts=torch.ones(1, 256, dtype=torch.int64))
    assert fit.levels["guess_blur"] == {}
    assert fit.guess_errors[1][1] == pytest.approx(fit.guess_errors[1][0], rel=0.01)


def test_squared_errors_are_weighted_as_in_the_bound():
    """fixed_large weighs them by posterior variance / b of each step."""
    small, large = (plain_sight(noisy_start(variance_type=f"fixed_{size}"), 8) for size in ("small", "large"))
    errors = [fit_levels(pipeline, three_levels(16, 8)).guess_errors for pipeline in (small, large)]
    for t in list(errors[0])[:5]:
        pair = small.scheduler.chain.pair(t, t - 1)
        expected = errors[0][t][0] * float(pair.posterior_variance / pair.b)
        assert errors[1][t][0] == pytest.approx(expected, rel=1e-5)


def test_other_schedulers_have_no_levels_to_fit():
    from diffusers import DDIMScheduler

    pipeline = DDPMNotesPipeline(plain_sight().unet, DDIMScheduler())
    with pytest.raises(ValueError, match="must be a DDPMNotesScheduler"):
        fit_levels(pipeline, three_levels(2))
