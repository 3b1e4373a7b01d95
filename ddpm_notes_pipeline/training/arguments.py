# ruff: noqa: RUF009 - `setting` returns a field
"""The settings of training and evaluation: dataclasses whose fields carry their help and bounds.

Names follow diffusers' training scripts where these have a flag for the same thing. From Python:

    data, model, run = DataArguments(dataset_name="digits"), ModelArguments(), RunArguments(seed=3)

`parser.py` fills the same classes from a command line and a YAML file.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

FEATURE_NETWORK_HELP = (
    "Network whose features are compared: efficientnet-lite0, or a vision model of transformers, by Hub id or folder."
)


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A field with its help text and bounds.

    Args:
        default: MISSING for a required setting; a list is copied for each instance.
        bounds: `at_least` (inclusive), `above` and `below` (exclusive). They hold for each entry
            of a list; None is always allowed.
    """
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = setting(
        None, "'digits' or 'mnist' (embedded), a data set on the Hub, or a local one saved by `datasets`."
    )
    dataset_config_name: str | None = setting(None, "Configuration of the data set on the Hub.")
    train_data_dir: str | None = setting(
        None,
        "A folder of images, instead of --dataset_name. If all its sub-folders are named train, test, "
        "validation or the like, they are its splits; otherwise all images below it form the split 'train'.",
    )
    train_split: str = setting("train", "Split to train on.")
    validation_split: str | None = setting(None, "Split whose bits/dim are measured during training. Default: none.")
    validation_share: float | None = setting(
        None,
        "Hold out this share of the training images, drawn by --seed, and measure bits/dim on them, instead "
        "of --validation_split. evaluate.py finds them as --split held_out. Default: nothing is held out.",
        above=0,
        below=1,
    )
    image_column: str | None = setting(None, "Column of the images. Default: the only one that holds images.")
    label_column: str | None = setting(
        None,
        "Column of class labels, for class-conditional training. 'label' for a folder of images: the class is "
        "the first sub-folder on the image's path (below the split's, if the folder has splits).",
    )
    label_dropout: float = setting(
        0.1, "Share of labels dropped during training, for classifier-free guidance.", at_least=0, below=1
    )
    resolution: list[int] | None = setting(
        None, "Side, or height and width, to resize and crop to. Default: the images' own size.", at_least=1
    )
    center_crop: bool = setting(False, "Crop the center. Default: a random crop each time.")
    random_flip: bool = setting(False, "Flip images horizontally with probability 1/2.")
    image_mode: Literal["L", "RGB", "RGBA"] | None = setting(
        None, "Convert images to this mode. Default: their own mode."
    )
    streaming: bool = setting(
        False,
        "Read the data set during training instead of decoding it to disk first, for sets larger than the "
        "disk. The batch of a step still depends on the seed alone, not on the number of processes. Rows are "
        "shuffled in a buffer and shards are reordered each epoch, a weaker shuffle than that of a stored "
        "set. Resuming re-reads up to one epoch and a part of another. Needs --max_train_steps.",
    )
    shuffle_buffer_size: int = setting(
        1000, "Encoded rows that --streaming keeps in memory to shuffle them.", at_least=1
    )
    max_train_samples: int | None = setting(
        None, "Use at most this many images, evenly spaced over the split (--streaming: the first).", at_least=1
    )
    max_validation_images: int = setting(
        256,
        "Measure on at most this many images of --validation_split or --validation_share, evenly spaced over them (--streaming: the first).",
        at_least=1,
    )
    on_bad_image: Literal["error", "skip"] = setting("error", "What to do with an unreadable image.")
    cache_dir: str | None = setting(None, "Where decoded images are kept. Default: the Hugging Face cache.")
    dataloader_num_workers: int = setting(
        0, "Processes that prepare batches ahead; 0: the training process does.", at_least=0
    )
    data_fingerprint: str | None = setting(
        None,
        "Fingerprint that the training images must have. Training writes it into training_config.yaml. "
        "Ignored if flags beside the file choose other images.",
    )


