"""The bound against data of known entropy, closed forms and a second computation.

Coin: pixels -1 or 1 at random, 1 bit each; with the exact denoiser the bound's parts are
one-dimensional integrals (prior, KL sum, decoder 2.911295e-05, 1.006812, 0.509825 bits/dim for
linear betas, T = 1000, fixed_small), found by quadrature outside this library.
"""

import io
import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from scipy.stats import norm

from ddpm_notes_pipeline.core.likelihood import pilot_probabilities
from ddpm_notes_pipeline.oracles import CoinDenoiser
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler

# Short chains and paths are used here for their speed; that they start from a visible image is
# tested below.
pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar at the path's first timestep")
PRIOR, KL_SUM, DECODER = 2.911295e-05, 1.006812, 0.509825


def coin(size=8, **settings):
    scheduler = DDPMNotesScheduler(**{"clip_sample": False, **settings})
    pipe = DDPMNotesPipeline(CoinDenoiser.from_scheduler(scheduler, sample_size=size), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def coin_images(n, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n, 1, size, size), generator=generator) * 255).to(torch.uint8)


def unet(channels=1, out_channels=None, **options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def pipeline(network=None, **settings):
    pipe = DDPMNotesPipeline(network or unet(), DDPMNotesScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels(n=3, channels=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------------------- against known entropy


def test_the_coins_bound_in_full_is_the_integrals():
    result = coin().bits_per_dim(coin_images(30), full=True)
    assert result.prior == pytest.approx(PRIOR, rel=1e-4)
    assert abs(result.diffusion - KL_SUM) < 3 * result.standard_errors["diffusion"]
    assert result.decoder == pytest.approx(DECODER, abs=1e-5)
    assert abs(result.total - (PRIOR + KL_SUM + DECODER)) < 3 * result.standard_error
    assert result.standard_error < 0.006  # so that the lines above say something
    assert (result.network_evaluations, result.dims) == (30 * 1000, 64)


def test_the_coins_bound_from_few_evaluations_is_the_integrals():
    result = coin().bits_per_dim(coin_images(150))
    assert result.prior == pytest.approx(PRIOR, rel=1e-4)
    assert abs(result.diffusion - KL_SUM) < 3 * result.standard_errors["diffusion"]
    assert result.decoder == pytest.approx(DECODER, abs=1e-5)
    assert result.standard_error < 0.02
    assert result.network_evaluations == 150 * 12 + 16 * 48  # the images, and the pilot


@pytest.mark.parametrize(
    ("variance", "kl_sum"), [("fixed_small", 96.462161), ("fixed_large", 5.893717), ("optimal", 4.902171)]
)
def test_a_path_of_ten_steps_has_its_own_bound(variance, kl_sum):
    pipe = coin()
    mse = pipe.unet.denoising_error(torch.arange(1000)).tolist()
    pipe.scheduler = DDPMNotesScheduler.from_config(
        pipe.scheduler.config, variance_type=variance, original_sample_mse=mse
    )
    path = np.linspace(0, 999, 10).round()[::-1].astype(int).tolist()
    result = pipe.bits_per_dim(coin_images(400), timesteps=path)
    assert abs(result.diffusion - kl_sum) < 3 * result.standard_errors["diffusion"]
    assert result.network_evaluations == 4000  # a short path is summed in full


@pytest.mark.slow
def test_the_interval_of_two_standard_errors_covers_the_truth_as_often_as_it_says():
    """1.96 standard errors around the estimate hold the true bound in 91-99 % of 200 repeats."""
    pipe, truth = coin(), PRIOR + KL_SUM + DECODER
    covered = 0
    for repeat in range(200):
        result = pipe.bits_per_dim(coin_images(64, seed=repeat), seed=repeat)
        covered += abs(result.total - truth) < 1.96 * result.standard_error
    assert 182 <= covered <= 198


def test_few_evaluations_estimate_the_same_number_as_all_of_them():
    """On one image, over many seeds, also for an untrained network."""
    pipe, image = pipeline(num_train_timesteps=40, beta_end=0.3), levels(1)
    full = torch.tensor([pipe.bits_per_dim(image, full=True, seed=seed).total for seed in range(50)])
    cheap = torch.tensor([pipe.bits_per_dim(image, evaluations_per_image=6, seed=seed).total for seed in range(250)])
    error = math.hypot(full.std() / math.sqrt(len(full)), cheap.std() / math.sqrt(len(cheap)))
    assert abs(full.mean() - cheap.mean()) < 3.5 * error
    assert error < 0.03 * full.mean()


def test_terms_are_drawn_by_their_spread_not_by_their_mean():
    """Ten steps of mean 5, one of which varies by 100: it and its neighbours get most draws."""
    nats = torch.full((16, 10), 5.0, dtype=torch.float64)
    nats[::2, 7] += 100
    nats[1::2, 7] -= 100
    p = pilot_probabilities(torch.arange(10), nats, torch.full((10,), 0.1, dtype=torch.float64))
    of_mean, of_spread = 5 / 4, math.hypot(100, 5 / 4)  # what 16 images leave open of a mean of 5
    weights = np.full(10, of_mean)
    weights[[6, 8]] = (3 * of_mean + of_spread) / 4
    weights[7] = (of_mean + of_spread) / 2
    np.testing.assert_allclose(p, 0.9 * weights / weights.sum() + 0.01, rtol=1e-12)


# ---------------------------------------------------------------------------- against the equations


@pytest.mark.parametrize(
    ("settings", "doubled"),
    [
        ({}, False),
        (
            {"variance_type": "fixed_large", "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
            False,
        ),
        ({"variance_type": "learned_range"}, True),
        ({"prediction_type": "sample", "clip_sample": False}, False),
    ],
)
@pytest.mark.parametrize("clip", [None, True, False])
def test_every_term_is_what_the_equations_say_of_the_same_network_outputs(settings, doubled, clip):
    """Terms recomputed in float64 numpy from recorded network inputs and outputs, to 1e-5.

    `clip` of the call has precedence over the config's.
    """
    network = unet(out_channels=2 if doubled else 1)
    pipe = pipeline(network, **settings)
    recorded = []
    network.register_forward_hook(
        lambda _, inputs, kwargs, output: recorded.append((inputs[0], inputs[1], output[0])), with_kwargs=True
    )
    images, path = levels(2), [980, 700, 350, 90, 10]
    result = pipe.bits_per_dim(images, timesteps=path, clip=clip)
    x_t, t, output = (torch.cat(parts).double().numpy() for parts in zip(*recorded, strict=True))
    x_0 = np.repeat(images.double().numpy() / 127.5 - 1, len(path), axis=0)

    config = pipe.scheduler.config
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, 1000)
    else:
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.append(np.cumprod(1 - betas), 1.0)
    sums = np.zeros(1000)
    for row in range(len(x_0)):
        step = path.index(int(t[row]))
        at, after = alpha_bar[path[step]], alpha_bar[(path + [-1])[step + 1]]
        b = 1 - at / after
        guess, v = output[row, :1], output[row, 1:]
        if config.prediction_type == "epsilon":
            x_0_hat = (x_t[row] - np.sqrt(1 - at) * guess) / np.sqrt(at)
        else:
            x_0_hat = guess if config.prediction_type == "sample" else np.sqrt(at) * x_t[row] - np.sqrt(1 - at) * guess
        if config.clip_sample if clip is None else clip:
            x_0_hat = x_0_hat.clip(-1, 1)
        if step < len(path) - 1:
            pv = (1 - after) * b / (1 - at)
            variance = {"fixed_small": pv, "fixed_large": b}.get(config.variance_type)
            if variance is None:
                variance = np.exp((v + 1) / 2 * np.log(b) + (1 - v) / 2 * np.log(pv))
            gap = np.sqrt(after) * b / (1 - at) * (x_0[row] - x_0_hat)
            nats = 0.5 * (np.log(variance / pv) + (pv + gap**2) / variance - 1) + np.zeros_like(x_0_hat)
        else:  # the path ends at 10: the fixed types take pv of its last pair, (90, 10)
            a_last = alpha_bar[90] / alpha_bar[10]
            pv = (1 - alpha_bar[10]) * (1 - a_last) / (1 - alpha_bar[90])
            variance = pv if not doubled else np.exp((v + 1) / 2 * np.log(b) + (1 - v) / 2 * np.log(pv))
            std = np.sqrt(variance)
            upper = np.where(x_0[row] > 0.999, np.inf, (x_0[row] + 1 / 255 - x_0_hat) / std)
            lower = np.where(x_0[row] < -0.999, -np.inf, (x_0[row] - 1 / 255 - x_0_hat) / std)
            flip = upper + lower > 0
            upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
            nats = -(norm.logcdf(upper) + np.log(-np.expm1(norm.logcdf(lower) - norm.logcdf(upper))))
        sums[path[step]] += nats.sum() / (64 * math.log(2)) / 2
    np.testing.assert_allclose(result.per_timestep.numpy()[path], sums[path], rtol=1e-5)


def test_the_parts_add_up():
    result = pipeline().bits_per_dim(levels(5), evaluations_per_image=8)
    assert result.total == pytest.approx(result.prior + result.diffusion + result.decoder, rel=1e-12)
    assert float(result.per_timestep.sum()) == pytest.approx(result.diffusion + result.decoder, rel=1e-9)
    assert float(result.per_image.mean()) == pytest.approx(result.total, rel=1e-12)
    assert result.per_image.shape == (5,) and result.per_timestep.shape == (1000,)
    assert result.standard_error == pytest.approx(float(result.per_image.std()) / math.sqrt(5), rel=1e-12)
    assert math.isnan(pipeline().bits_per_dim(levels(1), evaluations_per_image=4).standard_error)


# ---------------------------------------------------------------------- whatever the images come as


def test_every_kind_of_input_gives_the_same_number():
    x = levels(3, channels=3)
    pipe = pipeline(unet(3))
    want = pipe.bits_per_dim(x, evaluations_per_image=4)
    array = x.permute(0, 2, 3, 1).numpy()
    for kind in (
        array,
        x.numpy(),
        [PIL.Image.fromarray(image) for image in array],
        x.float() / 127.5 - 1,
        (x.double() / 127.5 - 1).numpy(),
        iter([x[:2], x[2:]]),
        [x[:2], x[2:]],
        ({"pixel_values": image[None]} for image in x),
    ):
        got = pipe.bits_per_dim(kind, evaluations_per_image=4, pilot_images=x)
        torch.testing.assert_close(got.per_image, want.per_image, rtol=1e-5, atol=0)


def test_the_number_of_an_image_depends_neither_on_its_batch_nor_on_who_measures_it():
    pipe, x = pipeline(), levels(5)
    want = pipe.bits_per_dim(x, evaluations_per_image=6).per_image
    one_by_one = pipe.bits_per_dim(x, evaluations_per_image=6, batch_size=1).per_image
    second_half = pipe.bits_per_dim(x[3:], evaluations_per_image=6, first_image=3, pilot_images=x).per_image
    torch.testing.assert_close(one_by_one, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(second_half, want[3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("settings", [{"evaluations_per_image": 6}, {"num_inference_steps": 5}], ids=["few", "full"])
def test_the_result_does_not_depend_on_how_images_are_batched(settings):
    """Not by a bit: the ranges were chosen on the first batch, whatever its size."""
    pipe, x = pipeline(), levels(21)
    want = pipe.bits_per_dim(x, **settings)
    for sizes in (1, 3, 5, 17, [1, 19, 1]):
        for batches in (list(x.split(sizes)), iter(x.split(sizes))):
            got = pipe.bits_per_dim(batches, **settings)
            assert torch.equal(got.parts_per_image, want.parts_per_image), sizes
            assert torch.equal(got.per_timestep, want.per_timestep), sizes
            assert got.network_evaluations == want.network_evaluations
    apart = pipe.bits_per_dim(x.split(4), pilot_images=iter(x[:16].split(3)), **settings)
    assert torch.equal(apart.parts_per_image, want.parts_per_image)


def test_the_progress_bar_of_a_list_of_batches_counts_images():
    pipe, x = pipeline(num_train_timesteps=5), levels(7)
    pictures = [PIL.Image.fromarray(image[0].numpy()) for image in x]
    for images in (x.split(3), [{"pixel_values": part} for part in x.split(3)], [pictures[:4], pictures[4:]], pictures):
        shown = io.StringIO()
        pipe.set_progress_bar_config(file=shown, disable=False)
        pipe.bits_per_dim(images)
        assert "| 7/7 [" in shown.getvalue()


def test_a_data_set_read_as_a_stream_is_never_held():
    """Batches are asked for one at a time, after the one before has been measured."""
    pipe, alive = pipeline(num_train_timesteps=10), []

    def stream():
        for i in range(4):
            batch = levels(2, seed=i)
            alive.append(torch.utils.weak.WeakTensorKeyDictionary({batch: True}))
            yield batch
            del batch
            assert sum(len(held) for held in alive) <= 2

    assert len(pipe.bits_per_dim(stream()).per_image) == 8


def test_a_stock_checkpoint_is_measured_by_the_same_path(tmp_path):
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path)
    pipe = DDPMNotesPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    got = pipe.bits_per_dim(levels(2), evaluations_per_image=4)
    assert got.total == pytest.approx(pipeline().bits_per_dim(levels(2), evaluations_per_image=4).total, rel=1e-6)


def test_labels_reach_the_network():
    network = unet(num_class_embeds=4)
    network.register_to_config(_ddpm_notes={"null_label": 3})
    seen = []
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    pipe, path = pipeline(network), {"timesteps": [900, 400, 0]}
    pipe.bits_per_dim(levels(2), class_labels=[0, 2], **path)
    pipe.bits_per_dim(levels(2), **path)
    pipe.bits_per_dim([{"pixel_values": levels(2), "class_labels": torch.tensor([1, 0])}], **path)
    assert [labels.tolist() for labels in seen] == [[0, 0, 0, 2, 2, 2], [3] * 6, [1, 1, 1, 0, 0, 0]]


def labelled_pipeline():
    """With the null label 3, and the list of labels that its network has seen, a call an entry."""
    network, seen = unet(num_class_embeds=4), []
    network.register_to_config(_ddpm_notes={"null_label": 3})
    network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(set(kwargs["class_labels"].tolist())), with_kwargs=True
    )
    return pipeline(network), seen


def test_labels_given_for_images_do_not_meet_other_pilot_images():
    pipe, seen = labelled_pipeline()
    pilot = [{"pixel_values": levels(2, seed=5), "class_labels": torch.tensor([2, 2])}]
    cases = [
        ({"class_labels": [0, 1, 0]}, pilot, [{2}, {2}]),  # labels of their own
        ({"class_labels": 1}, levels(2, seed=5), [{1}, {1}]),  # one for all
        ({}, pilot, [{2}, {2}]),
        ({}, levels(2, seed=5), [{3}, {3}]),
    ]
    for labels, pilots, first in cases:
        seen.clear()
        pipe.bits_per_dim(levels(3), evaluations_per_image=4, pilot_images=pilots, **labels)
        assert seen[:2] == first
    with pytest.raises(ValueError, match="one label for each of images, and pilot_images has no labels; it must be"):
        pipe.bits_per_dim(levels(3), [0, 1, 0], evaluations_per_image=4, pilot_images=levels(3, seed=5))
    with pytest.raises(ValueError, match="pilot_images is empty; it must have at least one image"):
        pipe.bits_per_dim(levels(3), evaluations_per_image=4, pilot_images=[])


def test_labels_that_are_not_as_many_as_the_images_are_refused_however_these_are_batched():
    pipe, _ = labelled_pipeline()
    for n in (5, 7):
        for images in (levels(6), levels(6).split(1), levels(6).split(2)):
            with pytest.raises(ValueError, match=rf"class_labels has {n} labels for (at least )?6 images; it must"):
                pipe.bits_per_dim(images, class_labels=[0] * n, timesteps=[900, 0])


def test_measuring_leaves_the_pipelines_own_path_alone():
    pipe = pipeline()
    pipe.scheduler.set_timesteps(7)
    before = pipe.scheduler.timesteps.clone()
    pipe.bits_per_dim(levels(1), num_inference_steps=3)
    assert torch.equal(pipe.scheduler.timesteps, before)


def test_a_chain_that_does_not_reach_noise_is_warned_of():
    with pytest.warns(UserWarning, match=r"alpha_bar at the path's first timestep 99 is 0\.364"):
        pipeline(num_train_timesteps=100).bits_per_dim(levels(1), num_inference_steps=100)


# -------------------------------------------------------------------------------- what has no bound


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.full((1, 1, 8, 8), 0.1234), "256 levels"),
        (torch.full((1, 1, 8, 8), math.nan), "not finite"),
        (torch.full((1, 1, 8, 8), 3.0), "from 3 to 3"),
        # on the grid or not finite at the upper end alone: 3 is where a level 510 would be
        (torch.tensor([-1.0, 3.0]).repeat(32).view(1, 1, 8, 8), "from -1 to 3"),
        (torch.tensor([-1.0, math.inf]).repeat(32).view(1, 1, 8, 8), "not finite"),
        (levels(1).float(), "256 levels"),
        (levels(1).float() / 255, "256 levels"),
        (levels(1).long(), "int64"),
        (levels(1, channels=3), r"\(1, 3, 8, 8\)"),
        (levels(1)[0], r"\(1, 8, 8\)"),
        ([], "empty"),
        (iter([]), "empty"),
        (levels(0), "empty"),
        (7, "int"),
        ([PIL.Image.new("L", (8, 8)), PIL.Image.new("L", (9, 8))], "must have one size"),
    ],
)
def test_what_is_no_set_of_8_bit_images_is_refused(images, says):
    with pytest.raises(ValueError, match=says):
        pipeline(num_train_timesteps=5).bits_per_dim(images)


def test_guidance_has_no_bound():
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0.*no bound"):
        pipeline().bits_per_dim(levels(1), guidance_scale=2.0)


def test_a_scheduler_without_a_posterior_is_refused():
    pipe = DDPMNotesPipeline(unet(), DDIMScheduler())
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipe.bits_per_dim(levels(1))


def test_a_ddim_path_is_refused():
    with pytest.raises(ValueError, match=r"eta is 0\.0"):
        pipeline(eta=0.0).bits_per_dim(levels(1), num_inference_steps=2)


def test_the_map_of_an_image_adds_up_to_its_bits_and_the_levels_to_the_timesteps():
    pipe, images = pipeline(), levels(3)
    result, without = pipe.bits_per_dim(images, return_map=True), pipe.bits_per_dim(images)
    assert without.maps is None and without.by_level is None
    assert result.total == without.total
    assert result.maps.shape == images.shape
    torch.testing.assert_close(
        result.maps.double().flatten(1).sum(1) / result.dims, result.per_image, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(result.by_level[:-1].sum(1), result.per_timestep, rtol=1e-9, atol=1e-12)
    assert float(result.by_level[-1].sum()) == pytest.approx(result.prior, rel=1e-5)


def test_the_map_from_few_terms_has_the_mean_of_the_map_of_all():
    pipe, images = coin(size=4), coin_images(2, size=4)
    full = torch.stack([pipe.bits_per_dim(images, full=True, seed=s, return_map=True).maps for s in range(6)])
    few = torch.stack([pipe.bits_per_dim(images, seed=s, return_map=True).maps for s in range(100)])
    error = (few.var(0) / len(few) + full.var(0) / len(full)).sqrt()
    assert float(((few.mean(0) - full.mean(0)) / error).abs().max()) < 4
    assert float(((few.mean(0) - full.mean(0)) / error).pow(2).mean()) < 2


def test_bits_by_level_are_of_the_pixels_of_that_level():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    images[0, 0, 0, 0], images[1, 0, 1, 2], images[1, 0, 3, 3] = 255, 1, 254
    result = coin(size=4).bits_per_dim(images, return_map=True)
    bits = [
        float(result.maps[images == 0].sum()),
        float(result.maps[(images == 1) | (images == 254)].sum()),
        float(result.maps[images == 255]),
    ]
    assert (result.by_level.sum(0) * 2 * result.dims).tolist() == pytest.approx(bits, rel=1e-5)
