# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The notes on DDPM, run
#
# The notes lead from maximum likelihood to the two algorithms of DDPM, and this notebook follows
# them. Each section states what a figure of the notes says, names the function that implements the
# equation, runs it, and checks it against a formula if there is one. If the library were wrong, a
# cell would fail with an `AssertionError`.
#
# **Counting.** The notes count $t = 1, \dots, T$. The library counts $t = 0, \dots, T-1$, as
# diffusers does, and $s = -1$ stands for the image $x_0$ itself. A step goes from $t$ to some
# $s < t$; the notes' step has $s = t - 1$. We write
#
# $$\bar\alpha_t = \prod_{i \le t} (1 - \beta_i), \qquad a = \bar\alpha_t / \bar\alpha_s,
# \qquad b = 1 - a, \qquad
# \mathrm{SNR}_t = \frac{\bar\alpha_t}{1 - \bar\alpha_t}.$$
#
# An 8-bit pixel $k = 0, \dots, 255$ is the number $x = k / 127.5 - 1$ in $[-1, 1]$. Bits are
# counted per pixel and channel: *bits/dim*.
#
# The whole notebook takes a few minutes on two CPU cores and needs no network.

# %%
import math
import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch

warnings.filterwarnings("ignore", message="IProgress")  # tqdm without ipywidgets

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.oracles import CoinDenoiser, GaussianDenoiser

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10, "legend.fontsize": 9})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})


def seeded(seed=0):
    """A new random generator for each use, so that every cell always gives the same numbers."""
    return torch.Generator().manual_seed(seed)


# The schedule again, in plain numpy, to check the library against.
T = 1000
beta = np.linspace(1e-4, 0.02, T)
alpha_bar = np.cumprod(1 - beta)
snr = alpha_bar / (1 - alpha_bar)

# %% [markdown]
# ## 1. Maximum likelihood is minimum KL divergence (figures 0 and 1)
#
# We want a model $P_\theta$ that gives the data a high probability. On average over the data
#
# $$\mathbb{E}_{x \sim P_{data}}\left[-\log_2 P_\theta(x)\right] =
# H(P_{data}) + \mathrm{KL}(P_{data} \,\|\, P_\theta).$$
#
# The entropy $H$ does not depend on the model. So the model of maximum likelihood is the one of
# minimum KL divergence. Take a fair coin, whose entropy is one bit, and a model that gives heads
# the probability $\theta$. The shaded gap below is the KL divergence.

# %%
theta = np.linspace(0.02, 0.98, 193)
entropy = 1.0
code_length = -0.5 * np.log2(theta) - 0.5 * np.log2(1 - theta)
kl = 0.5 * np.log2(0.5 / theta) + 0.5 * np.log2(0.5 / (1 - theta))
assert np.allclose(code_length, entropy + kl)
assert np.isclose(theta[code_length.argmin()], 0.5) and np.isclose(theta[kl.argmin()], 0.5)

figure, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(theta, code_length, label=r"average of $-\log_2 P_\theta(x)$")
axis.axhline(entropy, color="black", linestyle="--", label="entropy of the data")
axis.fill_between(theta, entropy, code_length, alpha=0.2, label="KL(data, model)")
axis.set(xlabel=r"the model's probability of heads, $\theta$", ylabel="bits", ylim=(0, 3))
axis.legend()
plt.show()

# %% [markdown]
# The same for a DDPM. The data are images of coins: each pixel is $-1$ or $1$. For such data the
# best possible network has a closed form,
# $E[x_0 \mid x_t] = \tanh(\sqrt{\bar\alpha_t}\, x_t / (1 - \bar\alpha_t))$, so nothing has to be
# trained.
#
# **`pipe.bits_per_dim(images)`** gives an upper bound on $-\log_2 P_\theta(x)$ per pixel. Minus the
# entropy, it bounds the KL divergence that the model still misses.
#
# The bound has a closed form here. Its three parts are explained in section 4.
# $V_t = E|x_0 - E[x_0 \mid x_t]|^2$ is the error of the best network.

# %%
scheduler = DDPMNotesScheduler()  # linear betas, T = 1000, the variance called "fixed_small"
coin = CoinDenoiser.from_scheduler(scheduler, sample_size=16)
pipe = DDPMNotesPipeline(coin, scheduler)
pipe.set_progress_bar_config(disable=True)