@dataclass
class ModelArguments:
    """Which network, and which diffusion."""

    pretrained_model_name_or_path: str | None = setting(
        None, "Start from this DDPM repository or folder: its UNet and its scheduler's settings."
    )
    revision: str | None = setting(None, "Revision of that repository.")
    model_config_name_or_path: str | None = setting(
        None, "A UNet2DModel configuration (JSON file, folder or repository), instead of the four below."
    )
    block_out_channels: list[int] | None = setting(
        None, "Channels of each UNet level; each level halves the size. Default: chosen by image size."
    )
    layers_per_block: int = setting(2, "ResNet layers of each UNet level.", at_least=1)
    attention_levels: list[int] | None = setting(
        None,
        "UNet levels with attention; 0 is the full size. The flag without a number ([] in a file): none but "
        "the middle block. Default: every level of 16x16 and below, except the first.",
    )
    dropout: float = setting(0.0, "Dropout inside the UNet.", at_least=0, below=1)
    ddpm_num_steps: int = setting(1000, "T, the length of the diffusion chain.", at_least=1)
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = setting(
        "linear", "Noise schedule."
    )
    rescale_betas_zero_snr: bool = setting(False, "Zero terminal SNR (not with epsilon).")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = setting("epsilon", "What the UNet predicts.")
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = setting(
        "fixed_small", "Variance of the reverse step; the learned ones double the UNet's output channels."
    )


@dataclass
class RunArguments:
    """What is minimized, for how long, and where results go."""

    output_dir: str = setting("outputs/ddpm", "Folder of the run. It becomes the Hub folder of the model.")
    overwrite_output_dir: bool = setting(False, "Train even if the folder is not empty.")
    seed: int = setting(0, "Data order, noise and initial weights depend on it alone.", at_least=0)
    objective: Literal["simple", "hybrid", "vlb"] = setting(
        "simple", "Loss: simple is Algorithm 1, vlb the bound, hybrid both."
    )
    loss_weighting: Literal["none", "min_snr"] = setting("none", "Weight of the simple loss over timesteps.")
    snr_gamma: float = setting(5.0, "gamma of min_snr.", above=0)
    timestep_sampling: Literal["uniform", "stratified", "loss_second_moment"] = setting(
        "uniform", "How timesteps are drawn."
    )
    train_batch_size: int = setting(
        16, "Images per optimizer step, over all processes and accumulation steps.", at_least=1
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches per process and optimizer step, to save memory. Results stay the same.", at_least=1
    )
    num_epochs: int = setting(100, "Passes over the images, unless --max_train_steps is given.", at_least=1)
    max_train_steps: int | None = setting(None, "Optimizer steps.", at_least=1)
    learning_rate: float = setting(1e-4, "Peak learning rate.", above=0)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting("cosine", "Decay of the learning rate over optimizer steps.")
    lr_warmup_steps: int | None = setting(
        None,
        "Optimizer steps of linear warm-up. Default: 500, or a tenth of all steps if that is less. A warm-up "
        "from a file's --config is shortened if it is longer than the run.",
        at_least=0,
    )
    adam_beta1: float = setting(0.95, "beta 1 of AdamW.", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "beta 2 of AdamW.", at_least=0, below=1)
    adam_weight_decay: float = setting(1e-6, "Weight decay of AdamW.", at_least=0)
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW.", at_least=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", above=0)
    max_nonfinite_steps: int = setting(
        10, "A step whose loss or gradient is not finite is skipped; this many in a row end the run.", at_least=1
    )
    use_ema: bool = setting(True, "Average the weights; the average is what is sampled and saved.")
    ema_max_decay: float = setting(0.9999, "Largest decay of the average.", at_least=0, below=1)
    ema_schedule: Literal["warmup", "constant"] = setting(
        "warmup", "warmup: the decay rises to --ema_max_decay, see --ema_inv_gamma; constant: it equals that."
    )
    ema_inv_gamma: float = setting(1.0, "The decay at step n is 1 - (1 + n / inv_gamma)^-power.", above=0)
    ema_power: float = setting(0.75, "Exponent of the decay, see --ema_inv_gamma.", above=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "Precision that the UNet computes in.")
    gradient_checkpointing: bool = setting(False, "Less memory for a third more time.")
    torch_compile: bool = setting(False, "Compile the UNet: slow to start, then faster.")
    checkpointing_steps: int = setting(500, "Steps between checkpoints.", at_least=1)
    checkpoints_total_limit: int | None = setting(None, "Keep only this many of the newest checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = setting(
        None,
        "'latest', or the path of a checkpoint. SIGTERM and ctrl-C to the training process (`accelerate "
        "launch` of one process does not forward them: signal the group) write one and print the command "
        "that resumes from it.",
    )
    logging_steps: int = setting(10, "Steps between writes of the losses.", at_least=1)
    report_to: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = setting(
        "auto",
        "A tracker besides loss.jsonl and validation.jsonl. auto: trackio if it is installed; `trackio show` opens it.",
    )
    validation_steps: int = setting(
        1000,
        "Steps between measurements of bits/dim on --validation_split or --validation_share; also after the "
        "last step. Averaged weights, the same noise each time, 16 network evaluations per image.",
        at_least=1,
    )
    sample_steps: int | None = setting(None, "Steps between sample grids. Default: only at the end.", at_least=1)
    metric_interval: int | None = setting(
        None,
        "Steps between measurements of how far samples are from the training images, beside held-out images. Default: never, they take time.",
        at_least=1,
    )
    metric_images: int = setting(1000, "Samples for each of these measurements.")
    metric_network: str = setting("efficientnet-lite0", FEATURE_NETWORK_HELP)
    num_samples: int = setting(64, "Images of the sample grid.", at_least=1)
    eval_batch_size: int = setting(64, "Images sampled at once by a process.", at_least=1)
    ddpm_num_inference_steps: int | None = setting(None, "Sampling steps. Default: all T.", at_least=1)
    push_to_hub: bool = setting(
        False, "Publish the model with its code and card. The token is HF_TOKEN, or that of `hf auth login`."
    )
    hub_model_id: str | None = setting(
        None, "Repository, 'user/name'. Default: the output folder's name in your namespace."
    )
    hub_private_repo: bool = setting(False, "Make the repository private.")
    hub_strategy: Literal["end", "every_save"] = setting(
        "end", "Push when training ends, or also, in the background, with every checkpoint."
    )
    license: str | None = setting(
        None, "The model's licence, as the Hub names licences. Default: that of the existing card, or apache-2.0."
    )
    # The command line, script and flags; empty from Python.
    command: tuple[str, ...] = field(default=(), init=False, compare=False)

    @property
    def typed(self) -> frozenset[str]:
        """Names of the settings that the command line itself gave, not a file."""
        return typed_flags(self.command)


