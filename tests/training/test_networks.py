"""The network that is chosen for images of any channels and size, and what is refused."""

import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ddpm_notes_pipeline.data import ImageSet, load_images
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from ddpm_notes_pipeline.training.networks import make_model
from ddpm_notes_pipeline.training.parser import parse_arguments


def images_of(folder: Path, mode: str, height: int, width: int) -> ImageSet:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{n}.png")
    return load_images(train_data_dir=folder, cache_dir=folder / "cache", show_progress=False)


def network_of(images: ImageSet, *flags: str) -> torch.nn.Module:
    _, model, _ = parse_arguments(["--dataset_name", "digits", "--layers_per_block", "1", *flags])
    return make_model(model, images)[0]


@pytest.mark.parametrize(
    ("mode", "height", "width", "levels"),
    [("L", 28, 28, 3), ("RGB", 16, 24, 3), ("RGBA", 32, 32, 4), ("L", 9, 7, 1), ("RGB", 30, 20, 2), ("L", 8, 64, 2)],
)
def test_every_size_and_number_of_channels_has_a_network(tmp_path, mode, height, width, levels):
    """Levels as far as every side halves evenly and has 4 pixels left; no flag is needed."""
    unet = network_of(images_of(tmp_path, mode, height, width))
    assert len(unet.config.block_out_channels) == levels
    x = torch.rand(1, len(mode), height, width)
    with torch.no_grad():
        assert unet(x, 3).sample.shape == x.shape


def attention_of(unet: torch.nn.Module) -> list[int]:
    """Down levels with attention, seen in the modules."""
    return [level for level, block in enumerate(unet.down_blocks) if getattr(block, "attentions", None)]


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ([], [1, 2]),
        (["--attention_levels"], []),
        (["--attention_levels", "0"], [0]),
        (["--attention_levels", "2", "0"], [0, 2]),
    ],
)
def test_attention_is_where_it_is_asked_for_or_nowhere(tmp_path, flags, levels):
    unet = network_of(images_of(tmp_path, "L", 28, 28), *flags)
    assert attention_of(unet) == levels
    assert [
        level for level, block in enumerate(reversed(unet.up_blocks)) if getattr(block, "attentions", None)
    ] == levels
    (tmp_path / "config.yaml").write_text(f"attention_levels: {levels}\n")
    assert (
        parse_arguments(["--dataset_name=digits", f"--config={tmp_path / 'config.yaml'}"])[1].attention_levels == levels
    )


@pytest.mark.parametrize(
    ("size", "flags", "message"),
    [
        (
            (28, 28),
            ["--block_out_channels", "32", "32", "32", "32"],
            "28x28 and the UNet has 4 levels; .*by 8 .*--resolution.*--block_out_channels",
        ),
        ((8, 12), ["--block_out_channels", "32", "32", "32", "32"], "8x12 and the UNet has 4 levels"),
        ((8, 8), ["--attention_levels", "5"], r"--attention_levels is \[5\]; each must be from 0 to 1"),
        (
            (8, 8),
            ["--block_out_channels", "16", "24", "--norm_num_groups", "16"],
            r"--norm_num_groups is 16; it must divide all of --block_out_channels, \[16, 24\]",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused_with_what_would(tmp_path, size, flags, message):
    with pytest.raises(ValueError, match=message):
        network_of(images_of(tmp_path, "L", *size), *flags)


def test_groups_and_the_timestep_s_scale_are_what_the_flags_say(tmp_path):
    """Seen in the modules, the attention's norm and the last one among them."""
    images = images_of(tmp_path, "L", 28, 28)
    flags = ["--norm_num_groups", "8", "--resnet_time_scale_shift", "scale_shift"]
    plain, changed = network_of(images), network_of(images, *flags)
    for unet, groups, numbers in ((plain, 32, 1), (changed, 8, 2)):
        norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert {norm.num_groups for norm in norms} == {groups}
        layers = [layer for block in unet.down_blocks for layer in block.resnets]
        assert all(len(layer.time_emb_proj.bias) == numbers * layer.out_channels for layer in layers)


MEASURED = {"original_sample_mse": [0.1] * 20, "decoder_variance": {0: 0.01, 3: 0.2}}


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range", "learned"])
@pytest.mark.parametrize("optimal", [True, False])
def test_fine_tuning_drops_the_variances_measured_on_the_old_network(tmp_path, variance_type, optimal):
    images = images_of(tmp_path, "L", 8, 8)
    flags = [
        "--dataset_name=digits",
        "--layers_per_block=1",
        "--block_out_channels=8",
        f"--variance_type={variance_type}",
    ]
    unet, scheduler = make_model(parse_arguments([*flags, "--ddpm_num_steps=20"])[1], images)
    changed = {"variance_type": "optimal"} if optimal else {}
    measured = DDPMNotesScheduler.from_config(scheduler.config, **MEASURED, **changed, timestep_spacing="trailing")
    DDPMNotesPipeline(unet, measured).save_pretrained(tmp_path / "model")
    _, model, _ = parse_arguments(["--dataset_name=digits", f"--pretrained_model_name_or_path={tmp_path / 'model'}"])
    was = "optimal" if optimal else variance_type
    with pytest.warns(
        UserWarning, match=rf"variance_type is {variance_type} \(was {was}\); evaluate.py --save_variances"
    ):
        again, kept = make_model(model, images)
    assert again.config.out_channels == (1 if variance_type == "fixed_small" else 2)
    assert (kept.variance_type, kept.original_sample_mse, kept.decoder_variance) == (variance_type, None, None)
    # nothing else is lost
    assert kept.config.timestep_spacing == "trailing" and "_ddpm_notes" not in kept.config


def test_fine_tuning_a_model_without_measured_variances_does_not_warn(tmp_path):
    images = images_of(tmp_path, "L", 8, 8)
    _, model, _ = parse_arguments(["--dataset_name=digits", "--layers_per_block=1", "--block_out_channels=8"])
    unet, scheduler = make_model(model, images)
    DDPMNotesPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    _, model, _ = parse_arguments(["--dataset_name=digits", f"--pretrained_model_name_or_path={tmp_path / 'model'}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = make_model(model, images)[1]
    assert kept.to_json_string() == scheduler.to_json_string()