def normal_cdf(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def coin_bound(alpha_bar, V):
    """Prior, KLs of the steps and decoder in bits/dim, for coins, the best network, fixed_small."""
    snr = alpha_bar / (1 - alpha_bar)
    prior = -0.5 * np.log2(1 - alpha_bar[-1])
    kls = (snr[:-1] - snr[1:]) / 2 * V[1:] / math.log(2)
    variance = (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * (1 - alpha_bar[1] / alpha_bar[0])
    decoder = -math.log2(normal_cdf(1 / 255 / math.sqrt(variance)))
    return prior, kls, decoder


V = coin.denoising_error(torch.arange(T)).numpy()
prior, kls, decoder = coin_bound(alpha_bar, V)
result = pipe.bits_per_dim(coin.images(12, seeded()), full=True)

print("bits/dim        measured            closed form")
print(f"prior           {result.prior:.6f}            {prior:.6f}")
print(f"KLs of steps    {result.diffusion:.4f} +- {result.standard_errors['diffusion']:.4f}    {kls.sum():.6f}")
print(f"decoder         {result.decoder:.6f}            {decoder:.6f}")
print(f"total           {result.total:.4f} +- {result.standard_error:.4f}    {prior + kls.sum() + decoder:.6f}")
print(f"the model still misses at most {result.total - coin.entropy:.4f} bits/dim of KL divergence")
assert abs(result.prior - prior) < 1e-8
assert abs(result.diffusion - kls.sum()) < 5 * result.standard_errors["diffusion"]
assert abs(result.decoder - decoder) < 1e-5

# %% [markdown]
# The network is perfect, yet the bound exceeds the entropy. Nearly all of the gap is the decoder,
# whose variance is only a convention. The KLs alone come very close to the entropy, and not by
# accident: for discrete data $\int_0^\infty \tfrac12 V \, d\mathrm{SNR} = H$, and the KLs are that
# integral cut into $T$ steps.
#
# ## 2. A VAE's decoder is a Gaussian (figures 2 and 3)
#
# A VAE draws $z$, and the network predicts the image: $P(x \mid z) = \mathcal N(G(z), \sigma^2 I)$.
# Then
#
# $$-\log P(x \mid z) = \frac{\|x - G(z)\|^2}{2 \sigma^2} + \text{const}.$$
#
# So the maximum-likelihood mean is the least-squares mean. DDPM's last step, from $x_1$ to the
# image, is such a decoder. Since pixels have only 256 levels, each level gets the mass of its bin,
# and the outermost bins extend to infinity. In the library this is
# **`scheduler.vlb_terms(..., s=-1)`**.

# %%
sigma, G_z = 0.05, 0.2
decoder_scheduler = DDPMNotesScheduler(prediction_type="sample", decoder_variance=sigma**2)  # the network outputs G(z)
levels = (torch.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)  # 256 images of one pixel
mean = torch.full_like(levels, G_z)
nats = decoder_scheduler.vlb_terms(mean, levels, levels, t=0, s=-1).numpy()

x = levels.flatten().double().numpy()
gaussian = (x - G_z) ** 2 / (2 * sigma**2) + math.log(math.sqrt(2 * math.pi) * sigma / (2 / 255))
near = abs(x - G_z) < 4 * sigma
print(f"the masses of the 256 levels sum to {np.exp(-nats).sum():.9f}")
print(f"the largest difference from the parabola within 4 sigma: {abs(nats - gaussian)[near].max():.4f} nats")
assert abs(np.exp(-nats).sum() - 1) < 1e-6
assert abs(nats - gaussian)[near].max() < 0.03

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.bar(x[near], np.exp(-nats)[near], width=2 / 255)
left.set(xlabel="level x of a pixel", ylabel="mass of its bin", title=r"$P(x \mid z)$")
right.plot(x, nats, label="vlb_terms at s = -1")
right.plot(x, gaussian, "k--", label="squared error + constant")
right.axvline(G_z, color="gray", linewidth=0.8, label="G(z)")
right.set(xlabel="level x of a pixel", ylabel="nats", title=r"$-\log P(x \mid z)$", xlim=(-0.45, 0.85), ylim=(0, 60))
right.legend(loc="upper center")
plt.show()

# %% [markdown]
# ## 3. DDPM is a chain of such decoders (figure 5)
#
# $$P(x_0) = \int P(x_T) \prod_t P(x_{t-1} \mid x_t)\, dx_1 \cdots dx_T.$$
#
# One hard step from $z$ to $x$ becomes many easy ones. Forward, a fixed process adds noise until
# nothing is left of the image. Backward, **`scheduler.step`** draws $x_{t-1}$ given $x_t$, and
# **`pipe(...)`** does so from $T$ down to the image. Below, some pixels of coin images on their way
# back; dark is where the forward process puts its mass.

# %%
paths = []


def record(pipe, step, t, tensors):
    paths.append(tensors["latents"][0, 0, 0].clone())
    return {}


samples = pipe(4, generator=seeded(1), output_type="latent", callback_on_step_end=record).images
heads = (samples > 0).double().mean().item()
print(
    f"{samples.numel()} pixels, {heads:.1%} heads, largest distance from -1 or 1: {(samples.abs() - 1).abs().max():.1e}"
)
assert (samples.abs() - 1).abs().max() < 1e-3
assert abs(heads - 0.5) < 4 * 0.5 / math.sqrt(samples.numel())

height = np.linspace(-3.5, 3.5, 351)[:, None]
density = sum(np.exp(-((height - c * np.sqrt(alpha_bar)) ** 2) / (2 * (1 - alpha_bar))) for c in (-1, 1))
figure, axis = plt.subplots(figsize=(8, 3.4))
axis.imshow(density / density.max(0), extent=(0, T, -3.5, 3.5), aspect="auto", origin="lower", cmap="Greys", alpha=0.7)
axis.plot(np.arange(T - 1, -1, -1), torch.stack(paths)[:, :6], linewidth=0.8)
axis.set(
    xlabel="timestep t  (sampling goes from right to left)", ylabel="a pixel of $x_t$", title="six pixels of a coin"
)
axis.grid(False)
plt.show()

# %% [markdown]
# ## 4. The bound has three parts (figures 6 to 8)
#
# The integral over the chain is intractable, but it can be bounded, as in a VAE:
#
# $$-\log P(x_0) \le \underbrace{\mathrm{KL}(q(x_T | x_0) \| P(x_T))}_{\text{prior}} +
# \underbrace{\sum_t \mathbb E\,
# \mathrm{KL}(q(x_{t-1} | x_t, x_0) \| P(x_{t-1} | x_t))}_{\text{steps}} +
# \underbrace{\mathbb E[-\log P(x_0 | x_1)]}_{\text{decoder}}$$
#
# **`scheduler.prior_kl`** and **`scheduler.vlb_terms`** compute them; **`pipe.bits_per_dim`** adds
# them up. Below, three chains of different lengths, with betas between the same limits:

# %%
bars = {}
for length in (100, 300, 1000):
    chain = DDPMNotesScheduler(num_train_timesteps=length)
    network = CoinDenoiser.from_scheduler(chain, sample_size=16)
    chain_pipe = DDPMNotesPipeline(network, chain)
    chain_pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns about the short chain: its end still shows the image
        bound = chain_pipe.bits_per_dim(network.images(64, seeded()))
    closed = coin_bound(
        np.cumprod(1 - np.linspace(1e-4, 0.02, length)), network.denoising_error(torch.arange(length)).numpy()
    )
    print(
        f"T = {length:4}: prior {bound.prior:.4f}, steps {bound.diffusion:.4f} +- {bound.standard_errors['diffusion']:.4f} "
        f"(closed form {closed[1].sum():.4f}), decoder {bound.decoder:.4f}, total {bound.total:.4f}"
    )
    assert abs(bound.prior - closed[0]) < 1e-6
    assert abs(bound.diffusion - closed[1].sum()) < 5 * bound.standard_errors["diffusion"]
    assert abs(bound.prior + bound.diffusion + bound.decoder - bound.total) < 1e-9
    bars[f"T = {length}"] = bound

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
bottom = np.zeros(len(bars))
for part, label in (("prior", "prior"), ("diffusion", "KLs of the steps"), ("decoder", "decoder")):
    size = np.array([getattr(bound, part) for bound in bars.values()])
    left.bar(list(bars), size, bottom=bottom, label=label, width=0.6)
    bottom += size
left.axhline(coin.entropy, color="black", linestyle="--", label="entropy: the minimum of all models")
left.set(ylabel="bits/dim", title="the bound on coins, three chains", ylim=(0, 2.6))
left.legend(loc="upper right", ncols=2)
right.plot(np.arange(1, T), result.per_timestep[1:], linewidth=0.8, label="measured (section 1)")
right.plot(np.arange(1, T), kls, "k--", linewidth=1, label="closed form")
right.set(xlabel="timestep t", ylabel="bits/dim of one step", title="the steps of the long chain")
right.legend()
plt.show()

# %% [markdown]
# A short chain ends while the image is still visible: its prior is expensive. In a long chain the
# prior costs nothing, and the steps are finer.
#
# ## 5. The forward process in one jump
#
# Many small Gaussian steps are one large one:
#
# $$q(x_t \mid x_0) = \mathcal N(\sqrt{\bar\alpha_t}\, x_0,\; (1 - \bar\alpha_t) I).$$
#
# **`scheduler.add_noise(x_0, eps, t)`** samples it, **`scheduler.forward_mean_variance(x_0, t)`**
# gives its mean and variance. The check composes all single steps.

# %%
from ddpm_notes_pipeline.data import load_images, to_model_range

digits = load_images("digits", show_progress=False)  # 8x8 images that come with scikit-learn
held_out = load_images("digits", split="test", show_progress=False)
print(f"{len(digits)} digits to train on, {len(held_out)} held out, {digits.dims} dims each")

signal, variance = 1.0, 0.0
for t in range(T):
    signal, variance = math.sqrt(1 - beta[t]) * signal, (1 - beta[t]) * variance + beta[t]
    jump_mean, jump_variance = scheduler.forward_mean_variance(torch.ones(1, 1, 1, 1).double(), t)
    assert abs(jump_mean.item() - signal) < 1e-12 and abs(jump_variance.item() - variance) < 1e-12
print(f"after all {T} steps: signal {signal:.6f}, variance {variance:.6f}; the jump gives the same at every t")


def draw_grid(axis, images, columns=None):
    """Images (N, 1, H, W) in [-1, 1], as a grid with thin lines between them."""
    images = images.clamp(-1, 1)
    columns = columns or len(images)
    framed = torch.nn.functional.pad(images, (1, 0, 1, 0), value=1.0)[:, 0]
    rows = [torch.cat(list(framed[i : i + columns]), dim=1) for i in range(0, len(framed), columns)]
    axis.imshow(torch.cat(rows), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_xticks([]), axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)


x_0 = to_model_range(digits.take([0, 1, 2]))
eps = torch.randn(x_0.shape, generator=seeded(2))
stops = [0, 50, 100, 200, 300, 500, 700, 999]
figure, axes = plt.subplots(1, len(stops), figsize=(10, 4.2))
for axis, t in zip(axes, stops):
    draw_grid(axis, scheduler.add_noise(x_0, eps, t), columns=1)
    axis.set_title(f"t = {t}\n" rf"$\bar\alpha$ = {alpha_bar[t]:.4f}", fontsize=9)
plt.show()

# %% [markdown]
# ## 6. The posterior is Bayes' rule (figures 9 to 11)
#
# Training compares each reverse step with that of an observer who knows the image. By Bayes' rule
#
# $$q(x_s \mid x_t, x_0) = \frac{q(x_t \mid x_s)\; q(x_s \mid x_0)}{q(x_t \mid x_0)} =
# \mathcal N\left(\frac{\sqrt{\bar\alpha_s}\, b}{1 - \bar\alpha_t}\, x_0 +
# \frac{\sqrt{a}\,(1 - \bar\alpha_s)}{1 - \bar\alpha_t}\, x_t,\;
# \frac{(1 - \bar\alpha_s)\, b}{1 - \bar\alpha_t} I\right).$$
#
# The product of two Gaussian curves is a narrower one.
# **`scheduler.posterior_mean_variance(x_0, x_t, t, s)`** gives its mean and variance. For one
# pixel, the product is computed point by point on a line and compared:

# %%
t, s = 250, 150
pixel_0, pixel_t = torch.tensor([[0.9], [-0.5]], dtype=torch.float64).split(1)
line = np.linspace(-4, 4, 8001)


def bell(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


a = alpha_bar[t] / alpha_bar[s]
forward_mean, forward_variance = (float(v) for v in scheduler.forward_mean_variance(pixel_0, s))
from_image = bell(line, forward_mean, forward_variance)  # q(x_s | x_0)
from_noisy = bell(pixel_t.item(), np.sqrt(a) * line, 1 - a)  # q(x_t | x_s), as a function of x_s
product = from_image * from_noisy
product /= product.sum() * (line[1] - line[0])
posterior = bell(line, *(float(v) for v in scheduler.posterior_mean_variance(pixel_0, pixel_t, t, s)))
print(f"largest difference between Bayes' rule on the line and the formula: {abs(product - posterior).max():.1e}")
assert abs(product - posterior).max() < 1e-9

figure, axis = plt.subplots(figsize=(8, 3.2))
axis.plot(line, from_image, label=r"$q(x_s \mid x_0)$: given the image")
axis.plot(line, from_noisy, label=r"$q(x_t \mid x_s)$: which $x_s$ explain $x_t$")
axis.fill_between(line, product, color="tab:green", alpha=0.25, label="their product, scaled to area 1")
axis.plot(line[::60], posterior[::60], "k.", label="posterior_mean_variance")
axis.set(
    xlabel=f"a pixel of $x_s$   (t = {t}, s = {s}, $x_0$ = {pixel_0.item()}, $x_t$ = {pixel_t.item()})",
    ylabel="density",
    xlim=(-2, 2),
    ylim=(0, None),
)
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 7. The mean in terms of the noise (figure 13)
#
# Sampling does not know the image, so a network predicts it. The jump, solved for $x_0$, is
# $x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon) / \sqrt{\bar\alpha_t}$. Inserted into the
# posterior's mean:
#
# $$\mu = \frac{1}{\sqrt a} \left(x_t - \frac{b}{\sqrt{1 - \bar\alpha_t}}\, \epsilon\right).$$
#
# It makes no difference whether the network predicts $\epsilon$, $x_0$, or the velocity
# $v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\, x_0$:
# **`scheduler.reverse_mean_variance(model_output, x_t, t, s)`** gives the same mean.

# %%
t, s = 300, 299
a, b = alpha_bar[t] / alpha_bar[s], 1 - alpha_bar[t] / alpha_bar[s]
x_0, eps = x_0.double(), eps.double()
x_t = scheduler.add_noise(x_0, eps, t)
outputs = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, t)}
by_hand = (x_t - b / math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(a)
for prediction_type, output in outputs.items():
    one = DDPMNotesScheduler(prediction_type=prediction_type)
    mean, _ = one.reverse_mean_variance(output, x_t, t, s)
    print(f"{prediction_type:12}: largest difference from the formula {(mean - by_hand).abs().max():.1e}")
    assert torch.allclose(mean, by_hand, atol=1e-9)
    assert torch.allclose(one.predict_original_sample(output, x_t, t), x_0, atol=1e-9)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(1, 1.5))
draw_grid(left, torch.cat([x_t, eps, scheduler.predict_original_sample(eps, x_t, t)]), columns=3)
left.set_yticks([4.5, 13.5, 22.5], ["$x_t$", r"$\epsilon$", "$x_0$"])
left.set_title(f"t = {t}: $x_0$ solved from the other two", fontsize=10)
right.plot(np.sqrt((1 - alpha_bar) / alpha_bar))
right.set(yscale="log", xlabel="timestep t", ylabel=r"error in $x_0$ per error in $\epsilon$")
plt.show()

# %% [markdown]
# The right plot shows why the two predictions are not equally hard. Near the image, a bad
# $\epsilon$ still gives a good $x_0$. Near the noise, a small error in $\epsilon$ is a large one in
# $x_0$.
#
# ## 8. The objective: least squares on the noise (figures 12 and 14)
#
# Two Gaussians of the same fixed variance are closest when their means are. So each step's KL is a
# weighted squared error of $\epsilon$:
#
# $$\mathrm{KL} = \frac{b}{2 a (1 - \bar\alpha_s)} \|\epsilon - \hat\epsilon\|^2 =
# \tfrac12 (\mathrm{SNR}_s - \mathrm{SNR}_t) \|x_0 - \hat x_0\|^2.$$
#
# Algorithm 1 drops the weight. In the library: **`Objective(scheduler, "simple")`**, and `"vlb"`
# for the bound itself. Below, a fake network is off by exactly 1 in $\epsilon$, so that each loss
# shows its weight.

# %%
from ddpm_notes_pipeline.objectives import Objective, TimestepSampler

steps = torch.arange(1, T)
one_pixel, one_eps = torch.zeros(T - 1, 1, 1, 1).double(), torch.randn(T - 1, 1, 1, 1, generator=seeded()).double()
pixel_t = scheduler.add_noise(one_pixel, one_eps, steps)
weight = scheduler.vlb_terms(one_eps + 1, one_pixel, pixel_t, steps, steps - 1, clip=False).numpy()
a = alpha_bar[1:] / alpha_bar[:-1]
assert np.allclose(weight, (1 - a) / (2 * a * (1 - alpha_bar[:-1])), rtol=1e-9)


def wrong_by_one(x_t, t, **_):
    return (one_eps + 1,)


simple = Objective(scheduler, "simple")(wrong_by_one, one_pixel, one_eps, steps).numpy()
assert np.allclose(simple, 1)

figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(steps, weight / weight.mean(), label='"vlb": the bound')
axis.plot(steps, simple / simple.mean(), label='"simple": Algorithm 1')
axis.set(
    xlabel="timestep t",
    ylabel=r"weight of $|\epsilon - \hat\epsilon|^2$, mean 1",
    yscale="log",
    title="the weight of each objective",
)
axis.legend()
plt.show()
share = {name: w[:100].sum() / w.sum() for name, w in (("vlb", weight), ("simple", simple))}
print(f"share of the weight on the hundred least noisy steps: bound {share['vlb']:.0%}, simple {share['simple']:.0%}")

# %% [markdown]
# The bound gives most weight to the steps nearest to the image, which settle details too small to
# see. Algorithm 1 moves the weight to the noisy steps, which decide what the image shows.
#
# Now Algorithm 1 itself, on real digits: draw images, $t$ and noise, then take a gradient step on
# $\|\epsilon - \hat\epsilon\|^2$. The network is a small `UNet2DModel` of diffusers.
# (`training/train.py` does the same with everything that a long run needs.)

# %%
from diffusers import UNet2DModel

from ddpm_notes_pipeline.data.batches import StepBatches

NUM_STEPS, BATCH = 600, 64

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    layers_per_block=1,
    norm_num_groups=16,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
objective = Objective(scheduler, "simple")
timestep_sampler = TimestepSampler(T, "stratified")  # t uniform, spread evenly over each batch
batches = StepBatches(digits, BATCH, seed=0, num_steps=NUM_STEPS)
optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=NUM_STEPS, pct_start=0.1)

