"""The pipeline's sampling loop: against diffusers' own, the equations, and wrong input.

Networks are untrained and tiny: an identity between two loops holds for any network, and an
untrained one is not kind to either. Loops written here use diffusers' schedulers or float64
formulas, never the library's own math.
"""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from ddpm_notes_pipeline.oracles import GaussianDenoiser
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline, pipeline_source
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from tests.support.devices import DEVICE
from tests.support.no_sync import META, no_sync

SHAPE = (1, 8, 8)
NULL = 3  # of a UNet with classes 0, 1, 2
# Every other scheduler that a user is likely to plug in, and the arguments its step takes in these
# tests.
OTHERS = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM eta=1": (DDIMScheduler, {"eta": 1.0}),
    "DPMSolver++": (DPMSolverMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Images of 8 x 8 pixels: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_unet(channels=1, out_channels=None, size=8, **options):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=out_channels or channels,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    )
    return unet.eval().to(DEVICE)


def conditional_unet(**options):
    unet = tiny_unet(num_class_embeds=NULL + 1, **options)
    unet.register_to_config(_ddpm_notes={"null_label": NULL, "class_names": ["zero", "one", "two"]})
    return unet


def pipeline(unet=None, scheduler=None):
    pipe = DDPMNotesPipeline(unet or tiny_unet(), scheduler or DDPMNotesScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed(n=0):
    return torch.Generator().manual_seed(n)


def noise(batch_size=2, shape=SHAPE, n=7):
    return torch.randn(batch_size, *shape, generator=seed(n)).to(DEVICE)


def latent(pipe, **arguments):
    return pipe(**{"batch_size": 2, "generator": seed(), "output_type": "latent", **arguments}).images


@torch.no_grad()
def plain_loop(unet, scheduler, path, batch_size=2, generator=None, **step_arguments):
    """The loop of diffusers' own pipelines, around a fresh copy of the scheduler."""
    scheduler = type(scheduler).from_config(scheduler.config)
    generator = generator or seed()
    scheduler.set_timesteps(**path)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = generator
    x = torch.randn(batch_size, *SHAPE, generator=generator).to(DEVICE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, **step_arguments).prev_sample
    return x


def alpha_bars(scheduler):
    """alpha_bar_t, float64 (T + 1,), 1 at index -1, from the config's linear betas."""
    config = scheduler.config
    betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    return np.append(np.cumprod(1 - betas), 1.0)


@torch.no_grad()
def equations(unet, scheduler, path, x_t, generator, eta=None):
    """Algorithm 2 with fixed_small, or DDIM's eq. 12, as in the papers, for epsilon, in float64."""
    alpha_bar = alpha_bars(scheduler)
    for t, s in zip(path, [*path[1:], -1], strict=True):
        ab_t, ab_s = alpha_bar[t], alpha_bar[s]
        eps = unet(x_t.float(), t).sample.double()
        x_0 = (x_t - math.sqrt(1 - ab_t) * eps) / math.sqrt(ab_t)
        if scheduler.config.clip_sample:
            x_0 = x_0.clamp(-1, 1)
        variance = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        if eta is None:
            mean = math.sqrt(ab_s) * (1 - ab_t / ab_s) / (1 - ab_t) * x_0
            mean = mean + math.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t) * x_t
        else:
            variance *= eta**2
            eps = (x_t - math.sqrt(ab_t) * x_0) / math.sqrt(1 - ab_t)
            mean = math.sqrt(ab_s) * x_0 + math.sqrt(1 - ab_s - variance) * eps
        x_t = mean
        if s >= 0:
            x_t = x_t + math.sqrt(variance) * torch.randn(x_t.shape, generator=generator).to(DEVICE)
    return x_t


def watch(unet):
    """Each later call of the network: its sample, timestep and labels."""
    calls = []

    def remember(module, positional, keywords, output):
        labels = keywords.get("class_labels")
        calls.append(
            SimpleNamespace(sample=positional[0], t=positional[1], labels=None if labels is None else labels.tolist())
        )

    unet.register_forward_hook(remember, with_kwargs=True)
    return calls


# --------------------------------------------------------------------- against diffusers' own loops


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variance_type": "fixed_large"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample", "clip_sample": False},
        {"thresholding": True, "sample_max_value": 2.0},
        {"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=str,
)
def test_the_images_are_those_of_the_stock_pipeline(settings, n):
    unet = tiny_unet()
    stock = DDPMPipeline(unet, DDPMScheduler(**settings))
    stock.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 3, "num_inference_steps": n, "output_type": "np"}
    expected = stock(**arguments, generator=seed()).images
    images = pipeline(unet, DDPMNotesScheduler(**settings))(**arguments, generator=seed()).images
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


