# ruff: noqa: RUF009 - `setting` returns a field
"""The settings of training and evaluation: dataclasses whose fields carry their help and limits.

Names follow diffusers' training scripts where these have a flag for the same thing. From Python:

    data, model, run = DataArguments(dataset_name="digits"), ModelArguments(), RunArguments(seed=3)

`parser.py` fills the same classes from a command line and a YAML file.
"""

import math
import operator
import os
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..core.schedules import BETA_SCHEDULES
from ..names import (
    EVALUATIONS_PER_IMAGE,
    OBJECTIVES,
    PREDICTION_TYPES,
    TIMESTEP_SAMPLINGS,
    VARIANCE_TYPES,
    WEIGHTINGS,
)
from .commands import num_processes, typed_flags

FEATURE_NETWORK_HELP = "Network whose features are compared: efficientnet-lite0, or a vision model of transformers."
PRECISIONS = ("no", "fp16", "bf16")
# What --model_config_name_or_path decides.
NETWORK_FLAGS = (
    "block_out_channels",
    "layers_per_block",
    "attention_levels",
    "norm_num_groups",
    "resnet_time_scale_shift",
    "dropout",
)
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None, **bounds: float) -> Any:
    """A field with its help text and limits, which hold for each entry of a list.

    Args:
        default: MISSING for a required setting; a function is called for it.
        choices: of the flag, where the type does not list them.
        bounds: `at_least` (inclusive), `above` and `below` (exclusive). None is always allowed.
    """
    how: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return field(**how, metadata={"help": help, "choices": choices, "bounds": bounds})


