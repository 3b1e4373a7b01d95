"""The network and scheduler of a run: new ones that fit the images, or those of a repository."""

import math
import warnings
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from ..data import ImageSet
from ..data.streaming import ImageStream
from ..names import LEARNED_VARIANCES
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from ..stock_config import PRIVATE_ENTRY
from .arguments import ModelArguments, is_local


def make_model(model: ModelArguments, images: ImageSet | ImageStream) -> tuple[UNet2DModel, DDPMNotesScheduler]:
    """A new UNet and scheduler, or those of a repository without what was measured on its network.

    Raises:
        ValueError: the network does not fit the images, or a local path does not exist.
    """
    if model.pretrained_model_name_or_path:
        unet, scheduler = load_pretrained(model, images)
    else:
        scheduler = DDPMNotesScheduler(
            num_train_timesteps=model.ddpm_num_steps,
            beta_schedule=model.ddpm_beta_schedule,
            log_snr_range=model.log_snr_range,
            rescale_betas_zero_snr=model.rescale_betas_zero_snr,
            prediction_type=model.prediction_type,
            variance_type=model.variance_type,
        )
        unet = new_unet(model, images)
    levels = len(unet.config.block_out_channels)
    divisor = 2 ** (levels - 1)
    height, width = images.size
    if height % divisor or width % divisor:
        raise ValueError(
            f"the images are {height}x{width} and the UNet has {levels} levels; sides must divide by {divisor} "
            "(give --resolution), or levels be fewer (--block_out_channels)"
        )
    return unet, scheduler


def load_pretrained(model: ModelArguments, images: ImageSet | ImageStream) -> tuple[UNet2DModel, DDPMNotesScheduler]:
    """UNet, in float32, and scheduler of a repository or folder, at the size of the images."""
    name = str(model.pretrained_model_name_or_path)
    check_path("--pretrained_model_name_or_path", name)
    pipeline = DDPMNotesPipeline.from_pretrained(name, revision=model.revision)
    unet, scheduler = pipeline.unet, DDPMNotesScheduler.from_config(pipeline.scheduler.config)
    if unet.config.in_channels != images.channels:
        raise ValueError(
            f"{name} takes {unet.config.in_channels} channels and the images have {images.channels}; they must be equal (see --image_mode)"
        )
    embeddings, classes = unet.config.num_class_embeds, images.num_classes
    if (embeddings is None) != (classes is None) or (classes or 0) > (embeddings or 0):
        raise ValueError(
            f"{name} has {embeddings or 0} class embeddings and the images have {classes or 0} classes; "
            "there must be an embedding for each class, or neither (see --label_column)"
        )
    unet.register_to_config(sample_size=list(images.size))
    if images.class_names is not None:
        rename_classes(unet, images.class_names, name)
    return unet.float(), without_measured_variances(scheduler)


def rename_classes(unet: UNet2DModel, names: list[str], model: str) -> None:
    """Give the first labels of `model`'s UNet the classes of the images, and warn if they differ.

    Labels that the images do not have keep their embeddings and their names.
    """
    private = unet.config.get(PRIVATE_ENTRY) or {}
    before = private.get("class_names") or []
    changed = [f"label {i} was {old} and is {new}" for i, (old, new) in enumerate(zip(before, names)) if old != new]
    if changed:
        warnings.warn(f"the images' classes are not those of {model}: {', '.join(changed)}", stacklevel=3)
    unet.register_to_config(**{PRIVATE_ENTRY: {**private, "class_names": [*names, *before[len(names) :]]}})