losses = []
for step in range(NUM_STEPS):
    batch = batches[step]
    t, _ = timestep_sampler.sample(batch["u"], torch.arange(BATCH), BATCH)
    loss = objective(unet, to_model_range(batch["pixel_values"]), batch["noise"], t).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())
unet.eval()
print(
    f"{sum(p.numel() for p in unet.parameters()):,} weights; loss of the first 20 steps {np.mean(losses[:20]):.3f}, of the last 100 {np.mean(losses[-100:]):.3f}"
)

# %%
digits_pipe = DDPMNotesPipeline(unet, scheduler)
digits_pipe.set_progress_bar_config(disable=True)
test_images = held_out.take(range(128))
bound = digits_pipe.bits_per_dim(test_images)
print(f"held-out digits: {bound.total:.2f} +- {bound.standard_error:.2f} bits/dim")
print(
    f"    prior {bound.prior:.4f} + steps {bound.diffusion:.2f} + decoder {bound.decoder:.2f}; a stored pixel takes 8"
)
num_levels = len(digits.take(range(len(digits))).unique())
print(
    f"    these digits use only {num_levels} of the 256 levels; a model that knows this needs at most {math.log2(num_levels):.2f}"
)
assert bound.total < 8

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(losses, alpha=0.3, label="each step")
left.plot(
    np.arange(10, NUM_STEPS - 9),
    np.convolve(losses, np.ones(20) / 20, mode="valid"),
    color="tab:blue",
    label="mean of 20",
)
left.set(xlabel="optimizer step", ylabel="simple loss", yscale="log", title="training")
left.legend()
edges = np.linspace(1, T, 26).astype(int)
where = [float(bound.per_timestep[i:j].sum()) for i, j in pairwise(edges)]
right.bar(edges[:-1], where, width=np.diff(edges), align="edge", edgecolor="white")
right.set(xlabel="timestep t", ylabel="bits/dim of the range", title="where the bits of a digit are")
plt.show()

