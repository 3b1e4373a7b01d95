"""examples/ddpm-mnist: a published repository, kept unchanged, must keep loading.

Its pipeline.py and its numbers are of version 0.1.0; both are compared with the current code.
"""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.hub.card import weights_digest
from ddpm_notes_pipeline.hub.push import HUB_FILES
from tests.support.launching import ROOT

EXAMPLE = ROOT / "examples" / "ddpm-mnist"
EVALUATION = json.loads((EXAMPLE / "evaluation.json").read_text())
LOADERS = {
    "package": lambda: DDPMNotesPipeline.from_pretrained(EXAMPLE),
    "its own code": lambda: DiffusionPipeline.from_pretrained(
        EXAMPLE, custom_pipeline=str(EXAMPLE), trust_remote_code=True
    ),
    "stock": lambda: DDPMPipeline.from_pretrained(EXAMPLE),
}


def loaded(how):
    pipe = LOADERS[how]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_holds_what_a_push_sends_and_no_more():
    names = [path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(names, allow_patterns=HUB_FILES)) == sorted(names)
    assert {"README.md", "pipeline.py", "samples.png", "evaluation.json", "training_config.yaml"} <= set(names)
    assert (EXAMPLE / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 8e6
    assert EVALUATION["weights"] == weights_digest(EXAMPLE)


@pytest.mark.parametrize("how", LOADERS)
def test_it_loads_and_draws(how, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = loaded(how)
    assert not caplog.records
    images = pipe(2, num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape[:3] == (2, 28, 28) and np.isfinite(images).all()
    # Digits: dark at the border, with nearly white strokes inside.
    rim = np.concatenate([images[:, :2].ravel(), images[:, -2:].ravel(), images[:, :, :2].ravel()])
    assert rim.mean() < 0.05 and (images.max(axis=(1, 2)) > 0.7).all()


@pytest.mark.parametrize("how", ["package", "its own code"])
def test_its_bits_per_dim_are_those_on_its_card(how):
    """Ten steps on the same images: all terms, from the same noise, to float32 accuracy."""
    row = next(
        row
        for row in EVALUATION["results"]
        if (row["variance_type"], row["path"], row["num_inference_steps"]) == ("fixed_large", "even", 10)
    )
    n = EVALUATION["images"]
    images = load_images("mnist", split=EVALUATION["split"], max_samples=n, show_progress=False)
    assert images.fingerprint == EVALUATION["fingerprint"]
    pipe = loaded(how)
    spaced = DDPMNotesScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace", steps_offset=0)
    spaced.set_timesteps(10)
    settings = {"variance_type": "fixed_large", "decoder_variance": {0: row["decoder_variance"]}}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    result = pipe.bits_per_dim(images.take(range(n)), timesteps=spaced.timesteps.tolist(), seed=EVALUATION["seed"])
    assert result.total == pytest.approx(row["total"], rel=1e-4)
    card = ModelCard.load(EXAMPLE / "README.md")
    assert f"**{row['total']:.4f} ± {row['standard_error']:.4f}**" in card.text
    values = [r.metric_value for r in card.data.eval_results if r.metric_type == "bits_per_dim"]
    assert round(row["total"], 6) in [round(value, 6) for value in values]
