"""The network of a run and the scheduler that is its math: new ones that fit the images, or those of a repository to go on from."""

import math
import warnings

from diffusers import UNet2DModel

from ..data import ImageSet
from ..data.streaming import ImageStream
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import LEARNED_VARIANCES, PRIVATE_ENTRY, DDPMNotesScheduler
from .arguments import ModelArguments


def make_model(model: ModelArguments, images: ImageSet | ImageStream) -> tuple[UNet2DModel, DDPMNotesScheduler]:
    """A new UNet and scheduler, or those of a repository to go on from.

    What was measured on the repository's network is left out of its scheduler.

    Raises:
        ValueError: a network that does not fit the images.
    """
    if model.pretrained_model_name_or_path:
        pipeline = DDPMNotesPipeline.from_pretrained(model.pretrained_model_name_or_path, revision=model.revision)
        unet, scheduler = pipeline.unet, pipeline.scheduler
        if not isinstance(scheduler, DDPMNotesScheduler):
            scheduler = DDPMNotesScheduler.from_config(scheduler.config)
        if unet.config.in_channels != images.channels:
            raise ValueError(
                f"{model.pretrained_model_name_or_path} takes {unet.config.in_channels} channels and the images have {images.channels}; "
                "allowed: the same (see --image_mode)"
            )
        check_size(images.size, len(unet.config.block_out_channels))
        embeddings = unet.config.num_class_embeds
        if (embeddings is None) != (images.num_classes is None) or (images.num_classes or 0) > (embeddings or 0):
            raise ValueError(
                f"{model.pretrained_model_name_or_path} has {embeddings or 0} class embeddings and the images have "
                f"{images.num_classes or 0} classes; allowed: an embedding for each class, or neither (see --label_column)"
            )
        unet.register_to_config(sample_size=list(images.size))
        return unet.float(), without_measured_variances(scheduler)
    scheduler = DDPMNotesScheduler(
        num_train_timesteps=model.ddpm_num_steps,
        beta_schedule=model.ddpm_beta_schedule,
        rescale_betas_zero_snr=model.rescale_betas_zero_snr,
        prediction_type=model.prediction_type,
        variance_type=model.variance_type,
    )
    out_channels = images.channels * (2 if model.variance_type in LEARNED_VARIANCES else 1)
    if model.model_config_name_or_path:
        config = dict(UNet2DModel.load_config(model.model_config_name_or_path))
        config.update(sample_size=list(images.size), in_channels=images.channels, out_channels=out_channels)
        check_size(images.size, len(config["block_out_channels"]))
        return UNet2DModel.from_config(config), scheduler

    # as Ho et al. 2020 four levels at 32x32, and more for larger images, but with attention below 16x16 too
    channels = model.block_out_channels
    if channels is None:
        levels = max(
            (n for n in range(1, 7) if all(side % 2 ** (n - 1) == 0 and side >> (n - 1) >= 4 for side in images.size)),
            default=1,
        )
        channels = [128, 128, 256, 256, 512, 512][:levels] if levels > 4 else [128, 256, 256, 256][:levels]
    check_size(images.size, len(channels))
    attention = model.attention_levels
    if attention is None:
        attention = [level for level in range(1, len(channels)) if max(images.size) >> level <= 16]
    if any(not 0 <= level < len(channels) for level in attention):
        raise ValueError(
            f"--attention_levels is {attention}; allowed: 0 to {len(channels) - 1}, the levels of --block_out_channels"
        )
    unet = UNet2DModel(
        sample_size=images.size[0] if images.size[0] == images.size[1] else images.size,
        in_channels=images.channels,
        out_channels=out_channels,
        block_out_channels=tuple(channels),
        layers_per_block=model.layers_per_block,
        # a group of one channel would normalise away the time embedding, a number added to each channel
        norm_num_groups=max(1, min(math.gcd(32, *channels), min(channels) // 2)),
        down_block_types=tuple(
            "AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(channels))
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(len(channels)))
        ),
        dropout=model.dropout,
        num_class_embeds=None if images.num_classes is None else images.num_classes + 1,
    )
    if images.num_classes is not None:
        unet.register_to_config(
            **{PRIVATE_ENTRY: {"null_label": images.num_classes, "class_names": images.class_names}}
        )
    return unet, scheduler


def without_measured_variances(scheduler: DDPMNotesScheduler) -> DDPMNotesScheduler:
    """The scheduler without V_t and the decoder's variance, which belong to the network as it was.

    "optimal" becomes the type that fits the network's outputs, its stock fallback. Warns.
    """
    if scheduler.original_sample_mse is None and scheduler.decoder_variance is None:
        return scheduler
    own = scheduler.config.variance_type
    warnings.warn(
        "the repository's original_sample_mse and decoder_variance belong to its network as it was and are left out: "
        f"variance_type is {own} (was {scheduler.variance_type}); evaluate.py --save_variances measures them again",
        stacklevel=3,
    )
    return DDPMNotesScheduler.from_config(
        scheduler.config, variance_type=own, original_sample_mse=None, decoder_variance=None
    )


def check_size(size: tuple[int, int], levels: int) -> None:
    """A UNet halves the size levels - 1 times."""
    divisor = 2 ** (levels - 1)
    if size[0] % divisor or size[1] % divisor:
        raise ValueError(
            f"the images are {size[0]}x{size[1]} and the UNet has {levels} levels; allowed: sides that divide by {divisor} "
            "(give --resolution), or fewer levels (--block_out_channels)"
        )