# %% [markdown]
# Nearly all of the bits are spent near the image, on the exact grey levels. There a network that
# was trained for a minute still has most to learn: it does not yet know which levels occur at all.
# The shapes, at larger $t$, cost few bits.

# %% [markdown]
# ## 9. Why is noise added back? (the last figure)
#
# Algorithm 2 computes the mean and then adds noise, $x_s = \mu(x_t) + \sigma z$. The notes end by
# asking why, and answer that "some randomness gives better performance". There is a better answer,
# and it is a number.
#
# Three samplers:
#
# * **Algorithm 2**: the mean, and $\sigma z$.
# * **The mean alone**: the same with $z = 0$.
# * **DDIM** (`eta=0`): no noise either, but another mean,
#   $x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s}\, \hat\epsilon$. It keeps the
#   predicted noise instead of averaging it away.
#
# First on data where everything is known: pixels from $\mathcal N(0, s^2)$ with $s^2 = 0.25$, and
# the perfect network. A correct sampler must reproduce this variance. All three samplers are linear
# here, so the variance of their samples can also be computed by hand: multiply by the squared gain
# and add $\sigma^2$, step by step.

# %%
from ddpm_notes_pipeline.variances import optimal_scheduler

S2 = 0.25
settings = {"timestep_spacing": "trailing", "clip_sample": False}
small = DDPMNotesScheduler(**settings)
gauss = GaussianDenoiser.from_scheduler(small, variance=S2, sample_size=64)
optimal = optimal_scheduler(small, gauss.denoising_error(torch.arange(T)))  # the best variance; section 10