def launched_precision() -> Any:
    """What `accelerate launch` was asked for, by its flag or its configuration file."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = setting(None, "'digits' or 'mnist' (embedded), a Hub data set, or a saved `Dataset`.")
    dataset_config_name: str | None = setting(None, "Configuration of the data set on the Hub.")
    train_data_dir: str | None = setting(
        None,
        "A folder of images, instead of --dataset_name. If all its sub-folders are named train, test, "
        "validation or the like, they are its splits; otherwise all images below it form the split 'train'.",
    )
    train_split: str = setting("train", "Split to train on.")
    validation_split: str | None = setting(None, "Split whose bits/dim are measured during training. Default: none.")
    validation_share: float | None = setting(
        None, "Or hold out this share of the training images, drawn by --seed, as split held_out.", above=0, below=1
    )
    image_column: str | None = setting(None, "Column of the images. Default: the only one that holds images.")
    label_column: str | None = setting(None, "Column of class labels, to train with classes. Of a folder: 'label'.")
    classes: list[str] | None = setting(
        None, "Keep only these classes of --label_column; labels number them in this order. Default: all."
    )
    label_dropout: float = setting(0.1, "Share of labels dropped, for classifier-free guidance.", at_least=0, below=1)
    resolution: list[int] | None = setting(None, "Side, or height and width. Default: the images' own.", at_least=1)
    center_crop: bool = setting(False, "Crop the center. Default: a random crop each time.")
    random_flip: bool = setting(False, "Flip images horizontally with probability 1/2.")
    image_mode: Literal["L", "RGB", "RGBA"] | None = setting(None, "Mode to convert images to. Default: their own.")
    streaming: bool = setting(
        False,
        "For sets larger than the disk: read the set while training. Needs --max_train_steps. Rows are shuffled in a "
        "buffer, and shards each epoch: a weaker shuffle. Resuming reads up to one epoch and a part of another again.",
    )
    shuffle_buffer_size: int = setting(1000, "Encoded rows in memory that --streaming shuffles.", at_least=1)
    max_train_samples: int | None = setting(
        None, "Train on at most this many, evenly spaced over the split.", at_least=1
    )
    max_validation_images: int = setting(
        256, "Measure bits/dim on at most this many held-out images, evenly spaced.", at_least=1
    )
    on_bad_image: Literal["error", "skip"] = setting("error", "What to do with an unreadable image.")
    cache_dir: str | None = setting(None, "Where decoded images are kept. Default: the Hugging Face cache.")
    dataloader_num_workers: int = setting(0, "Processes that prepare batches; 0: the training process.", at_least=0)
    data_fingerprint: str | None = setting(
        None, "Fingerprint that the images must have; training_config.yaml states it."
    )


@dataclass
class ModelArguments:
    """Which network, and which diffusion."""

    pretrained_model_name_or_path: str | None = setting(None, "A DDPM to start from: its UNet and its scheduler.")
    revision: str | None = setting(None, "Revision of that repository.")
    model_config_name_or_path: str | None = setting(None, "A UNet2DModel configuration, instead of the six below.")
    block_out_channels: list[int] | None = setting(None, "Channels of each UNet level. Default: by the image size.")
    layers_per_block: int = setting(2, "ResNet layers of each UNet level.", at_least=1)
    attention_levels: list[int] | None = setting(
        None, "UNet levels with attention, from 0; no number: none. Default: those of 16x16 and below, but not 0."
    )
    norm_num_groups: int | None = setting(
        None,
        "Groups of the group norms; must divide all channels. Default: at most 32, of 2 channels or more.",
        at_least=1,
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = setting(
        "default", "How ResNet layers see the timestep: as a shift, or as a scale and a shift."
    )
    dropout: float = setting(0.0, "Dropout inside the UNet.", at_least=0, below=1)
    ddpm_num_steps: int = setting(1000, "T, the length of the diffusion chain.", at_least=1)
    ddpm_beta_schedule: str = setting("linear", "Noise schedule.", BETA_SCHEDULES)
    log_snr_range: list[float] | None = setting(
        None, "Ends of the schedule log_snr: 8 -7 suits digits, 12 -7 photographs. Default: 10 -7."
    )
    rescale_betas_zero_snr: bool = setting(False, "Zero terminal SNR (not with epsilon).")
    prediction_type: str = setting("epsilon", "What the UNet predicts.", PREDICTION_TYPES)
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = setting(
        "fixed_small", "Variance of the reverse step; the learned ones double the UNet's output channels."
    )


@dataclass
class RunArguments:
    """What is minimized, for how long, and where results go."""

    output_dir: str = setting("outputs/ddpm", "Folder of the run. It becomes the Hub folder of the model.")
    overwrite_output_dir: bool = setting(False, "Train even if the folder is not empty.")
    seed: int = setting(0, "Data order, noise and initial weights depend on it alone.", at_least=0)
    objective: str = setting("simple", "Loss: simple is Algorithm 1, vlb the bound, hybrid both.", OBJECTIVES)
    loss_weighting: str = setting("none", "Weight of the simple loss over timesteps.", WEIGHTINGS)
    snr_gamma: float = setting(5.0, "gamma of min_snr.", above=0)
    timestep_sampling: str = setting("uniform", "How timesteps are drawn.", TIMESTEP_SAMPLINGS)
    train_batch_size: int = setting(16, "Images per optimizer step, over all processes.", at_least=1)
    gradient_accumulation_steps: int = setting(1, "Parts of a step, to save memory: the same result.", at_least=1)
    num_epochs: int = setting(100, "Passes over the images, unless --max_train_steps is given.", at_least=1)
    max_train_steps: int | None = setting(None, "Optimizer steps.", at_least=1)
    learning_rate: float = setting(1e-4, "Peak learning rate.", above=0)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting("cosine", "Decay of the learning rate over optimizer steps.")
    lr_warmup_steps: int | None = setting(
        None,
        "Steps of linear warm-up. Default, and if a file asks for more than the run has: a tenth of the run, at most 500.",
        at_least=0,
    )
    adam_beta1: float = setting(0.95, "beta 1 of AdamW.", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "beta 2 of AdamW.", at_least=0, below=1)
    adam_weight_decay: float = setting(1e-6, "Weight decay of AdamW.", at_least=0)
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW.", at_least=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", above=0)
    max_nonfinite_steps: int = setting(10, "Steps in a row, skipped as not finite, that end the run.", at_least=1)
    use_ema: bool = setting(True, "Average the weights; the average is what is sampled and saved.")
    ema_max_decay: float = setting(0.9999, "Largest decay of the average.", at_least=0, below=1)
    ema_schedule: Literal["warmup", "constant"] = setting("warmup", "warmup: the decay rises to --ema_max_decay.")
    ema_inv_gamma: float = setting(1.0, "The decay at step n is 1 - (1 + (n - 1) / inv_gamma)^-power.", above=0)
    ema_power: float = setting(0.75, "Exponent of the decay, see --ema_inv_gamma.", above=0)
    mixed_precision: str = setting(
        launched_precision, "Precision that the UNet computes in, by default that of accelerate launch.", PRECISIONS
    )
    gradient_checkpointing: bool = setting(False, "Less memory for a third more time.")
    torch_compile: bool = setting(False, "Compile the UNet: slow to start, then faster.")
    checkpointing_steps: int = setting(500, "Steps between checkpoints.", at_least=1)
    checkpoints_total_limit: int | None = setting(None, "Keep only this many of the newest checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = setting(None, "'latest', or a checkpoint's path. SIGTERM writes one.")
    logging_steps: int = setting(10, "Steps between writes of the losses.", at_least=1)
    report_to: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = setting(
        "auto", "A tracker besides the .jsonl logs. auto: trackio if it is installed; `trackio show` opens it."
    )
    fit_levels: bool = setting(True, "Fit the data's 8-bit levels to the network before its bits/dim are measured.")
    validation_steps: int = setting(1000, "Steps between measurements of bits/dim on held-out images.", at_least=1)
    sample_steps: int | None = setting(None, "Steps between sample grids. Default: only at the end.", at_least=1)
    metric_interval: int | None = setting(
        None, "Steps between measurements of how far samples are from images. Default: never.", at_least=1
    )
    metric_images: int = setting(1000, "Samples for each of these measurements.")
    metric_network: str = setting("efficientnet-lite0", FEATURE_NETWORK_HELP)
    num_samples: int = setting(64, "Images of the sample grid.", at_least=1)
    eval_batch_size: int = setting(64, "Images sampled at once by a process.", at_least=1)
    ddpm_num_inference_steps: int | None = setting(None, "Sampling steps. Default: all T.", at_least=1)
    push_to_hub: bool = setting(False, "Publish the model, with the token HF_TOKEN or that of `hf auth login`.")
    hub_model_id: str | None = setting(
        None, "Repository, 'user/name'. Default: the output folder's name, under your user name."
    )
    hub_private_repo: bool = setting(False, "Make the repository private.")
    hub_strategy: Literal["end", "every_save"] = setting("end", "Push at the end, or also with every checkpoint.")
    license: str | None = setting(None, "The model's licence. Default: that of the existing card, or apache-2.0.")
    # The command line, script and flags; empty from Python.
    command: tuple[str, ...] = field(default=(), init=False, compare=False)


@dataclass
class EvaluationArguments:
    """What is measured, and how precisely."""

    model: str = setting(MISSING, "A DDPM: a folder, or a repository on the Hub.")
    revision: str | None = setting(None, "Revision of that repository.")
    split: str = setting("test", "Split to measure on; held_out: the images that --validation_share held out.")
    seed: int = setting(0, "Seed of the training run: it drew the images of --validation_share.")
    max_images: int | None = setting(
        None,
        "Measure on this many images, evenly spaced over the split (--streaming: the first). Default: all.",
        at_least=1,
    )
    headline_images: int | None = setting(
        None,
        "Also measure the model's own variance in all T steps on this many images, more than --max_images: the card's "
        "headline.",
        at_least=1,
    )
    variance_types: list[str] | None = setting(None, "Variances to compare. Default: the model's own.", VARIANCE_TYPES)
    num_inference_steps: list[int] | None = setting(
        None, "Numbers of steps K. Default: T (--table: 10, 25, 50, 100 and T).", at_least=1
    )
    paths: list[str] | None = setting(
        None,
        "even: K timesteps evenly spaced from 0 to T-1; best: the K timesteps from T-1 down to 0 with the "
        "lowest bound under the optimal variance; with levels the path may end above 0. Default: even (--table: both).",
        ("even", "best"),
    )
    decoder: Literal["own", "levels"] = setting(
        "own",
        "levels: Bayes' rule on which 8-bit levels occur, which also refines the network's guess, fitted unless the model "
        "has it; own: the model's levels, or else the Gaussian of the variance type.",
    )
    variance_split: str = setting(
        "train",
        "Split on which optimal, best, levels and --save_variances are measured; variances on at most 4096 images.",
    )
    save_variances: bool = setting(
        False,
        "Save the measured variances, and with --decoder levels the levels too, in the model's scheduler. Its variance "
        "becomes the optimal one, unless it is learned.",
    )
    full: bool = setting(False, "Evaluate every term of the bound.")
    evaluations_per_image: int = setting(
        EVALUATIONS_PER_IMAGE, "Network evaluations per image, without --full.", at_least=2
    )
    batch_size: int = setting(128, "Noisy images through the network at once.", at_least=1)
    noise_seed: int = setting(0, "Seed of the noise, and of the samples.", at_least=0)
    metrics: bool = setting(False, "Also sample, and measure how far samples are from images.")
    metric_images: int = setting(1000, "Samples in a set; image i has the seed noise_seed + i.")
    metric_sets: int = setting(
        1, "Sets of samples, for standard errors (--table: at least 2, but one at T).", at_least=1
    )
    metric_steps: list[int] | None = setting(
        None, "Numbers of steps to sample at. Default: those of the bounds (--table: 10, 25, 50, 100).", at_least=1
    )
    samplers: list[str] | None = setting(
        None,
        "Also sample by these, with --metrics: ddim and dpmsolver++ (diffusers'), eta0 (our DDIM). "
        "Default: none (--table: ddim and dpmsolver++).",
        ("ddim", "eta0", "dpmsolver++"),
    )
    guidance_scales: list[float] | None = setting(
        None,
        "Guidance of the samples of a model with classes, with --metrics. It moves samples towards their class, and away "
        "from the data's distribution. Default: 1, which is none.",
        at_least=0,
    )
    metric_split: str = setting("train", "Split that samples are compared with, beside the held-out images of --split.")
    metric_network: str = setting("efficientnet-lite0", FEATURE_NETWORK_HELP)
    table: bool = setting(
        False, "Write table.md: every variance, 10 to T steps, both paths, --decoder levels, samples, samplers."
    )
    results_dir: str | None = setting(None, "Where results go. Default: the model's folder, or outputs/evaluation.")


class Arguments(NamedTuple):
    """All settings of a training run."""

    data: DataArguments
    model: ModelArguments
    run: RunArguments


def check_bounds(*parts: Any) -> None:
    """Raise ValueError for the first number that is not finite or outside its field's bounds."""
    for part in parts:
        for one in fields(part):
            value, bounds = getattr(part, one.name), one.metadata.get("bounds", {})
            numbers = [] if value is None else value if isinstance(value, list) else [value]
            if not all(math.isfinite(n) and BOUNDS[name](n, bound) for n in numbers for name, bound in bounds.items()):
                words = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise ValueError(f"--{one.name} is {value}; it must be {words}")


