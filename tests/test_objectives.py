"""Each objective against its formula, each way of drawing t against the mean over all t."""

import math

import pytest
import torch

from ddpm_notes_pipeline.objectives import Objective, TimestepSampler
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from tests.support.devices import DEVICE
from tests.support.no_sync import META, no_sync

T = 8


def scheduler(**settings):
    return DDPMNotesScheduler(
        **{"num_train_timesteps": T, "beta_start": 0.02, "beta_end": 0.4, "clip_sample": False, **settings}
    )


def batch(n=T, channels=2):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (n, channels, 4, 4), generator=generator)
    return (levels / 127.5 - 1).to(DEVICE), torch.randn(n, channels, 4, 4, generator=generator).to(DEVICE)


def smooth(x, t):
    return torch.sin(2 * x) * (1 + 0.1 * t.to(x.device).reshape(-1, 1, 1, 1))


class Network(torch.nn.Module):
    """Something smooth, of t and x_t, whose outputs can be asked for gradients."""

    def __init__(self, doubled=False):
        super().__init__()
        self.doubled, self.output = doubled, None

    def forward(self, x, t, class_labels=None, return_dict=True):
        out = smooth(x, t)
        self.output = torch.cat([out, 0.3 * torch.cos(x)], dim=1) if self.doubled else out
        self.output.requires_grad_()
        return (self.output,)