@torch.no_grad()
def algorithm_2(network, scheduler, x_t, num_steps, generator=None):
    """Algorithm 2 in five lines; without a generator, the mean alone."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        s = scheduler.previous_timestep(t)
        mean, variance = scheduler.reverse_mean_variance(network(x_t, t).sample, x_t, t, s)
        z = torch.randn(x_t.shape, generator=generator) if generator is not None and s >= 0 else 0.0
        x_t = mean + variance.sqrt() * z
    return x_t


def closed_form_variance(sampler, K):
    """The variance of a sampler's result for x_T ~ N(0, 1) in K steps."""
    path = np.round(np.arange(T, 0, -T / K)).astype(int) - 1
    v = 1.0
    for t, s in pairwise([*path, -1]):
        ab_t, ab_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
        guess = math.sqrt(ab_t) * S2 / (ab_t * S2 + 1 - ab_t)  # x0_hat = guess * x_t
        b = 1 - ab_t / ab_s
        c_0 = math.sqrt(ab_s) * b / (1 - ab_t)
        c_t = math.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t)
        if sampler == "DDIM":
            gain = math.sqrt(ab_s) * guess + math.sqrt((1 - ab_s) / (1 - ab_t)) * (1 - math.sqrt(ab_t) * guess)
        else:
            gain = c_0 * guess + c_t
        noise = {"fixed_small": (1 - ab_s) * b / (1 - ab_t)}.get(sampler, 0.0)
        if sampler == "optimal":
            noise = (1 - ab_s) * b / (1 - ab_t) + c_0**2 * S2 * (1 - ab_t) / (ab_t * S2 + 1 - ab_t)
        v = gain**2 * v + (noise if s >= 0 else 0.0)
    return v


def sample(sampler, K, n=16):
    """n images of 64x64 pixels, by the pipeline; "mean alone" by the function above."""
    x_T = torch.randn(n, 1, 64, 64, generator=seeded(K))
    if sampler == "mean alone":
        return algorithm_2(gauss, small, x_T, K)
    pipe = DDPMNotesPipeline(gauss, optimal if sampler == "optimal" else small)
    pipe.set_progress_bar_config(disable=True)
    eta = 0.0 if sampler == "DDIM" else None
    return pipe(n, num_inference_steps=K, latents=x_T, eta=eta, generator=seeded(K + 1), output_type="latent").images


# Our five lines do what the pipeline does.
x_T = torch.randn(16, 1, 64, 64, generator=seeded(10))
assert torch.allclose(algorithm_2(gauss, small, x_T, 10, seeded(11)), sample("fixed_small", 10), atol=1e-4)

names = {
    "fixed_small": "Algorithm 2, fixed_small",
    "optimal": "Algorithm 2, best variance",
    "DDIM": "DDIM, eta = 0",
    "mean alone": "the mean alone",
}
steps = [3, 5, 10, 20, 50, 100, 250, 1000]
measured, closed, drawn = {}, {}, {}
print(f"variance of the samples, the data's is {S2}:    measured (closed form)")
print(f"{'K':>26}" + "".join(f"{K:>20}" for K in (10, 100, 1000)))
for sampler, name in names.items():
    images = {K: sample(sampler, K) for K in steps}
    drawn[sampler] = images[100].flatten()
    measured[sampler] = [images[K].double().var().item() for K in steps]
    closed[sampler] = [closed_form_variance(sampler, K) for K in steps]
    row = dict(zip(steps, zip(measured[sampler], closed[sampler])))
    print(f"{name:26}" + "".join(f"{f'{row[K][0]:.3g} ({row[K][1]:.3g})':>20}" for K in (10, 100, 1000)))
    error = np.sqrt(2 / images[100].numel())  # relative standard error of a variance
    assert np.allclose(measured[sampler], closed[sampler], rtol=4.5 * error), sampler