@dataclass
class EvaluationArguments:
    """What is measured, and how precisely."""

    model: str = setting(MISSING, "A DDPM: a folder, or a repository on the Hub.")
    revision: str | None = setting(None, "Revision of that repository.")
    split: str = setting("test", "Split of the images to measure on; held_out: those that --validation_share held out.")
    seed: int = setting(0, "Seed of the training run: it drew the images of --validation_share.")
    max_images: int | None = setting(
        None,
        "Measure on this many images, evenly spaced over the split (--streaming: the first). Default: all.",
        at_least=1,
    )
    variance_types: list[str] | None = setting(
        None,
        "Variances to compare: fixed_small, fixed_large, optimal, and the learned type that the model was "
        "trained with. Default: the model's own (--table: all of them).",
    )
    num_inference_steps: list[int] | None = setting(
        None, "Numbers of steps K. Default: T (--table: 10, 25, 50, 100 and T).", at_least=1
    )
    paths: list[str] = setting(
        ["even"],
        "even: K timesteps evenly spaced from 0 to T-1; best: the K, including 0 and T-1, with the least bound of optimal.",
    )
    decoder: Literal["own", "fitted"] = setting(
        "own", "Variance of the decoder: each variance type's own, or one fitted number for all but the learned."
    )
    variance_split: str = setting("train", "Split on which optimal, best, fitted and --save_variances are measured.")
    save_variances: bool = setting(
        False,
        "Save the measured variance of each step, and the decoder's with --decoder fitted, in the scheduler of "
        "the model, a local folder; its variance_type becomes optimal.",
    )
    full: bool = setting(False, "Evaluate every term of the bound.")
    evaluations_per_image: int = setting(
        38, "Network evaluations per image, without --full; a path of no more steps is measured in full.", at_least=2
    )
    batch_size: int = setting(128, "Noisy images through the network at once.", at_least=1)
    noise_seed: int = setting(0, "Seed of the noise, and of the samples.")
    metrics: bool = setting(
        False, "Also sample, for the rows of --metric_steps, and measure how far samples are from images."
    )
    metric_images: int = setting(1000, "Samples for each such row; image i has the seed noise_seed + i.")
    metric_sets: int = setting(
        1,
        "Sets of samples, each from other seeds: figures are means, standard errors over sets (--table: at least 2).",
        at_least=1,
    )
    metric_steps: list[int] | None = setting(
        None, "Numbers of steps to sample at. Default: those of the bounds (--table: 10, 25, 50, 100).", at_least=1
    )
    samplers: list[str] = setting(
        [],
        "Other samplers besides Algorithm 2, for samples alone: ddim and dpmsolver++ (diffusers'), eta0 (our "
        "DDIM). Needs --metrics. --table: ddim and dpmsolver++, unless given.",
    )
    metric_split: str = setting("train", "Split that samples are compared with, beside the held-out images of --split.")
    metric_network: str = setting("efficientnet-lite0", FEATURE_NETWORK_HELP)
    table: bool = setting(
        False,
        "The whole comparison, as table.md: every variance, 10 to T steps, even and best paths, a fitted "
        "decoder, samples (at T of fixed_large alone, below T of even paths and of optimal's best ones), "
        "other samplers.",
    )
    results_dir: str | None = setting(None, "Where results go. Default: the model's folder, or outputs/evaluation.")