def alpha_bars(math_of):
    betas = torch.linspace(0.02, 0.4, T, dtype=torch.float64)
    assert torch.allclose(betas.float(), math_of.betas)
    return torch.cumprod(1 - betas, 0).to(DEVICE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_simple_is_the_squared_error_of_what_the_network_predicts(prediction_type):
    math_of, network, (x_0, noise), t = scheduler(prediction_type=prediction_type), Network(), batch(), torch.arange(T)
    ab = alpha_bars(math_of).float().reshape(-1, 1, 1, 1)
    losses = Objective(math_of)(network, x_0, noise, t)
    x_t = ab.sqrt() * x_0 + (1 - ab).sqrt() * noise
    target = {"epsilon": noise, "sample": x_0, "v_prediction": ab.sqrt() * noise - (1 - ab).sqrt() * x_0}[
        prediction_type
    ]
    expected = ((smooth(x_t, t) - target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_vlb_averages_over_t_to_the_bound_in_bits_per_dim():
    """On one noise at every t, the mean loss is the sum of the chain's terms over dims ln 2."""
    math_of, network, (x_0, noise) = scheduler(variance_type="learned_range"), Network(doubled=True), batch(1)
    losses = Objective(math_of, "vlb")(network, x_0.expand(T, -1, -1, -1), noise.expand(T, -1, -1, -1), torch.arange(T))
    total = 0.0
    for t in range(T):
        x_t = math_of.add_noise(x_0, noise, t)
        (output,) = network(x_t, torch.tensor([t]))
        total += float(math_of.vlb_terms(output, x_0, x_t, t, t - 1).detach())
    assert float(losses.mean()) == pytest.approx(total / (x_0[0].numel() * math.log(2)), rel=1e-5)


def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_a_thousandth_of_the_bound():
    """By the gradients of the two halves of the output (arXiv 2102.09672, eq. 16)."""
    math_of, (x_0, noise), t = scheduler(variance_type="learned_range"), batch(), torch.arange(T)
    network = Network(doubled=True)

    def gradient(objective):
        loss = objective(network, x_0, noise, t).sum()
        return torch.autograd.grad(loss, network.output)[0].chunk(2, dim=1)

    mean, variance = gradient(Objective(math_of, "hybrid"))
    _, of_the_bound = gradient(Objective(math_of, "vlb"))
    x_t = math_of.add_noise(x_0, noise, t)
    error = smooth(x_t, t) - noise
    torch.testing.assert_close(mean, 2 * error / error[0].numel(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(variance, 0.001 * of_the_bound, rtol=1e-4, atol=1e-9)
    assert float(variance.abs().min(1).values.max()) > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_means_the_same_in_every_parametrisation(prediction_type):
    """It weighs the error of x_0 (arXiv 2303.09556), whatever the network predicts."""
    math_of, (x_0, noise), t = scheduler(prediction_type=prediction_type), batch(), torch.arange(T)
    ab = alpha_bars(math_of).float().reshape(-1, 1, 1, 1)
    belief = torch.tanh(x_0 + 0.3)

    def network(x_t, _, **kwargs):
        eps = (x_t - ab.sqrt() * belief) / (1 - ab).sqrt()
        return (
            {"epsilon": eps, "sample": belief, "v_prediction": ab.sqrt() * eps - (1 - ab).sqrt() * belief}[
                prediction_type
            ],
        )

    losses = Objective(math_of, weighting="min_snr")(network, x_0, noise, t)
    snr = (ab / (1 - ab)).flatten()
    expected = snr.clamp(max=5.0) * ((x_0 - belief) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "loss_second_moment"])
def test_drawing_t_leaves_the_mean_over_t_as_it_is(sampling):
    """The average of weight x loss over a fine grid of u and all positions is the mean over t."""
    sampler = TimestepSampler(T, sampling, history=2, uniform_share=0.01)
    losses = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05], dtype=torch.float64)
    for _ in range(2):
        sampler.update(torch.arange(T), losses * 1.1)
    B, grid = 4, (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    means = []
    for position in range(B):
        t, weight = sampler.sample(grid, torch.full(grid.shape, position), B)
        means.append((weight * losses[t]).mean())
        assert int(t.min()) >= 0 and int(t.max()) < T
    assert float(torch.stack(means).mean()) == pytest.approx(float(losses.mean()), rel=1e-4)
    if sampling == "stratified":
        assert abs(float(means[0] - means[-1])) > 1  # each position has timesteps of its own
    if sampling == "loss_second_moment":
        t, _ = sampler.sample(grid, torch.zeros(grid.shape), B)
        share = torch.bincount(t, minlength=T) / len(t)
        torch.testing.assert_close(share.double(), 0.99 * losses / losses.sum() + 0.01 / T, rtol=0, atol=1e-4)


def test_loss_second_moment_is_uniform_until_it_has_seen_every_timestep():
    sampler = TimestepSampler(T, "loss_second_moment", history=3)
    for _ in range(3):
        sampler.update(torch.arange(T - 1), torch.rand(T - 1))
    torch.testing.assert_close(sampler.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
    sampler.update(torch.full((3,), T - 1), torch.full((3,), 100.0))
    assert int(sampler.probabilities().argmax()) == T - 1
    again = TimestepSampler(T, "loss_second_moment", history=3)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.probabilities(), sampler.probabilities())
    with pytest.raises(ValueError, match="losses has shape"):
        TimestepSampler(T + 1, "loss_second_moment", history=3).load_state_dict(sampler.state_dict())


def test_only_the_newest_losses_count():
    sampler = TimestepSampler(2, "loss_second_moment", history=2, uniform_share=0.0)
    for loss in (50.0, 3.0, 4.0):
        sampler.update(torch.tensor([0, 1]), torch.tensor([loss, 5.0]))
    expected = math.sqrt((9 + 16) / 2)
    assert float(sampler.probabilities()[0]) == pytest.approx(expected / (expected + 5))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="kind is 'mse'"):
        Objective(scheduler(), "mse")
    with pytest.raises(ValueError, match="weighting is 'edm'"):
        Objective(scheduler(), weighting="edm")
    with pytest.raises(ValueError, match="'hybrid' with variance_type 'fixed_small'"):
        Objective(scheduler(), "hybrid")
    with pytest.raises(ValueError, match="never train"):
        Objective(scheduler(variance_type="learned_range"))
    with pytest.raises(ValueError, match="the bound itself"):
        Objective(scheduler(), "vlb", "min_snr")
    with pytest.raises(ValueError, match="sampling is 'random'"):
        TimestepSampler(T, "random")


def test_the_levels_of_a_scheduler_have_no_part_in_a_loss():
    levels = {"weights": [[1.0] * 256] * 2, "decoder_blur": {0: 1e-3}, "guess_blur": {0: 1e-3, 7: 1e-3}}
    (x_0, noise), t, network = batch(), torch.arange(T), Network()
    plain, with_levels = (Objective(scheduler(levels=given), "vlb") for given in (None, levels))
    assert torch.equal(plain(network, x_0, noise, t), with_levels(network, x_0, noise, t))


OF_A_DEVICE = [
    ("simple", "fixed_small", "none"),
    ("simple", "fixed_small", "min_snr"),
    ("hybrid", "learned_range", "min_snr"),
    ("vlb", "learned", "none"),
    ("vlb", "fixed_large", "none"),
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("kind, variance_type, weighting", OF_A_DEVICE)
def test_no_loss_or_gradient_waits_for_the_device(kind, variance_type, weighting, where, prediction_type):
    """With timesteps on the CPU, where training draws them, and on the device."""
    math_of = scheduler(variance_type=variance_type, prediction_type=prediction_type)
    objective = Objective(math_of, kind, weighting)
    network = torch.nn.Conv2d(2, 4 if variance_type.startswith("learned") else 2, 1, device=META)
    x_0, noise = (images.to(META) for images in batch())
    t = torch.arange(T, device=where)
    with no_sync():
        losses = objective(lambda x, t, **_: (network(x) + t.reshape(-1, 1, 1, 1),), x_0, noise, t)
        losses.mean().backward()
    assert losses.shape == (T,) and losses.device == network.weight.grad.device == META


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_timesteps_are_drawn_where_the_uniform_numbers_are(sampling):
    u, position = torch.rand(4, dtype=torch.float64, device=META), torch.arange(4, device=META)
    with no_sync():
        t, weight = TimestepSampler(T, sampling).sample(u, position, 4)
    assert t.device == weight.device == META


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "loss_second_moment"])
def test_the_default_device_of_torch_changes_no_timestep(sampling):
    u, position = torch.linspace(0, 0.99, 4, dtype=torch.float64), torch.arange(4)

    def drawn():
        sampler = TimestepSampler(T, sampling, history=1)
        sampler.update(*seen)
        return sampler.sample(u, position, 4)

    seen = torch.arange(T), torch.arange(1.0, T + 1)
    expected = drawn()
    with META:
        found = drawn()
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