telescoped = alpha_bar[-1] * S2**2 / (alpha_bar[-1] * S2 + 1 - alpha_bar[-1]) ** 2
print(f"the mean alone, product of all gains: {telescoped:.3g}, whatever K is")
assert np.allclose(closed["mean alone"], telescoped, rtol=1e-9)
assert np.all(np.diff(closed["DDIM"]) > 0) and abs(closed["DDIM"][-1] / S2 - 1) < 0.01
assert abs(closed["optimal"][-1] / S2 - 1) < 0.01

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
fine = np.unique(np.geomspace(3, T, 40).astype(int))
for (sampler, name), color in zip(names.items(), ("tab:blue", "tab:green", "tab:orange", "tab:red")):
    left.plot(fine, [closed_form_variance(sampler, int(K)) for K in fine], color=color, linewidth=1)
    left.plot(steps, measured[sampler], "o", color=color, label=name)
    if sampler != "optimal":
        bins = np.linspace(-2, 2, 81)
        right.hist(drawn[sampler], bins=bins, density=True, histtype="step", color=color, label=name)
left.axhline(S2, color="black", linestyle="--", label="the data")
left.set(
    xscale="log", xlabel="number of steps K", ylabel="variance of a pixel", title="dots: samples, lines: closed form"
)
left.legend(loc="center right", fontsize=8)
right.plot(bins, bell(bins, 0, S2), "k--", label="the data")
right.set(xlabel="a pixel, K = 100", ylabel="density", ylim=(0, 1.3), title="the mean alone: all at one value")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# **The answer.** $\mu(x_t)$ is an average: of all $x_s$ that the current $x_t$ may have come from.
# Averages vary less than what they average:
#
# $$\mathrm{Var}(x_s) = \mathrm{Var}(\mathbb E[x_s \mid x_t]) +
# \mathbb E[\mathrm{Var}(x_s \mid x_t)].$$
#
# The first part is what the mean keeps. The second part is what $\sigma z$ gives back. Without it,
# that part is missing after every step. The losses multiply to
#
# $$\frac{\bar\alpha_T s^4}{(\bar\alpha_T s^2 + 1 - \bar\alpha_T)^2},$$
#
# nearly nothing, and $K$ does not appear in it: neither more steps nor a better network help (this
# one is perfect). The result is nearly $\mathbb E[x_0]$, the same image each time. So the noise is
# not decoration: without it the chain does not sample from the distribution it was trained for.
#
# Randomness as such is not needed, though. DDIM has none and still keeps the variance, because its
# step is not an average: it rescales the image and the predicted noise separately. Its remaining
# error comes from the finite steps and vanishes as $K$ grows.
#
# Now the same on the trained digits, all from the same $x_T$:

# %%
K, N = 250, 24
digits_scheduler = DDPMNotesScheduler.from_config(scheduler.config, timestep_spacing="trailing")
digits_pipe = DDPMNotesPipeline(unet, digits_scheduler)
digits_pipe.set_progress_bar_config(disable=True)
x_T = torch.randn(N, 1, 8, 8, generator=seeded(5))
grids = {
    "real digits": to_model_range(held_out.take(range(N))),
    "Algorithm 2": digits_pipe(N, num_inference_steps=K, latents=x_T, generator=seeded(6), output_type="latent").images,
    "DDIM": digits_pipe(N, num_inference_steps=K, latents=x_T, eta=0.0, output_type="latent").images,
    "the mean alone": algorithm_2(unet, digits_scheduler, x_T, K),
}
training_set = to_model_range(digits.take(range(len(digits))))
spread_of_data = training_set.var(0).mean().item()
spread = {name: images.var(0).mean().item() for name, images in grids.items()}
figure, axes = plt.subplots(2, 2, figsize=(10, 4.6))
for axis, (name, images) in zip(axes.flat, grids.items()):
    draw_grid(axis, images, columns=8)
    axis.set_title(f"{name}: variance between images {spread[name]:.3f}", fontsize=10)
plt.show()
print(f"variance between images, mean over pixels; of all {len(digits)} training digits: {spread_of_data:.3f}")
for name, value in spread.items():
    print(f"{name:15} {value:.3f}")
assert spread["the mean alone"] < 0.25 * spread["Algorithm 2"]

# %% [markdown]
# This network is not linear, so there is no formula, but the same happens: without noise, every
# start ends at nearly the same image.

# %% [markdown]
# ## 10. What the notes leave out
#
# ### The variance
#
# "The variance is not considered here", say the notes, twice. It has an optimum. The KL of two
# Gaussians is smallest where the variance equals the mean squared distance from the mean, and that
# is
#
# $$\sigma^2_{\text{optimal}} = \frac{(1 - \bar\alpha_s)\, b}{1 - \bar\alpha_t} +
# \left(\frac{\sqrt{\bar\alpha_s}\, b}{1 - \bar\alpha_t}\right)^2 V_t,
# \qquad V_t = \mathbb E\, |x_0 - \hat x_0(x_t)|^2 \text{ per dim}.$$
#
# The first part is the posterior's variance ("fixed_small"). The second is what the network does
# not know. $V_t$ is one number per timestep, measured once on training data by
# **`measure_original_sample_mse`**; **`optimal_scheduler`** uses it for every pair of steps.
#
# ### The steps to keep
#
# With this variance a step costs $\tfrac12 \log(1 + (\mathrm{SNR}_s - \mathrm{SNR}_t) V_t)$ nats
# per dim. The cost depends on the pair $(t, s)$ alone. So the best $K$ of the $T$ steps are a
# shortest path, found by dynamic programming: **`best_timesteps`**.
#
# First the coin, where everything has a closed form:

# %%
from ddpm_notes_pipeline.variances import best_timesteps, measure_original_sample_mse

V_coin = coin.denoising_error(torch.arange(T)).numpy()


def expected_kls(path, V, variance_type):
    """Sum of the expected KLs over a path's steps, in bits/dim, for a network with the error V."""
    total = 0.0
    for t, s in pairwise(path):
        b = 1 - alpha_bar[t] / alpha_bar[s]
        pv = (1 - alpha_bar[s]) * b / (1 - alpha_bar[t])
        error = alpha_bar[s] * b**2 / (1 - alpha_bar[t]) ** 2 * V[t]
        variance = {"fixed_small": pv, "fixed_large": b, "optimal": pv + error}[variance_type]
        total += 0.5 * (math.log(variance / pv) + (pv + error) / variance - 1)
    return total / math.log(2)