def test_a_learned_variance_gives_the_images_of_the_stock_pipeline():
    unet, settings = tiny_unet(out_channels=2), {"variance_type": "learned_range"}
    stock = DDPMPipeline(unet, DDPMScheduler(**settings))
    stock.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 10, "output_type": "np"}
    expected = stock(**arguments, generator=seed()).images
    images = pipeline(unet, DDPMNotesScheduler(**settings))(**arguments, generator=seed()).images
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDPMParallelScheduler])
def test_a_stock_ddpm_scheduler_in_the_place_of_ours_gets_the_learned_variance(kind):
    pipe = pipeline(tiny_unet(out_channels=2), DDPMNotesScheduler(variance_type="learned_range"))
    arguments = {"batch_size": 2, "num_inference_steps": 10, "output_type": "np"}
    expected = pipe(**arguments, generator=seed()).images
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    np.testing.assert_allclose(pipe(**arguments, generator=seed()).images, expected, rtol=0, atol=1e-4)


def test_without_a_number_of_steps_ddpm_walks_every_timestep():
    unet = tiny_unet()
    calls = watch(unet)
    images = latent(pipeline(unet, DDPMNotesScheduler(num_train_timesteps=20)))
    assert [int(call.t) for call in calls] == list(range(20))[::-1]
    torch.testing.assert_close(
        images,
        plain_loop(unet, DDPMScheduler(num_train_timesteps=20), {"num_inference_steps": 20}),
        rtol=0,
        atol=1e-4,
    )


def test_without_a_number_of_steps_another_scheduler_takes_50():
    unet = tiny_unet()
    calls = watch(unet)
    latent(pipeline(unet, DDIMScheduler()), batch_size=1)
    assert len(calls) == 50


