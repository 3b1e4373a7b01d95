"""Fine-tuning a given DDPM starts at that model's bits/dim and improves them."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from tests.support.launching import DATA, NETWORK, SHORT

IMAGES = 48
FLAGS = [*DATA, *SHORT, "--train_batch_size", 32, "--learning_rate", 2e-3]
VALIDATED = ["--validation_split", "test", "--max_validation_images", IMAGES]


def measured(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stock(train, tmp_path_factory) -> Path:
    """A folder of stock diffusers alone, whose UNet has learned a little of the digits."""
    home = tmp_path_factory.mktemp("stock")
    train(
        *NETWORK,
        *FLAGS,
        "--ddpm_num_steps",
        1000,
        "--max_train_steps",
        60,
        "--ema_max_decay",
        0.9,
        "--output_dir",
        home / "run",
    )
    unet = UNet2DModel.from_pretrained(home / "run", subfolder="unet")
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000)).save_pretrained(home / "stock")
    return home / "stock"


@pytest.fixture(scope="module")
def own(stock, tmp_path_factory):
    """Its bits/dim, measured without the training script."""
    cache = tmp_path_factory.mktemp("cache")
    images = load_images("digits", split="test", max_samples=IMAGES, cache_dir=cache, show_progress=False)
    pipeline = DDPMNotesPipeline.from_pretrained(stock)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.bits_per_dim(images.take(range(IMAGES)), pilot_images=images.at_most(16).take(range(16)))


@pytest.mark.slow
def test_fine_tuning_starts_at_the_bits_per_dim_of_the_given_model_and_improves_it(train, stock, own, tmp_path):
    source = ["--pretrained_model_name_or_path", stock, "--max_train_steps", 150, "--ema_max_decay", 0.9]
    result = train(*FLAGS, *VALIDATED, *source, "--output_dir", tmp_path / "run")
    first, last = measured(tmp_path / "run")
    print(
        f"{own.total:.3f} ± {own.standard_error:.3f} given, {first['bits_per_dim']:.3f} at 0, {last['bits_per_dim']:.3f}"
    )
    assert (first["step"], last["step"]) == (0, 150) and first["images"] == last["images"] == IMAGES
    assert first["bits_per_dim"] == pytest.approx(own.total, rel=1e-5)
    assert first["standard_error"] == pytest.approx(own.standard_error, rel=1e-4)
    for part in ("prior", "diffusion", "decoder"):
        assert first[part] == pytest.approx(getattr(own, part), rel=1e-4, abs=1e-6)
    assert last["bits_per_dim"] < first["bits_per_dim"] - first["standard_error"] - last["standard_error"]
    assert f"{last['bits_per_dim']:.3f}" in result.stdout


@pytest.mark.slow
def test_a_repository_on_a_hub_serves_as_the_folder_does(launch, hub, stock, own, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.endpoint, token="hf_user")
    api.create_repo("user/stock")
    first = api.upload_folder(repo_id="user/stock", folder_path=stock).oid
    other = UNet2DModel.from_config(UNet2DModel.load_config(stock / "unet"))  # as it was before training
    other.save_pretrained(tmp_path / "other" / "unet")
    api.upload_folder(repo_id="user/stock", folder_path=tmp_path / "other")
    source = ["--pretrained_model_name_or_path", "user/stock", "--revision", first]
    source += ["--max_train_steps", 4, "--output_dir", tmp_path / "run"]
    launch(*FLAGS, *VALIDATED, *source, env=hub.env(home=tmp_path / "home"))
    row = measured(tmp_path / "run")[0]
    assert row["step"] == 0 and row["bits_per_dim"] == pytest.approx(own.total, rel=1e-5)