K = 10
even = [int(t) for t in np.linspace(0, T - 1, K).round()[::-1]]
best = best_timesteps(scheduler, K, V_coin)
rows = [
    ("fixed_small", even, "even"),
    ("fixed_large", even, "even"),
    ("optimal", even, "even"),
    ("optimal", best, "best"),
]
coins = coin.images(64, seeded(3))
print(f"coins, {K} steps: KLs of the steps in bits/dim;   the entropy is {coin.entropy}")
for variance_type, path, kind in rows:
    chosen = DDPMNotesScheduler(variance_type=variance_type, original_sample_mse=V_coin.tolist())
    chosen_pipe = DDPMNotesPipeline(coin, chosen)
    chosen_pipe.set_progress_bar_config(disable=True)
    bound = chosen_pipe.bits_per_dim(coins, timesteps=path)
    closed_kls = expected_kls(path, V_coin, variance_type)
    error = bound.standard_errors["diffusion"]
    print(
        f"{variance_type:12} {kind} steps: measured {bound.diffusion:8.4f} +- {error:.4f}, closed form {closed_kls:8.4f}"
    )
    assert abs(bound.diffusion - closed_kls) < 5 * error
print(f"even: {even}\nbest: {best}")

# %% [markdown]
# Now the trained digits. All rows share one decoder, of variance $V_0$, so that only the steps
# differ.

# %%
V_digits = measure_original_sample_mse(digits_pipe, digits.take(range(len(digits))), timesteps_per_image=12)
mse = V_digits.original_sample_mse
best_of = optimal_scheduler(scheduler, mse, decoder_variance=float(mse[0]))
test_images = held_out.take(range(64))

Ks = [10, 20, 35]
columns = ["fixed_small", "fixed_large", "optimal", "optimal, best steps"]
table = {column: [] for column in columns}
for column in columns:
    variance_type, _, kind = column.partition(", ")
    chosen = DDPMNotesScheduler.from_config(best_of.config, variance_type=variance_type)
    chosen_pipe = DDPMNotesPipeline(unet, chosen)
    chosen_pipe.set_progress_bar_config(disable=True)
    for K in Ks:
        path = best_timesteps(best_of, K) if kind else [int(t) for t in np.linspace(0, T - 1, K).round()[::-1]]
        table[column].append(chosen_pipe.bits_per_dim(test_images, timesteps=path))
print("bits/dim of held-out digits, smaller is better")
print(f"{'K':>4}" + "".join(f"{column:>22}" for column in columns))
for i, K in enumerate(Ks):
    cells = [f"{table[column][i].total:.2f} +- {table[column][i].standard_error:.2f}" for column in columns]
    print(f"{K:>4}" + "".join(f"{cell:>22}" for cell in cells))
    totals = [table[column][i].total for column in columns]
    assert totals[3] < totals[2] < min(totals[:2])

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
t, s = np.arange(20, T), np.arange(0, T - 20)  # steps of 20, about K = 50
b = 1 - alpha_bar[t] / alpha_bar[s]
pv = (1 - alpha_bar[s]) * b / (1 - alpha_bar[t])
error = alpha_bar[s] * b**2 / (1 - alpha_bar[t]) ** 2 * mse.numpy()[t]
left.plot(t, b / pv, label="fixed_large")
left.plot(t, (pv + error) / pv, label="optimal, from the measured $V_t$")
left.plot(t, np.ones(len(t)), label="fixed_small")
left.set(xlabel="timestep t, steps of 20", ylabel="variance / fixed_small", xscale="log", yscale="log")
left.set_title("the variance of a step, digits")
left.legend()
for column in columns[1:]:
    right.plot(Ks, [bound.total for bound in table[column]], "o-", label=column)
right.set(xlabel="number of steps K", ylabel="bits/dim", title="held-out digits (fixed_small is far above)")
right.legend()
plt.show()

# %% [markdown]
# One network, trained once. The better variance and the better steps cost no training: they are
# arithmetic on the numbers $V_t$. "fixed_small" is right for a network that knows the image
# exactly, and expensive where this one does not. "fixed_large" is too wide near the image. The
# measured optimum needs no guessing.

# %% [markdown]
# ## 11. What the decoder does not know
#
# The notes' decoder is a Gaussian around the network's guess $h = \hat x_0(x_t)$ (section 2). But
# 8-bit data is not spread evenly over the 256 levels. The digits use few of them, and black far
# more often than any grey. A Gaussian cannot know that.
#
# Bayes' rule can. Let $\pi_k$ say how common level $x_k$ is, and treat $h$ as a blurred view of the
# true level, with variance $\tau$:
#
# $$p(k \mid h) = \frac{\pi_k\, e^{-(x_k - h)^2 / 2\tau}}
# {\sum_j \pi_j\, e^{-(x_j - h)^2 / 2\tau}}.$$
#
# **`fit_levels`** fits $\pi$ and $\tau$ on training images. The scheduler's setting `levels` then
# uses $p(k \mid h)$ twice: it is the decoder, and at the least noisy steps its mean
# $\sum_k p(k \mid h)\, x_k$ replaces the guess. The network stays as it is.
#
# First the decoder of one pixel, checked against the formula:

# %%
from ddpm_notes_pipeline.evaluation.yardsticks import measure_yardsticks
from ddpm_notes_pipeline.level_fit import fit_levels, level_counts

training_images = digits.take(range(len(digits)))
fit = fit_levels(digits_pipe, training_images[::12], counts=level_counts([training_images]))
with_levels = DDPMNotesScheduler.from_config(scheduler.config, levels=fit.levels)

h = 0.26
pi, tau = np.array(fit.levels["weights"][0]), fit.levels["decoder_blur"][0]
by_hand = pi * np.exp(-((x - h) ** 2) / (2 * tau))  # x and levels: the 256 levels, from section 2
by_hand = (1 - 2**-16) * by_hand / by_hand.sum() + 2**-16 / 256  # so that no level costs more than 24 bits
masses = {}
for name, chain in (("Gaussian", scheduler), ("levels", with_levels)):
    chain = DDPMNotesScheduler.from_config(chain.config, prediction_type="sample")  # the network outputs h
    nats = chain.vlb_terms(torch.full_like(levels, h), levels, levels, t=0, s=-1)
    masses[name] = np.exp(-nats.double().numpy())
    print(f"{name:8}: the masses of the 256 levels sum to {masses[name].sum():.6f}")
    assert abs(masses[name].sum() - 1) < 1e-5