@pytest.mark.parametrize(
    "name, n",
    # a single step is too short for some: DEIS divides by zero there, PNDM needs 4 to begin
    [(name, n) for name in OTHERS for n in (1, 4, 7) if n > 1 or name not in ("DEIS", "PNDM")],
)
def test_any_diffusers_scheduler_samples_as_in_a_plain_loop(name, n):
    cls, arguments = OTHERS[name]
    unet, scheduler = tiny_unet(), cls()
    pipe = pipeline(unet, scheduler)
    assert pipe.scheduler is scheduler
    images = latent(pipe, num_inference_steps=n, **arguments)
    expected = plain_loop(unet, scheduler, {"num_inference_steps": n}, **arguments)
    assert torch.isfinite(images).all()
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    # ... and again: nothing is left over from the first call
    torch.testing.assert_close(latent(pipe, num_inference_steps=n, **arguments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["DPMSolver++", "Euler", "Heun"])
def test_a_scheduler_that_takes_timesteps_gets_them(name):
    unet, scheduler = tiny_unet(), OTHERS[name][0]()
    path = {"timesteps": [900, 600, 250, 40]}
    expected = plain_loop(unet, scheduler, path)
    torch.testing.assert_close(latent(pipeline(unet, scheduler), **path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_a_learned_variance_is_left_out_for_other_schedulers(name):
    cls, arguments = OTHERS[name]
    unet = tiny_unet(out_channels=2)
    first_half = lambda x, t: SimpleNamespace(sample=unet(x, t).sample[:, :1])  # noqa: E731
    expected = plain_loop(first_half, cls(), {"num_inference_steps": 4}, **arguments)
    images = latent(pipeline(unet, cls()), num_inference_steps=4, **arguments)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_eta_is_that_of_ddim(clip, eta):
    # Ours forms the noise anew from the clipped x_0; diffusers does when asked.
    settings = {"clip_sample": clip, "prediction_type": "v_prediction"}
    unet = tiny_unet()
    stock = DDIMScheduler(**settings, set_alpha_to_one=True)
    path = {"num_inference_steps": 10}
    expected = plain_loop(unet, stock, path, eta=eta, use_clipped_model_output=clip)
    images = latent(pipeline(unet, DDPMNotesScheduler(**settings)), **path, eta=eta)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------- against the equations


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", [[500], [900, 500, 100], [300, 299, 2, 0]], ids=str)
def test_a_path_of_your_own_is_walked_by_the_equations(path, eta, clip):
    unet, scheduler = tiny_unet(), DDPMNotesScheduler(clip_sample=clip)
    x_t = noise()
    images = latent(pipeline(unet, scheduler), timesteps=path, eta=eta, latents=x_t)
    expected = equations(unet, scheduler, path, x_t.double(), seed(), eta)
    torch.testing.assert_close(images, expected.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "variance_type, eta, variance",
    [
        ("fixed_small", None, 0.111206),
        ("fixed_large", None, 0.243938),
        ("optimal", None, 0.171325),
        ("fixed_large", 0.0, 0.136867),
        ("fixed_large", 1.0, 0.111206),
    ],
)
def test_gaussian_data_keep_the_variance_that_a_pencil_gives(variance_type, eta, variance):
    settings = {"timestep_spacing": "trailing", "clip_sample": False}
    unet = GaussianDenoiser.from_scheduler(DDPMNotesScheduler(**settings), sample_size=128)
    if variance_type == "optimal":
        settings["original_sample_mse"] = unet.denoising_error(torch.arange(1000)).tolist()
    pipe = pipeline(unet, DDPMNotesScheduler(variance_type=variance_type, **settings))
    images = latent(pipe, batch_size=16, num_inference_steps=10, eta=eta).double()
    standard_error = variance * math.sqrt(2 / images.numel())
    assert abs(images.var().item() - variance) < 4 * standard_error
    assert abs(images.mean().item()) < 4 * math.sqrt(variance / images.numel())


# ------------------------------------------------------------------------ the scheduler it is given


@pytest.fixture
def optimal():
    mse = [0.001 * (t + 1) for t in range(20)]
    return DDPMNotesScheduler(
        num_train_timesteps=20,
        variance_type="optimal",
        original_sample_mse=mse,
        decoder_variance={0: 0.002, 9: 0.03},
        eta=0.25,
    )


def assert_same_scheduler(scheduler, other):
    assert isinstance(scheduler, DDPMNotesScheduler)
    for name in (set(scheduler.config) | set(other.config)) - {"_use_default_values"}:
        assert scheduler.config[name] == other.config[name], name
    for name in ("variance_type", "original_sample_mse", "decoder_variance", "eta"):
        assert getattr(scheduler, name) == getattr(other, name), name
    torch.testing.assert_close(scheduler.alphas_cumprod, other.alphas_cumprod, rtol=0, atol=0)


def test_a_stock_ddpm_scheduler_is_taken_over():
    settings = {"num_train_timesteps": 30, "beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}
    scheduler = pipeline(scheduler=DDPMScheduler(**settings)).scheduler
    assert type(scheduler) is DDPMNotesScheduler
    assert {name: scheduler.config[name] for name in settings} == settings
    assert scheduler.eta is None


def test_settings_that_stock_classes_do_not_know_survive_them(optimal, tmp_path):
    optimal.save_pretrained(tmp_path)
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert_same_scheduler(pipeline(scheduler=stock).scheduler, optimal)
    assert_same_scheduler(pipeline(scheduler=DDPMScheduler.from_config(optimal.config)).scheduler, optimal)


def test_our_scheduler_and_others_stay_the_objects_they_are(optimal):
    assert pipeline(scheduler=optimal).scheduler is optimal
    for cls, _ in OTHERS.values():
        scheduler = cls()
        assert pipeline(scheduler=scheduler).scheduler is scheduler


def test_a_pipeline_is_made_from_a_stock_one():
    stock = DDPMPipeline(tiny_unet(), DDPMScheduler())
    pipe = DDPMNotesPipeline.from_pipe(stock)
    assert pipe.unet is stock.unet
    assert type(pipe.scheduler) is DDPMNotesScheduler


@pytest.mark.parametrize(
    "before",
    [{"eta": 0.0}, {"timesteps": [999, 400]}, {"num_inference_steps": 2}, {"output_type": "pil"}],
    ids=str,
)
def test_a_call_does_not_depend_on_the_one_before(before):
    pipe = pipeline()
    first = latent(pipe, num_inference_steps=4)
    latent(pipe, **{"num_inference_steps": None if "timesteps" in before else 3, **before})
    torch.testing.assert_close(latent(pipe, num_inference_steps=4), first, rtol=0, atol=0)


def test_the_eta_of_a_call_gives_way_to_that_of_the_config():
    pipe = pipeline(scheduler=DDPMNotesScheduler(eta=1.0))
    first = latent(pipe, num_inference_steps=4)
    latent(pipe, num_inference_steps=4, eta=0.0)
    torch.testing.assert_close(latent(pipe, num_inference_steps=4), first, rtol=0, atol=0)


# --------------------------------------------------------------------------- generators and latents


@pytest.mark.parametrize(
    "scheduler", [DDPMNotesScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler], ids=lambda cls: cls.__name__
)
def test_the_image_of_a_seed_does_not_depend_on_its_batch(scheduler):
    pipe = pipeline(scheduler=scheduler())
    options = {"num_inference_steps": 5, **({"eta": 1.0} if scheduler is DDIMScheduler else {})}

    def images(*seeds):
        return latent(pipe, batch_size=len(seeds), generator=[seed(n) for n in seeds], **options)

    together, alone, reordered = images(0, 1, 2), images(1), images(2, 0, 1)
    # relative too: an ancestral sample of an untrained network is some 30 in size
    torch.testing.assert_close(alone[0], together[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(reordered, together[[2, 0, 1]], rtol=1e-5, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_one_generator_reproduces_the_batch_and_moves_on():
    pipe = pipeline()
    generator = seed()
    first = latent(pipe, num_inference_steps=3, generator=generator)
    assert torch.equal(latent(pipe, num_inference_steps=3), first)
    assert not torch.equal(latent(pipe, num_inference_steps=3, generator=generator), first)
    assert not torch.equal(first[0], first[1])


def test_without_a_generator_it_follows_torch_s_seed():
    pipe = pipeline()
    torch.manual_seed(5)
    first = latent(pipe, num_inference_steps=2, generator=None)
    assert not torch.equal(latent(pipe, num_inference_steps=2, generator=None), first)
    torch.manual_seed(5)
    assert torch.equal(latent(pipe, num_inference_steps=2, generator=None), first)


@pytest.mark.parametrize("scheduler", [DDPMNotesScheduler, EulerDiscreteScheduler], ids=lambda cls: cls.__name__)
def test_latents_are_the_noise_that_it_would_have_drawn(scheduler):
    pipe = pipeline(scheduler=scheduler())
    generator = seed()
    x_T = torch.randn(2, *SHAPE, generator=generator)
    kept = x_T.clone()
    images = latent(pipe, num_inference_steps=3, latents=x_T, generator=generator)
    torch.testing.assert_close(images, latent(pipe, num_inference_steps=3), rtol=0, atol=0)
    assert torch.equal(x_T, kept)


# ------------------------------------------------------------------------------ labels and guidance


@pytest.mark.parametrize("labels", [1, [1, 1], torch.tensor(1), torch.tensor([1, 1], dtype=torch.int32)], ids=repr)
def test_without_guidance_the_network_is_asked_once_a_step_with_the_labels(labels):
    unet = conditional_unet()
    calls = watch(unet)
    latent(pipeline(unet), class_labels=labels, guidance_scale=1.0, num_inference_steps=3)
    assert [call.labels for call in calls] == [[1, 1]] * 3
    assert [len(call.sample) for call in calls] == [2] * 3


def test_one_label_an_image():
    unet = conditional_unet()
    calls = watch(unet)
    pipe = pipeline(unet)
    x_T = noise(3)
    images = latent(pipe, batch_size=3, class_labels=[2, 0, 1], latents=x_T, timesteps=[500])
    assert calls[0].labels == [2, 0, 1]
    alone = latent(pipe, batch_size=1, class_labels=0, latents=x_T[1:2], timesteps=[500])
    torch.testing.assert_close(images[1:2], alone, rtol=0, atol=1e-5)
    other = latent(pipe, batch_size=1, class_labels=2, latents=x_T[1:2], timesteps=[500])
    assert (other - alone).abs().max() > 1e-3  # labels matter to this network


def test_with_guidance_it_is_asked_for_both_in_one_batch():
    unet = conditional_unet()
    calls = watch(unet)
    latent(pipeline(unet), class_labels=[0, 2], guidance_scale=2.0, num_inference_steps=2)
    assert [len(call.sample) for call in calls] == [4, 4]
    assert all(sorted(call.labels) == sorted([0, 2, NULL, NULL]) for call in calls)


def test_no_label_means_the_null_label():
    unet = conditional_unet()
    calls = watch(unet)
    images = latent(pipeline(unet), num_inference_steps=2)
    assert [call.labels for call in calls] == [[NULL, NULL]] * 2
    assert torch.equal(latent(pipeline(unet), num_inference_steps=2, class_labels=NULL), images)


def test_guidance_0_is_the_unconditional_model():
    pipe = pipeline(conditional_unet())
    guided = latent(pipe, class_labels=[0, 1], guidance_scale=0.0, num_inference_steps=5)
    torch.testing.assert_close(guided, latent(pipe, num_inference_steps=5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("w", [-1.0, 0.5, 3.0])
def test_guidance_is_null_plus_w_times_the_difference(w):
    unet = conditional_unet()
    pipe = pipeline(unet, DDPMNotesScheduler(clip_sample=False))
    x_T, labels, t = noise(), torch.tensor([0, 2], device=DEVICE), 500
    images = latent(pipe, class_labels=labels, guidance_scale=w, timesteps=[t], latents=x_T)
    with torch.no_grad():
        conditional = unet(x_T, t, class_labels=labels).sample.double()
        null = unet(x_T, t, class_labels=torch.full_like(labels, NULL)).sample.double()
    eps = null + w * (conditional - null)
    alpha_bar = alpha_bars(pipe.scheduler)[t]
    x_0 = (x_T - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    torch.testing.assert_close(images, x_0.float(), rtol=1e-5, atol=1e-5)


def test_guidance_moves_the_mean_and_leaves_the_learned_variance_conditional():
    unet = conditional_unet(out_channels=2)
    pipe = pipeline(unet, DDPMNotesScheduler(variance_type="learned_range", clip_sample=False))
    x_T, labels, (t, s), w = noise(), torch.tensor([1, 2], device=DEVICE), (600, 300), 3.0
    seen = []
    latent(
        pipe,
        class_labels=labels,
        guidance_scale=w,
        timesteps=[t, s],
        latents=x_T,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"].clone()),
    )
    with torch.no_grad():
        conditional, v = unet(x_T, t, class_labels=labels).sample.double().chunk(2, dim=1)
        null, null_v = unet(x_T, t, class_labels=torch.full_like(labels, NULL)).sample.double().chunk(2, dim=1)
    ab_t, ab_s = alpha_bars(pipe.scheduler)[[t, s]]
    b = 1 - ab_t / ab_s
    x_0 = (x_T - math.sqrt(1 - ab_t) * (null + w * (conditional - null))) / math.sqrt(ab_t)
    mean = math.sqrt(ab_s) * b / (1 - ab_t) * x_0 + math.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t) * x_T
    z = torch.randn(2, *SHAPE, generator=seed()).to(DEVICE)

    def x_s(v):
        return mean + z * torch.exp(
            ((v + 1) / 2 * math.log(b) + (1 - v) / 2 * math.log(b * (1 - ab_s) / (1 - ab_t))) / 2
        )

    torch.testing.assert_close(seen[0], x_s(v).float(), rtol=1e-5, atol=2e-5)
    assert (x_s(v) - x_s(null_v)).abs().max() > 1e-3  # the two could be told apart


def test_guidance_serves_other_schedulers_too():
    unet = conditional_unet(out_channels=2)
    labels = torch.tensor([0, 1], device=DEVICE)

    def guided(x, t):
        null = unet(x, t, class_labels=torch.full_like(labels, NULL)).sample[:, :1]
        return SimpleNamespace(sample=null + 2 * (unet(x, t, class_labels=labels).sample[:, :1] - null))

    expected = plain_loop(guided, DDIMScheduler(), {"num_inference_steps": 4})
    images = latent(pipeline(unet, DDIMScheduler()), class_labels=labels, guidance_scale=2.0, num_inference_steps=4)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_the_null_label_is_not_counted_as_a_class():
    assert (pipeline(conditional_unet()).null_label, pipeline(conditional_unet()).num_classes) == (NULL, 3)
    plain = pipeline(tiny_unet(num_class_embeds=5))
    assert (plain.null_label, plain.num_classes) == (None, 5)
    assert (pipeline().null_label, pipeline().num_classes) == (None, None)


def test_the_null_label_and_class_names_survive_saving_here_and_by_the_stock_pipeline(tmp_path):
    unet = conditional_unet()
    kept = dict(unet.config["_ddpm_notes"])
    pipeline(unet).save_pretrained(tmp_path / "ours")
    DDPMPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    for folder in ("ours", "stock"):
        pipe = DDPMNotesPipeline.from_pretrained(tmp_path / folder)
        assert dict(pipe.unet.config["_ddpm_notes"]) == kept, folder
        assert (pipe.null_label, pipe.num_classes) == (NULL, 3)
        assert latent(pipe, class_labels=1, guidance_scale=2.0, num_inference_steps=2).shape == (2, *SHAPE)


# -------------------------------------------------------------------------------------- wrong input

UNCONDITIONAL, CONDITIONAL, NO_NULL = range(3)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (CONDITIONAL, {"class_labels": NULL + 1}, r"class_labels .*4.*must be 0 to 3"),
        (CONDITIONAL, {"class_labels": [0, -1]}, r"class_labels .*-1.*must be 0 to 3"),
        (CONDITIONAL, {"class_labels": [0, NULL + 1]}, r"class_labels .*0 to 4.*must be 0 to 3"),
        (CONDITIONAL, {"class_labels": 1.0}, "class_labels"),
        (CONDITIONAL, {"class_labels": [0.0, 1.0]}, "class_labels"),
        (CONDITIONAL, {"class_labels": torch.tensor([0.0, 1.0])}, "class_labels"),
        (CONDITIONAL, {"class_labels": [0, 1, 2]}, r"class_labels .*batch_size"),
        (CONDITIONAL, {"class_labels": []}, "class_labels"),
        (CONDITIONAL, {"guidance_scale": 2.0}, "guidance_scale"),
        (NO_NULL, {}, "class_labels is None"),
        (NO_NULL, {"class_labels": 5}, "class_labels"),
        (NO_NULL, {"class_labels": 1, "guidance_scale": 2.0}, "guidance_scale"),
        (UNCONDITIONAL, {"class_labels": 0}, "class_labels"),
        (UNCONDITIONAL, {"class_labels": [0, 0]}, "class_labels"),
        (UNCONDITIONAL, {"guidance_scale": 2.0}, "guidance_scale"),
        (UNCONDITIONAL, {"num_inference_steps": 3, "timesteps": [5, 0]}, "num_inference_steps.*timesteps"),
        (UNCONDITIONAL, {"num_inference_steps": 0}, "num_inference_steps is 0"),
        (UNCONDITIONAL, {"num_inference_steps": -1}, "num_inference_steps is -1"),
        (UNCONDITIONAL, {"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        (UNCONDITIONAL, {"timesteps": []}, "timesteps"),
        (UNCONDITIONAL, {"timesteps": [0, 5]}, "timesteps"),
        (UNCONDITIONAL, {"timesteps": [5, 5]}, "timesteps"),
        (UNCONDITIONAL, {"timesteps": [1000, 5]}, "timesteps"),
        (UNCONDITIONAL, {"eta": -0.1}, "eta is -0.1"),
        (UNCONDITIONAL, {"eta": 1.1}, "eta is 1.1"),
        (UNCONDITIONAL, {"generator": [seed()]}, r"generator .*1.*must have 2 "),
        (UNCONDITIONAL, {"generator": [seed(), seed(), seed()]}, r"generator .*3.*must have 2 "),
        (UNCONDITIONAL, {"latents": noise(1)}, r"latents .*must be \(2, 1, 8, 8\)"),
        (UNCONDITIONAL, {"latents": noise(2, (3, 8, 8))}, "latents"),
        (UNCONDITIONAL, {"latents": noise(2, (8, 8))}, "latents"),
        (UNCONDITIONAL, {"latents": noise(), "generator": [seed()]}, "generator"),
        (UNCONDITIONAL, {"output_type": "png"}, "output_type is 'png'"),
        (UNCONDITIONAL, {"batch_size": 0}, "batch_size is 0"),
        (UNCONDITIONAL, {"batch_size": 2.0}, "batch_size is 2.0"),
        (UNCONDITIONAL, {"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_network_runs(model, arguments, message):
    unet = (tiny_unet, conditional_unet, lambda: tiny_unet(num_class_embeds=5))[model]()
    calls = watch(unet)
    path = {} if {"num_inference_steps", "timesteps"} & set(arguments) else {"num_inference_steps": 2}
    # stops a loop that should not have started
    stop = {"callback_on_step_end": lambda pipe, *_: setattr(pipe, "interrupt", True)}
    with pytest.raises(ValueError, match=message):
        latent(pipeline(unet), **path, **stop, **arguments)
    assert not calls


@pytest.mark.parametrize("name", ["DDIM", "UniPC", "Euler ancestral", "PNDM"])
def test_timesteps_are_refused_for_a_scheduler_that_takes_none(name):
    unet = tiny_unet()
    calls = watch(unet)
    with pytest.raises(ValueError, match=f"timesteps.*{OTHERS[name][0].__name__}"):
        latent(pipeline(unet, OTHERS[name][0]()), timesteps=[900, 0])
    assert not calls


@pytest.mark.parametrize("name", ["DPMSolver++", "UniPC", "Euler", "Euler ancestral", "PNDM", "Heun"])
def test_eta_is_refused_for_a_scheduler_that_has_none(name):
    unet = tiny_unet()
    calls = watch(unet)
    with pytest.raises(ValueError, match=f"eta is 0.5.*{OTHERS[name][0].__name__}"):
        latent(pipeline(unet, OTHERS[name][0]()), eta=0.5, num_inference_steps=2)
    assert not calls


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPMSolver++"])
@pytest.mark.parametrize("n", [0, -1])
def test_a_number_of_steps_below_1_is_refused_for_any_scheduler(name, n):
    unet = tiny_unet()
    calls = watch(unet)
    stop = {"callback_on_step_end": lambda pipe, *_: setattr(pipe, "interrupt", True)}
    with pytest.raises(ValueError, match="num_inference_steps"):
        latent(pipeline(unet, OTHERS[name][0]()), num_inference_steps=n, **stop)
    assert not calls


# ----------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("size", [8, (8, 16)])
def test_each_output_type_is_the_same_sample(channels, mode, size):
    pipe = pipeline(tiny_unet(channels, size=size), DDPMNotesScheduler(clip_sample=False, prediction_type="sample"))
    H, W = (size, size) if isinstance(size, int) else size

    def images(output_type):
        return pipe(batch_size=2, num_inference_steps=2, generator=seed(), output_type=output_type).images

    x = images("latent")
    assert x.shape == (2, channels, H, W)
    assert x.dtype == torch.float32
    unit = (x / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images("pt"), unit)
    array = images("np")
    assert isinstance(array, np.ndarray) and array.shape == (2, H, W, channels)
    np.testing.assert_array_equal(array, unit.permute(0, 2, 3, 1).cpu().numpy())
    pictures = images("pil")
    assert [type(picture) for picture in pictures] == [PIL.Image.Image] * 2
    for picture, values in zip(pictures, array, strict=True):
        assert (picture.mode, picture.size) == (mode, (W, H))
        np.testing.assert_array_equal(np.asarray(picture).reshape(H, W, channels), (values * 255).round())


def test_images_are_clamped_to_the_unit_range_and_latents_are_not():
    pipe = pipeline(scheduler=DDPMNotesScheduler(clip_sample=False))
    arguments = {"timesteps": [700], "latents": noise()}  # x_0 = x_T / 0.08: far outside
    assert latent(pipe, **arguments).abs().max() > 2
    pixels = pipe(batch_size=2, output_type="pt", **arguments).images
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_pictures_are_what_it_makes_when_nothing_is_said():
    output = pipeline()(num_inference_steps=1)
    assert [picture.mode for picture in output.images] == ["L"]


def test_a_tuple_in_place_of_the_output_object():
    pipe = pipeline()
    output = pipe(batch_size=2, num_inference_steps=2, generator=seed(), output_type="latent", return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], latent(pipe, num_inference_steps=2))


# --------------------------------------------------------------------------- callbacks and progress


@pytest.mark.parametrize("name", ["ours", *OTHERS])
def test_the_callback_sees_every_step(name):
    scheduler = DDPMNotesScheduler() if name == "ours" else OTHERS[name][0]()
    pipe = pipeline(scheduler=scheduler)
    seen = []

    def callback(caller, step, timestep, tensors):
        seen.append((caller is pipe, step, float(timestep), tensors["latents"].clone()))

    images = latent(pipe, num_inference_steps=5, callback_on_step_end=callback)
    assert [(caller, step) for caller, step, _, _ in seen] == [(True, i) for i in range(len(pipe.scheduler.timesteps))]
    assert [t for _, _, t, _ in seen] == [float(t) for t in pipe.scheduler.timesteps]
    assert torch.equal(seen[-1][-1], images)
    assert torch.equal(latent(pipe, num_inference_steps=5), images)  # watching changes nothing


def test_the_callback_may_put_other_latents_in_the_place_of_the_sample():
    unet = tiny_unet()
    calls = watch(unet)
    replacement = noise(n=99)

    def callback(pipe, step, timestep, tensors):
        return {"latents": replacement} if step == 1 else {}

    latent(pipeline(unet), num_inference_steps=3, callback_on_step_end=callback)
    assert torch.equal(calls[2].sample, replacement)
    assert not torch.equal(calls[1].sample, replacement)


def test_an_interrupt_ends_the_loop_and_the_next_call_starts_anew():
    unet = tiny_unet()
    calls = watch(unet)
    pipe = pipeline(unet)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        pipe.interrupt = step == 1

    images = latent(pipe, num_inference_steps=5, callback_on_step_end=callback)
    assert len(calls) == len(seen) == 2
    assert torch.equal(images, seen[-1])
    latent(pipe, num_inference_steps=5)
    assert len(calls) == 2 + 5


@pytest.mark.parametrize("scheduler, steps", [(DDPMNotesScheduler, 4), (HeunDiscreteScheduler, 7)])
def test_the_progress_bar_knows_how_many_steps_there_are(scheduler, steps, monkeypatch):
    pipe = pipeline(scheduler=scheduler())
    bars = []
    original = pipe.progress_bar

    def progress_bar(*arguments, **keywords):
        bars.append(original(*arguments, **keywords))
        bars[-1].updates, update = 0, bars[-1].update

        def count(n=1):
            bars[-1].updates += n
            return update(n)

        bars[-1].update = count
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    latent(pipe, num_inference_steps=4)
    assert [(bar.total, bar.updates) for bar in bars] == [(steps, steps)]


def test_the_progress_bar_is_silent_when_asked(capfd):
    latent(pipeline(), num_inference_steps=2)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ours", *OTHERS])
def test_the_sample_stays_in_float32_when_the_weights_are_not(name, dtype):
    cls, arguments = (DDPMNotesScheduler, {}) if name == "ours" else OTHERS[name]
    unet = tiny_unet().to(dtype)
    calls = watch(unet)
    samples = []
    images = latent(
        pipeline(unet, cls()),
        num_inference_steps=4,
        callback_on_step_end=lambda pipe, i, t, tensors: samples.append(tensors["latents"]),
        **arguments,
    )
    assert {call.sample.dtype for call in calls} == {dtype}
    assert [x.dtype for x in samples] == [torch.float32] * len(samples)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    assert not torch.equal(images, images.to(dtype).float())  # nor was it rounded to the weights' type on its way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_make_pictures(dtype):
    for unet, variance_type, guidance in (
        (tiny_unet(), "fixed_small", {}),
        (conditional_unet(out_channels=2), "learned_range", {"class_labels": 1, "guidance_scale": 2.0}),
    ):
        pipe = pipeline(unet.to(dtype), DDPMNotesScheduler(variance_type=variance_type))
        output = pipe(num_inference_steps=3, generator=seed(), output_type="np", **guidance).images
        assert output.dtype == np.float32
        assert np.isfinite(output).all()


def test_bfloat16_weights_stay_near_float32():
    pipe = pipeline()
    expected = latent(pipe, num_inference_steps=5)
    pipe.unet.to(torch.bfloat16)
    images = latent(pipe, num_inference_steps=5)
    # the same generator gives the same noise: only the network's 8 bits differ
    assert (images - expected).abs().mean() < 0.1


def test_float64_weights_are_sampled_in_float64():
    unet, scheduler = tiny_unet().double(), DDPMNotesScheduler()
    calls = watch(unet)
    path, x_T = [800, 400, 0], noise().double()
    images = latent(pipeline(unet, scheduler), timesteps=path, eta=0.0, latents=x_T)
    assert images.dtype == torch.float64
    assert {call.sample.dtype for call in calls} == {torch.float64}
    double = lambda x, t: SimpleNamespace(sample=unet(x.double(), t).sample)  # noqa: E731
    # `equations` gives the network float32: one rounding of the input, 1e-7, is what is left
    # between the two
    expected = equations(double, scheduler, path, x_T, seed(), eta=0.0)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


def test_latents_of_another_type_are_taken_in_the_sample_s():
    pipe = pipeline()
    x_T = noise().bfloat16()
    images = latent(pipe, num_inference_steps=2, latents=x_T)
    assert images.dtype == torch.float32
    assert torch.equal(images, latent(pipe, num_inference_steps=2, latents=x_T.float()))


HOW = [{"evaluations_per_image": 3}, {"full": True, "return_map": True}]
LEVELS = {"weights": [[1.0] * 256], "decoder_blur": {0: 1e-3, 999: 1e-2}, "guess_blur": {0: 1e-3, 900: 0.1}}


@pytest.mark.parametrize(
    "model, arguments",
    [
        ({}, {}),
        ({}, {"eta": 0.5}),
        ({"variance_type": "learned_range"}, {}),
        ({"thresholding": True}, {"timesteps": [900, 500, 3]}),
        ({"levels": LEVELS}, {}),
        ({"classes": True}, {"class_labels": [0, 2], "guidance_scale": 2.0}),
    ],
    ids=str,
)
def test_no_step_of_the_loop_waits_for_the_device(model, arguments):
    """From the first noise to the last mean, which only its caller reads."""
    settings = {name: value for name, value in model.items() if name != "classes"}
    unet = conditional_unet() if model.get("classes") else tiny_unet(out_channels=2 if "variance_type" in model else 1)
    pipe = pipeline(unet.to(META), DDPMNotesScheduler(**settings))
    if "timesteps" not in arguments:
        arguments = {**arguments, "num_inference_steps": 5}
    with no_sync():
        images = pipe(2, output_type="latent", **arguments).images
    assert images.device == META and images.shape == (2, *SHAPE)


def test_the_default_device_of_torch_changes_neither_images_nor_bits():
    pixels = torch.randint(0, 256, (3, *SHAPE), generator=seed(), dtype=torch.uint8)
    pipe = pipeline(scheduler=DDPMNotesScheduler(levels=LEVELS))

    def everything():
        by_few, by_all = (pipe.bits_per_dim(pixels, timesteps=[999, 90, 40, 3, 0], **how) for how in HOW)
        return latent(pipe, num_inference_steps=4), by_few.parts_per_image, by_all.parts_per_image, by_all.by_level

    expected = everything()
    with META:
        found = everything()
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_sampling_leaves_no_gradient_and_the_network_as_it_was():
    unet = tiny_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    images = latent(pipeline(unet), num_inference_steps=2)
    assert not images.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


# --------------------------------------------------------------------------------- the shipped file


def test_the_shipped_file_runs_by_itself_and_gives_itself_back(tmp_path):
    source = pipeline_source(DDPMNotesPipeline)
    assert pipeline_source() == source
    pipeline().save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").read_text(encoding="utf-8") == source
    module = {"__name__": "shipped", "__file__": str(tmp_path / "pipeline.py")}
    exec(compile(source, "pipeline.py", "exec"), module)
    assert module["pipeline_source"](module["DDPMNotesPipeline"]) == source
    assert module["DDPMNotesScheduler"].__module__.startswith("ddpm_notes_pipeline_")  # its own, named by its digest


@pytest.mark.parametrize("how", ["images", "batches"])
def test_images_on_the_networks_device_have_the_bits_of_images_on_the_cpu(how):
    """As a DataLoader that accelerate prepared yields them."""
    pipe = pipeline(tiny_unet(), DDPMNotesScheduler())
    pixels = torch.randint(0, 256, (3, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = {"timesteps": [999, 500, 90, 0], "return_map": True}
    expected = pipe.bits_per_dim(pixels, **settings)
    moved = pixels.to(DEVICE)
    found = pipe.bits_per_dim(moved if how == "images" else [{"pixel_values": moved}], **settings)
    assert torch.equal(found.per_image, expected.per_image) and torch.equal(found.maps, expected.maps)


def test_the_network_sees_at_most_batch_size_noisy_images_at_once():
    """Also of a bound in full, and of one with a few draws an image; its value stays the same."""
    pipe = pipeline(tiny_unet(), DDPMNotesScheduler(num_train_timesteps=30))
    pixels = torch.randint(0, 256, (3, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for how in ({"full": True}, {"evaluations_per_image": 6}):
        sizes.clear()
        total = pipe.bits_per_dim(pixels, batch_size=7, **how).total
        assert max(sizes) <= 7 and len(sizes) > 1
        assert total == pytest.approx(pipe.bits_per_dim(pixels, **how).total, rel=1e-5)
