"""Measured variances against exact ones, best paths against a search through all of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_notes_pipeline.oracles import CoinDenoiser
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from ddpm_notes_pipeline.variances import (
    best_timesteps,
    measure_original_sample_mse,
    optimal_scheduler,
    prior_costs,
    step_costs,
)


def coin(T=1000, **settings):
    scheduler = DDPMNotesScheduler(**{"num_train_timesteps": T, "clip_sample": False, **settings})
    pipe = DDPMNotesPipeline(CoinDenoiser.from_scheduler(scheduler, sample_size=8), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def coin_images(n):
    return (torch.randint(0, 2, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def coin_mse():
    return coin().unet.denoising_error(torch.arange(1000)).double()


def test_the_measured_error_is_the_exact_one_within_its_standard_error(coin_mse):
    measured = measure_original_sample_mse(coin(), coin_images(500), timesteps_per_image=64)
    assert measured.network_evaluations == 500 * 64 == int(measured.counts.sum())
    where = (coin_mse > 0.05) & (coin_mse < 0.95)  # where an error of 32 images of 64 pixels is near to normal
    z = ((measured.original_sample_mse - coin_mse) / measured.standard_error)[where]
    assert abs(float(z.mean())) < 0.25 and 0.8 < float(z.std()) < 1.3
    assert float((measured.original_sample_mse - coin_mse).abs().max()) < 0.06


def test_the_measurement_depends_neither_on_the_batches_nor_on_the_processes():
    class Process:  # of two; sums of both are added up below
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, rank):
            self.process_index, self.sums = rank, None

        def reduce(self, sums, _):
            self.sums = sums
            return torch.ones_like(sums) * 2

    pipe, images = coin(T=20), coin_images(30)
    whole = measure_original_sample_mse(pipe, images, timesteps_per_image=8)
    streamed = measure_original_sample_mse(pipe, iter(images.split(7)), timesteps_per_image=8, batch_size=11)
    torch.testing.assert_close(streamed.original_sample_mse, whole.original_sample_mse, rtol=1e-6, atol=1e-9)
    processes = [Process(0), Process(1)]
    for process in processes:
        measure_original_sample_mse(pipe, images.split(7), timesteps_per_image=8, accelerator=process)
    count, total, _ = processes[0].sums + processes[1].sums
    torch.testing.assert_close(total / count, whole.original_sample_mse, rtol=1e-6, atol=1e-9)


def test_a_decoder_that_is_sure_brings_the_coin_below_1_01_bits(coin_mse):
    """pv(1, 0) costs the coin half a bit: a variance of 1e-6 saves it (1.5167 -> below 1.01)."""
    pipe, images = coin(), coin_images(100)
    pipe.scheduler = optimal_scheduler(pipe.scheduler, coin_mse, 1e-6)
    result = pipe.bits_per_dim(images)
    assert result.decoder < 1e-3
    assert result.total < 1.01 + 2 * result.standard_error and result.standard_error < 0.02


def test_costs_of_a_step_are_half_the_log_of_optimal_over_posterior_variance(coin_mse):
    costs = step_costs(coin().scheduler, coin_mse)
    scheduler = optimal_scheduler(coin().scheduler, coin_mse)
    x = torch.zeros(1, 1, dtype=torch.float64)
    for t, s in [(999, 0), (500, 400), (30, 29)]:
        optimal = float(scheduler.reverse_mean_variance(x, x, t, s)[1])
        posterior = float(scheduler.posterior_mean_variance(x, x, t, s)[1])
        assert costs[t, s] == pytest.approx(0.5 * math.log(optimal / posterior), rel=1e-9)
    assert np.isinf(costs[5, 5]) and np.isinf(costs[5, 6])


def test_the_best_ten_steps_of_the_coin(coin_mse):
    """1.150355 bits/dim against 4.902171 of ten even steps with the same ends."""
    scheduler = coin().scheduler
    costs = step_costs(scheduler, coin_mse)
    best = best_timesteps(scheduler, 10, coin_mse)
    even = np.linspace(0, 999, 10).round()[::-1].astype(int).tolist()
    bits = [sum(costs[t, s] for t, s in itertools.pairwise(path)) / math.log(2) for path in (best, even)]
    assert (best[0], best[-1], len(best)) == (999, 0, 10)
    assert bits[0] == pytest.approx(1.150355, abs=1e-6) and bits[1] == pytest.approx(4.902171, abs=1e-6)
    scheduler.set_timesteps(timesteps=best)
    assert scheduler.timesteps.tolist() == best


@pytest.mark.parametrize("K", [1, 2, 4, 11])
def test_the_best_path_is_the_best_of_all_paths(K):
    """Every path of K of 11 timesteps, with free ends, one by one."""
    generator = np.random.default_rng(K)
    scheduler = DDPMNotesScheduler(11, beta_end=0.5)
    mse, start, end = generator.random(11), generator.random(11), {t: generator.random() for t in range(5)}
    costs = step_costs(scheduler, mse)

    def cost(path):
        return start[path[0]] + sum(costs[t, s] for t, s in itertools.pairwise(path)) + end.get(path[-1], math.inf)

    every = [tuple(reversed(path)) for path in itertools.combinations(range(11), K)]
    found = best_timesteps(scheduler, K, mse, start, end)
    assert cost(found) == pytest.approx(min(map(cost, every)), rel=1e-12)


def test_all_paths_cost_the_same_on_gaussian_data():
    """log(1 + (SNR_s - SNR_t) V_t) / 2 telescopes when V is a Gaussian's."""
    scheduler = DDPMNotesScheduler()
    alpha_bar = scheduler.chain.log_alpha_bar[:-1].exp().numpy()
    costs = step_costs(scheduler, 0.25 * (1 - alpha_bar) / (0.25 * alpha_bar + 1 - alpha_bar))
    sums = [
        sum(costs[t, s] for t, s in itertools.pairwise(path))
        for path in ([999, 0], [999, 500, 3, 0], list(range(999, -1, -1)))
    ]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-10)