def check_arguments(data: DataArguments, model: ModelArguments, run: RunArguments) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        ValueError: a number outside its bounds, or settings that contradict each other.
    """
    check_bounds(data, model, run)
    check_images(data)
    if run.metric_interval is not None:
        held_out = data.validation_split is not None or data.validation_share is not None
        fault = "--streaming" if data.streaming else "" if held_out else "no --validation_split or --validation_share"
        if fault:
            raise ValueError(
                f"--metric_interval is {run.metric_interval} with {fault}; it needs stored, held-out images"
            )
    if data.streaming and run.max_train_steps is None:
        raise ValueError("--streaming needs --max_train_steps: the number of images is not known in advance")
    if run.mixed_precision not in PRECISIONS:  # accelerate's: the flag's has been checked
        raise ValueError(f"--mixed_precision is {run.mixed_precision}; it must be one of {', '.join(PRECISIONS)}")
    batch, parts, processes = run.train_batch_size, run.gradient_accumulation_steps, num_processes()
    if batch % (processes * parts):
        raise ValueError(
            f"--train_batch_size is {batch} with --gradient_accumulation_steps {parts} on {processes} process(es); it "
            f"must be a multiple of {processes * parts}"
        )
    K, T = run.ddpm_num_inference_steps or 0, model.ddpm_num_steps
    if K > T and model.pretrained_model_name_or_path is None:
        raise ValueError(f"--ddpm_num_inference_steps is {K}; it must be at most {T} (--ddpm_num_steps)")
    schedule = model.ddpm_beta_schedule
    if schedule != "log_snr" and "log_snr_range" in typed_flags(run.command):  # a file's is left unused
        raise ValueError(f"--log_snr_range goes with --ddpm_beta_schedule log_snr; it is {schedule}")
    check_network_flags(model, typed_flags(run.command))
    if run.max_train_steps is not None:
        warmup_steps(run, run.max_train_steps)


def check_network_flags(model: ModelArguments, typed: set[str]) -> None:
    """Warn of typed flags of the network or schedule beside a model that has its own.

    In a configuration file they are left unused silently: one file serves both runs.
    """
    every = [f.name for f in fields(model) if f.name not in ("pretrained_model_name_or_path", "revision")]
    for source, flags in (("pretrained_model_name_or_path", every), ("model_config_name_or_path", NETWORK_FLAGS)):
        unused = ", ".join(f"--{name}" for name in flags if name in typed)
        if getattr(model, source) is not None and unused:
            warnings.warn(f"{unused} without effect: --{source} has its own", stacklevel=2)


def check_evaluation(data: DataArguments, evaluation: EvaluationArguments) -> None:
    """Raise ValueError for what can be refused before anything is loaded."""
    check_bounds(data, evaluation)
    check_images(data)
    if evaluation.save_variances and not Path(evaluation.model).is_dir():
        raise ValueError(
            f"--save_variances writes into the model's folder and --model is {evaluation.model}, which must be a "
            "folder here: download the repository first (hf download), or leave --save_variances out"
        )
    if evaluation.samplers and not (evaluation.metrics or evaluation.table):
        raise ValueError("--samplers have no bits/dim; they must go with --metrics")
    if evaluation.guidance_scales and not (evaluation.metrics or evaluation.table):
        raise ValueError(
            "--guidance_scales is for samples, as guided sampling has no bits/dim; it must go with --metrics"
        )


def check_images(data: DataArguments) -> None:
    """Raise ValueError for settings of the images that contradict each other."""
    name, folder, workers = data.dataset_name, data.train_data_dir, data.dataloader_num_workers
    if (name is None) == (folder is None):
        raise ValueError(
            f"--dataset_name is {name} and --train_data_dir is {folder}; exactly one of them must be given"
        )
    if data.validation_share is not None and data.validation_split is not None:
        raise ValueError("--validation_share and --validation_split are both given; give one of them")
    if data.validation_share is not None and data.streaming:
        raise ValueError("--validation_share needs stored images; with --streaming give --validation_split")
    if data.streaming and workers > 1:  # each would read the whole stream
        raise ValueError(f"--dataloader_num_workers is {workers} with --streaming; it must be 0 or 1")
    if data.classes is not None and data.label_column is None:
        raise ValueError(
            f"--classes is {' '.join(data.classes)} without --label_column, which must say where they are (of a folder: label)"
        )
    if data.resolution is not None and len(data.resolution) > 2:
        raise ValueError(f"--resolution is {data.resolution}; it must be one side, or height and width")


def warmup_steps(run: RunArguments, steps: int) -> int:
    """Warm-up steps of a run of `steps` steps; a file's longer one becomes the default.

    Raises:
        ValueError: the command line itself asks for a longer warm-up than the run.
    """
    default, asked = min(500, steps // 10), run.lr_warmup_steps
    if asked is not None and asked > steps and "lr_warmup_steps" in typed_flags(run.command):
        raise ValueError(f"--lr_warmup_steps is {asked} and training ends after {steps} steps; it must be at most that")
    return default if asked is None or asked > steps else asked


def is_local(name: str | None) -> bool:
    """Whether a setting that may name a repository is a local path."""
    return name is not None and (name.startswith(("/", ".", "~")) or Path(name).expanduser().exists())


def as_config(*arguments: Any) -> dict[str, Any]:
    """The settings as `--config` reads them back, without those that concern one launch alone."""
    return {
        name: value
        for part in arguments
        for name, value in asdict(part).items()
        if value is not None and name not in ("overwrite_output_dir", "resume_from_checkpoint", "command")
    }
