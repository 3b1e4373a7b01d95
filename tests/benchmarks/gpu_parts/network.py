"""The network of the DDPM paper for CIFAR-10 (training/configs/cifar10.yaml), and runs of it."""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_notes_pipeline.training.arguments import Arguments
from ddpm_notes_pipeline.training.networks import new_unet
from ddpm_notes_pipeline.training.parser import parse_arguments
from ddpm_notes_pipeline.training.run import TrainingRun, reset_accelerate
from gpu_parts.setting import Setting
from measure import ROOT
from models import save_images

CONFIG = ROOT / "training" / "configs" / "cifar10.yaml"
TINY = "--block_out_channels 32 32 --layers_per_block 1 --attention_levels 1 --train_batch_size 4 --dataloader_num_workers 0"
LONG = 1_000_000  # more steps than are ever taken: no step is the last


def random_images(setting: Setting) -> Path:
    """A saved data set of images of noise, 32x32x3 (--quick: 8x8x3)."""
    shape = (16 if setting.quick else 2048, *sides(setting), 3)
    return save_images(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), setting.folder / "images")


def sides(setting: Setting) -> tuple[int, int]:
    return (8, 8) if setting.quick else (32, 32)


def arguments(setting: Setting, images: Path | str, *flags: str) -> Arguments:
    """The settings of the recipe on these images; `flags` of training/train.py win."""
    line = ["--config", str(CONFIG), "--dataset_name", str(images), "--cache_dir", str(setting.folder / "cache")]
    line += ["--max_train_steps", str(LONG), "--report_to", "none", *(TINY.split() if setting.quick else []), *flags]
    return parse_arguments(line)


def training_run(setting: Setting, images: Path, name: str, *flags: str) -> TrainingRun:
    """A run of the recipe on these images, into a folder of this name."""
    return TrainingRun(*arguments(setting, images, "--output_dir", str(setting.folder / name), *flags))


def steps_of(run: TrainingRun) -> Iterator[None]:
    """The loop of `TrainingRun.train`, a step at a time."""
    try:
        for step, batch in run.batches():
            run.update(step, batch)
            run.after(step)
            yield
    finally:
        run.close()


def recipe_network(setting: Setting) -> dict:
    """The configuration of the recipe's UNet."""
    model, images = (
        arguments(setting, "noise").model,
        SimpleNamespace(size=sides(setting), channels=3, num_classes=None),
    )
    return dict(new_unet(model, images).config)  # type: ignore[arg-type]


def new_network(config: dict) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel.from_config(config)


def training_flops(config: dict) -> float:
    """Of a forward and a backward pass of one image, by torch's counter."""
    unet = new_network(config).to("meta").train()
    x = torch.empty(2, unet.config.in_channels, *[unet.config.sample_size] * 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        unet(x, torch.zeros(2, device="meta"), return_dict=False)[0].sum().backward()
    return counter.get_total_flops() / 2


def forget() -> None:
    """Free what the last network left: its memory, its compiled code, accelerate's state."""
    reset_accelerate()
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