def test_prior_costs_are_the_schedulers_prior_kl():
    scheduler = DDPMNotesScheduler(50)
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = prior_costs(scheduler, float(x.pow(2).mean()))
    for t in (0, 20, 49):
        assert costs[t] == pytest.approx(float(scheduler.prior_kl(x, t).mean()) / 3, rel=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("K", [10, 25, 100])
def test_optimal_is_below_the_fixed_variances_on_the_data_it_was_measured_on(K, variance):
    """Also for a network whose eps is 2 % too large, where the score-norm formula fails."""
    pipe, images = coin(), coin_images(128)
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, **kwargs: (forward(x, t, **kwargs)[0] * 1.02,)
    mse = measure_original_sample_mse(pipe, images, timesteps_per_image=128).original_sample_mse
    path = np.linspace(0, 999, K).round()[::-1].astype(int).tolist()
    config = DDPMNotesScheduler.from_config(pipe.scheduler.config, decoder_variance=1e-3).config
    totals = {}
    for name in ("optimal", variance):
        pipe.scheduler = DDPMNotesScheduler.from_config(config, variance_type=name, original_sample_mse=mse)
        totals[name] = pipe.bits_per_dim(images, timesteps=path, full=True).total
    assert totals["optimal"] < totals[variance]


def test_bad_input_is_refused():
    pipe = coin(T=100)
    with pytest.raises(ValueError, match=r"1 images at 4 timesteps.*about 100 images"):
        measure_original_sample_mse(pipe, coin_images(1), timesteps_per_image=4)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        best_timesteps(pipe.scheduler, 0, np.ones(100))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        best_timesteps(pipe.scheduler, 3, np.ones(5))
    with pytest.raises(ValueError, match="no path of so many steps"):
        best_timesteps(pipe.scheduler, 1, np.ones(100))


class WrongByLabel(CoinDenoiser):
    """The exact denoiser, but for label k it adds 0.1 k to x_0."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        output = super().forward(sample, timestep).sample + 0.1 * class_labels[:, None, None, None]
        return UNet2DOutput(sample=output) if return_dict else (output,)

    class_embedding = True  # so that the pipeline gives it labels


def test_the_error_of_each_image_is_that_under_its_own_label():
    """Labels 0 to 3 in equal numbers add the mean of (0.1 k)^2 to the error of every timestep."""
    scheduler = DDPMNotesScheduler(num_train_timesteps=20, clip_sample=False, prediction_type="sample")
    network = WrongByLabel.from_scheduler(scheduler, sample_size=8)
    pipe = DDPMNotesPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images, labels = coin_images(40), torch.arange(40) % 4
    measure = {"images": images, "timesteps_per_image": 20, "batch_size": 7}
    plain = measure_original_sample_mse(pipe, class_labels=torch.zeros(40, dtype=torch.long), **measure)
    wrong = measure_original_sample_mse(pipe, class_labels=labels, **measure)
    shift = wrong.original_sample_mse - plain.original_sample_mse
    # The cross term 2 (0.1 k) E[error] has mean 0, and over 40 images of 64 pixels a standard error
    # below 0.006.
    assert float((shift - 0.035).abs().max()) < 0.02
    assert float(shift.mean()) == pytest.approx(0.035, abs=0.003)
