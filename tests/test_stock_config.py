"""A schedule that only DDPMScheduler knows by name, in the config of every stock scheduler."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler

STOCK = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
SCHEDULES = ["laplace", "sigmoid", "log_snr"]
load = DDPMNotesScheduler.from_config


def same(one, other):
    """Whether two have one schedule by name, in the config, and bit for bit."""
    names = [(s.private_setting("beta_schedule"), s.config.beta_schedule, s.config.trained_betas) for s in (one, other)]
    return names[0] == names[1] and np.array_equal(one.chain.betas, other.chain.betas)


@pytest.mark.parametrize("settings", [{}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stock", STOCK, ids=lambda c: c.__name__)
def test_stock_schedulers_refused_models_trained_with_laplace_or_sigmoid_betas(stock, schedule, settings, tmp_path):
    """By name: "laplace is not implemented for DDIMScheduler". DDPMScheduler had other betas."""
    ours = DDPMNotesScheduler(200, 0.001, 0.03, beta_schedule=schedule, **settings)
    ours.save_pretrained(tmp_path / "ours")
    plain = DDPMNotesScheduler(200, 0.001, 0.03, beta_schedule=schedule)
    for theirs in (stock.from_config(ours.config), stock.from_pretrained(tmp_path / "ours")):
        assert theirs.config.trained_betas == plain.chain.betas.tolist()
        if not settings:
            torch.testing.assert_close(theirs.betas, ours.betas, rtol=1e-7, atol=0)
        theirs.set_timesteps(5)
        theirs.save_pretrained(tmp_path / "theirs")
        saved = DDPMNotesScheduler.from_pretrained(tmp_path / "theirs", variance_type="fixed_small")
        assert same(load(theirs.config), ours) and same(saved, ours)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_keeps_its_own_name_and_float64_table(schedule, tmp_path):
    ours = DDPMNotesScheduler(50, beta_schedule=schedule, variance_type="fixed_large")
    ours.save_pretrained(tmp_path)
    again = DDPMNotesScheduler.from_pretrained(tmp_path)
    assert same(again, ours) and again.private_setting("beta_schedule") == schedule
    longer = DDPMNotesScheduler(100, beta_schedule=schedule, variance_type="fixed_large")
    assert same(load(ours.config, num_train_timesteps=100), longer)
    assert same(load(ours.config, beta_schedule="linear"), DDPMNotesScheduler(50, variance_type="fixed_large"))


def test_betas_that_somebody_chose_since_stay():
    ours = DDPMNotesScheduler(3, beta_schedule="sigmoid")
    theirs = DDIMScheduler.from_config(ours.config, trained_betas=[0.1, 0.2, 0.3])
    assert load(theirs.config).chain.betas.tolist() == [0.1, 0.2, 0.3]
    assert load(load(theirs.config).config).chain.betas.tolist() == [0.1, 0.2, 0.3]
    theirs = DDIMScheduler.from_config(ours.config, trained_betas=None, beta_schedule="scaled_linear")
    assert same(load(theirs.config), DDPMNotesScheduler(3, beta_schedule="scaled_linear"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_config_of_an_earlier_version_loads(schedule, tmp_path):
    """It has the name of the schedule where stock classes look, and no table."""
    ours = DDPMNotesScheduler(20, beta_schedule=schedule)
    old = {**json.loads(ours.to_json_string()), "beta_schedule": schedule, "trained_betas": None}
    del old["_ddpm_notes"]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(old))
    assert same(DDPMNotesScheduler.from_pretrained(tmp_path), ours)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_that_all_know_stay_names(schedule):
    config = DDPMNotesScheduler(20, beta_schedule=schedule).config
    assert (config.beta_schedule, config.trained_betas) == (schedule, None) and "_ddpm_notes" not in config


def test_the_ends_of_log_snr_survive_saving_and_other_classes(tmp_path):
    ours = DDPMNotesScheduler(50, beta_schedule="log_snr", log_snr_range=(8, -5))
    ours.save_pretrained(tmp_path / "ours")
    assert same(DDPMNotesScheduler.from_pretrained(tmp_path / "ours"), ours)
    theirs = DDIMScheduler.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.alphas_cumprod.numpy(), rtol=2e-4)  # float32 there
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(DDPMNotesScheduler.from_pretrained(tmp_path / "theirs"), ours)