assert np.allclose(masses["levels"], by_hand, rtol=1e-3)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.bar(x, pi, width=0.04)
left.set(xlabel="level x of a pixel", ylabel=r"weight $\pi_k$", title=f"{(pi > 0).sum()} levels occur in the digits")
right.bar(x, masses["levels"], width=0.006, label="levels")
right.plot(x, masses["Gaussian"], color="tab:orange", label="Gaussian")
right.axvline(h, color="gray", linewidth=0.8, label="the guess h")
right.set(xlabel="level x of a pixel", ylabel="mass", title="the decoder of a pixel, t = 0", xlim=(h - 0.1, h + 0.1))
right.legend()
plt.show()

# %% [markdown]
# Now the held-out digits, before and after, with the same noise. `return_map=True` also gives the
# bits of each pixel. The yardsticks are simple codes for the same images:
# **`measure_yardsticks`** takes histograms of the training images, and common compressors.

# %%
test_images = held_out.take(range(128))
chains, bounds, maps = {"Gaussian": scheduler, "levels": with_levels}, {}, {}
for name, chain in chains.items():
    pipe = DDPMNotesPipeline(unet, chain)
    pipe.set_progress_bar_config(disable=True)
    bounds[name] = pipe.bits_per_dim(test_images)
    six = pipe.bits_per_dim(test_images[:6], full=True, return_map=True)
    maps[name] = six.maps
    assert abs(six.maps.double().mean() - six.total) < 1e-4
yardsticks = measure_yardsticks([training_images], [test_images])

rows = {name: f"{bits:6.2f}" for name, bits in yardsticks.bits.items()}
rows |= {f"our bound, {name}": f"{bound.total:6.2f} +- {bound.standard_error:.2f}" for name, bound in bounds.items()}
print(f"{f'{len(test_images)} held-out digits':36}bits/dim")
for name, row in sorted(rows.items(), key=lambda item: -float(item[1].split()[0])):
    print(f"{name:36}{row}")
print(yardsticks.verdict(bounds["levels"].total, bounds["levels"].standard_error))
assert bounds["levels"].total < bounds["Gaussian"].total

figure, axes = plt.subplots(3, 1, figsize=(8, 4.2))
draw_grid(axes[0], to_model_range(test_images[:6]))
axes[0].set_title("held-out digits", fontsize=10)
for axis, (name, bits) in zip(axes[1:], maps.items()):
    framed = torch.nn.functional.pad(bits[:, 0], (1, 0, 1, 0), value=math.nan)
    picture = axis.imshow(torch.cat(list(framed), dim=1), vmin=0, vmax=10)
    axis.set_title(f"bits of each pixel, {name}: {bits.mean():.2f} bits/dim", fontsize=10)
    axis.set_axis_off()
figure.colorbar(picture, ax=axes, label="bits", shrink=0.6)
plt.show()

# %% [markdown]
# Both bounds are conservative: the model's own code is at most as long. With levels the bound is
# still a bound, because $p(k \mid h)$ was fitted on other images and is a function of $(x_t, t)$
# alone, with masses that sum to 1. The yardsticks are lengths of real codes; those of PNG and WebP
# include a header for each small file.
#
# The black background is now nearly free. What is left is spent on the greys of the strokes, where
# the network itself has more to learn. Photographs use all levels about equally: there levels gain
# next to nothing (`make bench ONLY=levels`).

# %% [markdown]
# ## 12. A published model
#
# `examples/ddpm-mnist` is a repository as it stands on the Hub: weights, the code in one file, a
# card with measured numbers. Its network has 1.2 M weights and has seen MNIST's 60,000 images.
# It also learned a variance, so the same initial noise can be denoised under each rule: 25 steps,
# one row per rule, with the bits/dim of the first image of MNIST's test set.

# %%
from pathlib import Path

import PIL.Image
from diffusers.utils import logging

import ddpm_notes_pipeline

logging.disable_progress_bar()
repository = Path(ddpm_notes_pipeline.__file__).parents[1] / "examples" / "ddpm-mnist"
mnist_pipe = DDPMNotesPipeline.from_pretrained(repository)
mnist_pipe.set_progress_bar_config(disable=True)
digit = PIL.Image.open(repository.parent / "images" / "mnist_test.png").crop((0, 0, 28, 28))
rules = ["fixed_small", "fixed_large", "learned_range"]
path = [int(t) for t in np.linspace(0, T - 1, 25).round()[::-1]]

figure, axes = plt.subplots(3, 1, figsize=(9, 3.8))
for axis, rule in zip(axes, rules, strict=True):
    mnist_pipe.scheduler = DDPMNotesScheduler.from_config(mnist_pipe.scheduler.config, variance_type=rule)
    drawn = mnist_pipe(10, timesteps=path, generator=torch.Generator().manual_seed(0), output_type="np").images
    cost = mnist_pipe.bits_per_dim(digit, timesteps=path)
    axis.imshow(np.concatenate(drawn[..., 0], axis=1), cmap="gray")
    axis.set_title(f"{rule}: {cost.total:.2f} bits/dim for a test image", fontsize=9)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## 13. A run of your own
#
# **`TrainingRun`** is what `training/train.py` starts: images, batches, Algorithm 1, checkpoints
# and a model folder. Here it takes 60 steps on the digits, in a temporary folder, and draws 36
# images from the averaged weights. That is enough for strokes; 2500 steps (`make train`) give
# digits.

# %%
import contextlib
import io
import tempfile

from ddpm_notes_pipeline.training.arguments import DataArguments, ModelArguments, RunArguments
from ddpm_notes_pipeline.training.run import TrainingRun

data = DataArguments("digits")
model = ModelArguments(block_out_channels=[32, 64], layers_per_block=1, attention_levels=[1])
settings = {"max_train_steps": 60, "train_batch_size": 64, "learning_rate": 2e-3, "report_to": "none"}
settings |= {"num_samples": 36, "ddpm_num_inference_steps": 50, "output_dir": "run"}
progress_bars = contextlib.redirect_stderr(io.StringIO())
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), progress_bars:
    TrainingRun(data, model, RunArguments(**settings)).train()
    samples = plt.imread("run/samples.png")

figure, axis = plt.subplots(figsize=(9, 4.8))
axis.imshow(samples)
axis.set_axis_off()
plt.show()

# %% [markdown]
# Next: `training/train.py` trains on your own images, `training/evaluate.py` compares variances and
# steps for any DDPM checkpoint, and the table *From the notes to names* in `examples/README.md`
# lists all of the functions above.