class Arguments(NamedTuple):
    """All settings of a training run."""

    data: DataArguments
    model: ModelArguments
    run: RunArguments


def check_bounds(*parts: Any) -> None:
    """Raise ValueError for the first number outside the bounds of its field."""
    for part in parts:
        for one in fields(part):
            bounds, value = one.metadata.get("bounds"), getattr(part, one.name)
            if not bounds or value is None:
                continue
            numbers = value if isinstance(value, list) else [value]
            if not all(_within(number, **bounds) for number in numbers):
                words = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise ValueError(f"--{one.name} is {value}; it must be {words}")


def _within(number: float, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf) -> bool:
    return at_least <= number and above < number < below  # False for NaN and infinity


def check_arguments(data: DataArguments, model: ModelArguments, run: RunArguments) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        ValueError: a number outside its bounds, or settings that contradict each other.
    """
    check_bounds(data, model, run)
    check_images(data)
    held_out = data.validation_split is not None or data.validation_share is not None
    if run.metric_interval is not None and (data.streaming or not held_out):
        fault = "--streaming" if data.streaming else "no --validation_split"
        raise ValueError(
            f"--metric_interval is {run.metric_interval} with {fault}; it needs stored images, and held-out ones to "
            "compare with (--validation_split or --validation_share)"
        )
    if data.streaming and run.max_train_steps is None:
        raise ValueError("--streaming needs --max_train_steps: the number of images is not known in advance")
    if run.train_batch_size % run.gradient_accumulation_steps:
        raise ValueError(
            f"--train_batch_size is {run.train_batch_size} with --gradient_accumulation_steps "
            f"{run.gradient_accumulation_steps}; it must be a multiple of that"
        )
    if (run.ddpm_num_inference_steps or 0) > model.ddpm_num_steps and model.pretrained_model_name_or_path is None:
        raise ValueError(
            f"--ddpm_num_inference_steps is {run.ddpm_num_inference_steps}; it must be at most {model.ddpm_num_steps} (--ddpm_num_steps)"
        )
    if run.max_train_steps is not None and "lr_warmup_steps" in run.typed:
        warmup_steps(run, run.max_train_steps)


def check_images(data: DataArguments) -> None:
    """Raise ValueError for settings of the images that contradict each other."""
    if (data.dataset_name is None) == (data.train_data_dir is None):
        raise ValueError(
            f"--dataset_name is {data.dataset_name} and --train_data_dir is {data.train_data_dir}; exactly one of them must be given"
        )
    if data.validation_share is not None and data.validation_split is not None:
        raise ValueError("--validation_share and --validation_split are both given; give one of them")
    if data.validation_share is not None and data.streaming:
        raise ValueError("--validation_share needs stored images; with --streaming give --validation_split")
    if data.streaming and data.dataloader_num_workers > 1:
        raise ValueError(
            f"--dataloader_num_workers is {data.dataloader_num_workers} with --streaming; it must be 0 or 1, "
            "since each worker would read the whole stream"
        )
    if data.resolution is not None and len(data.resolution) > 2:
        raise ValueError(f"--resolution is {data.resolution}; it must be one side, or height and width")


def warmup_steps(run: RunArguments, steps: int) -> int:
    """Warm-up steps of a run of `steps` steps; a longer warm-up that a file asks for is shortened.

    Raises:
        ValueError: the command line itself asks for a longer warm-up than the run.
    """
    default, asked = min(500, steps // 10), run.lr_warmup_steps
    if asked is None or asked <= steps:
        return default if asked is None else asked
    if "lr_warmup_steps" in run.typed:
        raise ValueError(f"--lr_warmup_steps is {asked} and training ends after {steps} steps; it must be at most that")
    return default


def typed_flags(line: Sequence[str]) -> frozenset[str]:
    """The names of the flags on a command line, without dashes."""
    words = (word.partition("=")[0].replace("-", "_") for word in line)
    return frozenset(word.removeprefix("__") for word in words if word.startswith("__"))


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
