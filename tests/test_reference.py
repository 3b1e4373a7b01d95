"""Today's code against that of before it was rewritten: the same numbers to 1e-6.

Goes, with tests/reference, when the rewriting ends.
"""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler

REFERENCE = Path(__file__).parent / "reference"
SEEDS = range(60)


@pytest.fixture(scope="module")
def before():
    """The module of the joined file as it was."""
    spec = importlib.util.spec_from_file_location("reference_pipeline", REFERENCE / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_pipeline"] = module
    spec.loader.exec_module(module)
    assert module.DDPMNotesScheduler is not DDPMNotesScheduler
    return module


def random_settings(draw: random.Random) -> dict:
    """A scheduler's configuration, with what the notes set aside in about half of them."""
    T = draw.choice([20, 100, 1000])
    prediction = draw.choice(["epsilon", "sample", "v_prediction"])
    settings = {
        "num_train_timesteps": T,
        "beta_schedule": draw.choice(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
        "prediction_type": prediction,
        "variance_type": draw.choice(
            ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "optimal"]
        ),
        "timestep_spacing": draw.choice(["linspace", "leading", "trailing"]),
        "rescale_betas_zero_snr": prediction != "epsilon" and draw.random() < 0.3,
        "eta": draw.choice([None, None, None, 0.0, 0.5, 1.0]),
    }
    settings |= draw.choice(
        [{"clip_sample": False}, {}, {"clip_sample_range": 0.7}, {"thresholding": True, "sample_max_value": 1.5}]
    )
    if settings["variance_type"] == "optimal":
        settings["original_sample_mse"] = [0.5 * (t + 1) / T for t in range(T)]
    if draw.random() < 0.4:
        settings["decoder_variance"] = draw.choice([1e-4, {0: 3e-4, T // 2: 0.02}])
    return settings


def both(before, seed):
    """The scheduler of before and of today with the same random settings, and a draw for more."""
    draw = random.Random(seed)
    settings = random_settings(draw)
    return before.DDPMNotesScheduler(**settings), DDPMNotesScheduler(**settings), draw


def images_of(draw, scheduler, dtype, batch=3):
    """x_0 on the 256 levels, x_t, and a network's output of the right channels."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    x_0 = (2 * torch.randint(0, 256, (batch, 2, 5, 4), generator=generator) - 255).to(dtype) / 255
    learned = scheduler.variance_type.startswith("learned") and scheduler.eta is None
    channels = 4 if learned or draw.random() < 0.2 else 2
    output = torch.randn((batch, channels, 5, 4), generator=generator, dtype=torch.float32).to(dtype)
    return x_0, torch.randn((batch, 2, 5, 4), generator=generator, dtype=torch.float32).to(dtype), output


def assert_same(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = expected.double().abs().clamp(min=1)
    assert ((found.double() - expected.double()).abs() / scale).max() <= tolerance


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_are_those_of_before(before, seed, dtype):
    old, new, draw = both(before, seed)
    T = len(new)
    _, x_t, output = images_of(draw, new, dtype)
    if draw.random() < 0.5:
        path = {"num_inference_steps": draw.choice([1, 7, T])}
    else:
        path = {"timesteps": sorted(draw.sample(range(T), min(T, 9)), reverse=True)}
    old.set_timesteps(**path)
    new.set_timesteps(**path)
    assert old.timesteps.tolist() == new.timesteps.tolist()
    for t in new.timesteps.tolist()[:: max(1, len(new.timesteps) // 10)]:
        found = new.step(output, t, x_t, generator=torch.Generator().manual_seed(t))
        expected = old.step(output, t, x_t, generator=torch.Generator().manual_seed(t))
        tolerance = 1e-6 if dtype != torch.bfloat16 else 0.008  # bf16 has 8 bits: one of the last
        if dtype == torch.float32 and new.config.prediction_type == "epsilon":
            # x0_hat = (x_t - std eps) / signal divides the rounding of float32 by the signal
            tolerance /= new.alphas_cumprod[t].item() ** 0.5
        assert_same(found.prev_sample, expected.prev_sample, tolerance)
        assert_same(found.pred_original_sample, expected.pred_original_sample, tolerance)
        assert int(new.previous_timestep(t)) == int(old.previous_timestep(t))


@pytest.mark.parametrize("seed", SEEDS)
def test_jumps_posteriors_and_reverse_steps_are_those_of_before(before, seed):
    old, new, draw = both(before, seed)
    x_0, x_t, output = images_of(draw, new, torch.float64)
    t = torch.tensor([draw.randrange(1, len(new)) for _ in x_0])
    s = torch.tensor([draw.randrange(-1, int(value)) for value in t])
    assert_same(new.add_noise(x_0, x_t, t), old.add_noise(x_0, x_t, t))
    assert_same(new.get_velocity(x_0, x_t, t), old.get_velocity(x_0, x_t, t))
    for name, arguments in {
        "forward_mean_variance": (x_0, t),
        "posterior_mean_variance": (x_0, x_t, t, s),
        "reverse_mean_variance": (output, x_t, t, s),
    }.items():
        pairs = zip(getattr(new, name)(*arguments), getattr(old, name)(*arguments), strict=True)
        for found, expected in pairs:
            assert_same(found, expected)
    for name in ("predict_original_sample", "predict_noise"):
        assert_same(getattr(new, name)(output, x_t, t), getattr(old, name)(output, x_t, t))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("where", ["mixed", "data", "single"])
def test_terms_of_the_bound_are_those_of_before(before, seed, where):
    old, new, draw = both(before, seed)
    x_0, x_t, output = images_of(draw, new, torch.float64)
    t = torch.tensor([draw.randrange(1, len(new)) for _ in x_0])
    s = torch.tensor([draw.randrange(-1, int(value)) for value in t]) if where == "mixed" else torch.full_like(t, -1)
    if where == "single":
        t, s = int(t[0]), draw.randrange(-1, int(t[0]))
    assert_same(new.prior_kl(x_0), old.prior_kl(x_0))
    clip = draw.choice([None, True, False])
    if new.eta not in (None, 1):
        with pytest.raises(ValueError, match="eta is"):
            new.vlb_terms(output, x_0, x_t, t, s, clip)
        return
    assert_same(new.vlb_terms(output, x_0, x_t, t, s, clip), old.vlb_terms(output, x_0, x_t, t, s, clip))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return unet.eval()


@pytest.mark.parametrize("how", [{}, {"full": True, "num_inference_steps": 20}, {"evaluations_per_image": 9}])
@pytest.mark.parametrize("variance", ["learned_range", "optimal"])
def test_bits_per_dim_are_those_of_before(before, unet, how, variance):
    settings = {"num_train_timesteps": 100, "variance_type": variance}
    if variance == "optimal":
        settings["original_sample_mse"] = [0.5 * (t + 1) / 100 for t in range(100)]
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (before, sys.modules["ddpm_notes_pipeline.pipeline_ddpm_notes"]):
        pipe = module.DDPMNotesPipeline(unet, module.DDPMNotesScheduler(**settings))
        pipe.set_progress_bar_config(disable=True)
        with pytest.warns(UserWarning, match="shines through"):
            results.append(pipe.bits_per_dim(images, seed=3, **how))
    expected, found = results
    assert found.total == pytest.approx(expected.total, rel=1e-6)
    assert_same(found.parts_per_image, expected.parts_per_image, 2e-6)  # of float32 networks
    assert_same(found.per_timestep, expected.per_timestep)
    assert found.network_evaluations == expected.network_evaluations


def test_samples_are_those_of_before(before, unet):
    images = []
    for module in (before, sys.modules["ddpm_notes_pipeline.pipeline_ddpm_notes"]):
        scheduler = module.DDPMNotesScheduler(num_train_timesteps=100, variance_type="learned_range")
        pipe = module.DDPMNotesPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(4, generator=torch.Generator().manual_seed(0), output_type="latent").images)
    assert_same(images[1], images[0], 2e-6)


def test_a_checkpoint_of_before_is_resumed(train, tmp_path):
    """Its six steps, then six more: the losses and the weights of the run that went on at once."""
    shutil.copytree(REFERENCE / "run", tmp_path / "run")
    flags = (REFERENCE / "flags.txt").read_text().split()
    train(*flags, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    found, expected = (
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "run" / "loss.jsonl", REFERENCE / "loss.jsonl")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert isinstance(DDPMNotesPipeline.from_pretrained(tmp_path / "run").scheduler, DDPMNotesScheduler)