def new_unet(model: ModelArguments, images: ImageSet | ImageStream) -> UNet2DModel:
    """A UNet by a file or the flags, or of the default shape for the size of the images."""
    out_channels = images.channels * (2 if model.variance_type in LEARNED_VARIANCES else 1)
    if model.model_config_name_or_path:
        check_path("--model_config_name_or_path", model.model_config_name_or_path)
        config = UNet2DModel.load_config(model.model_config_name_or_path)
        fitting = {"in_channels": images.channels, "out_channels": out_channels}
        return UNet2DModel.from_config(config, sample_size=list(images.size), **fitting)
    channels = model.block_out_channels or default_channels(images.size)
    levels = range(len(channels))
    attention = model.attention_levels
    if attention is None:
        attention = [level for level in levels[1:] if max(images.size) >> level <= 16]
    if any(level not in levels for level in attention):
        raise ValueError(
            f"--attention_levels is {attention}; each must be from 0 to {levels[-1]}, the levels of --block_out_channels"
        )
    # groups of one channel would normalize away the time embedding, which adds a number to each
    groups = model.norm_num_groups or max(1, min(math.gcd(32, *channels), min(channels) // 2))
    if any(number % groups for number in channels):
        raise ValueError(f"--norm_num_groups is {groups}; it must divide all of --block_out_channels, {channels}")
    height, width = images.size
    unet = UNet2DModel(
        sample_size=height if height == width else images.size,
        in_channels=images.channels,
        out_channels=out_channels,
        block_out_channels=tuple(channels),
        layers_per_block=model.layers_per_block,
        norm_num_groups=groups,
        resnet_time_scale_shift=model.resnet_time_scale_shift,
        down_block_types=tuple("AttnDownBlock2D" if level in attention else "DownBlock2D" for level in levels),
        up_block_types=tuple("AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(levels)),
        dropout=model.dropout,
        num_class_embeds=None if images.num_classes is None else images.num_classes + 1,
    )
    if images.num_classes is not None:
        classes: dict[str, Any] = {"null_label": images.num_classes, "class_names": images.class_names}
        unet.register_to_config(**{PRIVATE_ENTRY: classes})
    return unet


def default_channels(size: tuple[int, int]) -> list[int]:
    """Four levels at 32x32, as Ho et al. 2020, and up to six for larger images.

    A level needs sides that halve evenly and keep at least 4 pixels.
    """
    fitting = (n for n in range(1, 7) if all(side % 2 ** (n - 1) == 0 and side >> (n - 1) >= 4 for side in size))
    levels = max(fitting, default=1)
    return ([128, 128, 256, 256, 512, 512] if levels > 4 else [128, 256, 256, 256])[:levels]


def without_measured_variances(scheduler: DDPMNotesScheduler) -> DDPMNotesScheduler:
    """The scheduler without V_t, decoder variance and levels, fitted to the network as it was.

    "optimal" becomes its stock fallback, the type that fits the network's outputs. An eta goes,
    too: a bound has none.
    """
    scheduler = DDPMNotesScheduler.from_config(scheduler.config, levels=None, eta=None)  # a run fits its own
    if scheduler.original_sample_mse is None and scheduler.decoder_variance is None:
        return scheduler
    fallback = scheduler.config.variance_type
    warnings.warn(
        "original_sample_mse and decoder_variance were measured on the repository's network and are dropped: "
        f"variance_type is {fallback} (was {scheduler.variance_type}); evaluate.py --save_variances measures "
        "them again",
        stacklevel=3,
    )
    return DDPMNotesScheduler.from_config(
        scheduler.config, variance_type=fallback, original_sample_mse=None, decoder_variance=None
    )


def check_sampling_steps(scheduler: DDPMNotesScheduler, steps: int | None) -> None:
    """Raise ValueError for more sampling steps than the scheduler has timesteps."""
    if (steps or 0) > len(scheduler):
        raise ValueError(
            f"--ddpm_num_inference_steps is {steps}; it must be at most {len(scheduler)}, the model's timesteps"
        )


def check_path(flag: str, name: str) -> None:
    """Raise ValueError for a missing local path: diffusers would take it for a repository id."""
    if is_local(name) and not Path(name).exists():
        raise ValueError(f"{flag} is {name}, and there is no such file or folder in {Path.cwd()}")
