"""The settings of a training run: flags, or a YAML file of flags under `--config`, checked alike. The command line wins.

Names are those of diffusers' training scripts where these have one.
"""

import argparse
import difflib
import math
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from ..scheduling_ddpm_notes import VARIANCE_TYPES


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'digits' or 'mnist' (embedded), a data set on the Hub, or a local one saved by `datasets`."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set on the Hub."}
    )
    train_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder of images, in the place of --dataset_name. Where all its sub-folders are named train, test, validation or "
            "the like, they are its splits; else every image below it is in the split 'train'."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split whose bits/dim are measured while training. Default: none."},
    )
    validation_share: float | None = field(
        default=None,
        metadata={
            "help": "Hold this share of the training images out, drawn by --seed, and measure bits/dim on them, in the place of "
            "--validation_split. evaluate.py finds them again as --split held_out. Default: none are held out."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the only one that holds images."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of class labels, for class-conditional training. 'label' for a folder of images: the class of an image is "
            "the first sub-folder that it is in (below the split's, if the folder has splits)."
        },
    )
    label_dropout: float = field(
        default=0.1,
        metadata={"help": "Share of labels left out in training, so that guidance has something to guide away from."},
    )
    resolution: list[int] | None = field(
        default=None,
        metadata={"help": "Side, or height and width, to resize and crop to. Default: the images' own size."},
    )
    center_crop: bool = field(default=False, metadata={"help": "Crop the centre. Default: a random place each time."})
    random_flip: bool = field(default=False, metadata={"help": "Flip images left to right half of the time."})
    image_mode: Literal["L", "RGB", "RGBA"] | None = field(
        default=None, metadata={"help": "Convert images. Default: their own mode."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the set while training, for one larger than the disk, in place of decoding it to the disk first. Here too the "
            "batch of a step depends on the seed alone, and not on the number of processes, each of which reads its shards. Rows are "
            "shuffled in a buffer, shards in a new order each time; a set is shuffled less well so than as a whole. Going on from a "
            "checkpoint reads again what was read before it, one pass and a part of one at most. Wants --max_train_steps."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows that --streaming holds in memory, as they are stored, to shuffle them."}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use only so many images, evenly spaced over the split (--streaming: the first)."},
    )
    max_validation_images: int = field(
        default=256,
        metadata={
            "help": "Measure on at most so many images of --validation_split, or of those that --validation_share holds out, evenly "
            "spaced over them (--streaming: the first)."
        },
    )
    on_bad_image: Literal["error", "skip"] = field(
        default="error", metadata={"help": "What to do with an unreadable image."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where decoded images are kept. Default: the Hugging Face cache."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that prepare batches ahead; 0: the training one."}
    )
    data_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "The fingerprint that the training images must have; others are an error. Written by training into "
            "training_config.yaml. Not read where flags beside the file choose other images."
        },
    )


@dataclass
class ModelArguments:
    """Which network, and the diffusion it belongs to."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Go on from this DDPM repository or folder (its UNet and its scheduler's settings)."},
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of that repository."})
    model_config_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A UNet2DModel configuration (JSON file, folder or repository), in the place of the four below."
        },
    )
    block_out_channels: list[int] | None = field(
        default=None,
        metadata={"help": "Channels of each UNet level; a level halves the size. Default: chosen by the images' size."},
    )
    layers_per_block: int = field(default=2, metadata={"help": "ResNet layers of each UNet level."})
    attention_levels: list[int] | None = field(
        default=None,
        metadata={
            "help": "UNet levels with attention, 0 is the full size; no number after the flag ([] in a file): none, but in "
            "the block between down and up. Default: those of 16x16 and below, but the first."
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside the UNet."})
    ddpm_num_steps: int = field(default=1000, metadata={"help": "T, the length of the diffusion chain."})
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = field(
        default="linear", metadata={"help": "Noise schedule."}
    )
    rescale_betas_zero_snr: bool = field(default=False, metadata={"help": "Zero terminal SNR (not with epsilon)."})
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = field(
        default="epsilon", metadata={"help": "What the UNet predicts."}
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = field(
        default="fixed_small",
        metadata={"help": "Variance of the reverse step; the learned ones double the UNet's output channels."},
    )


@dataclass
class RunArguments:
    """What is minimised, how long, and where it goes."""

    output_dir: str = field(
        default="outputs/ddpm", metadata={"help": "Folder of the run. Becomes the Hub folder of the model."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Train although the folder is not empty."})
    seed: int = field(
        default=0, metadata={"help": "Data order, noise and initial weights depend on it, and on nothing else."}
    )
    objective: Literal["simple", "hybrid", "vlb"] = field(
        default="simple", metadata={"help": "Loss: Algorithm 1, the bound, or both."}
    )
    loss_weighting: Literal["none", "min_snr"] = field(
        default="none", metadata={"help": "Weights of the simple loss over timesteps."}
    )
    snr_gamma: float = field(default=5.0, metadata={"help": "gamma of min_snr."})
    timestep_sampling: Literal["uniform", "stratified", "loss_second_moment"] = field(
        default="uniform", metadata={"help": "How timesteps are drawn."}
    )
    train_batch_size: int = field(
        default=16, metadata={"help": "Images of one optimizer step in all: over all processes and accumulation steps."}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Parts that a process computes its share of the batch in, to save memory. Changes no result."
        },
    )
    num_epochs: int = field(
        default=100, metadata={"help": "Passes over the images, if --max_train_steps is not given."}
    )
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = field(default="cosine", metadata={"help": "How the learning rate falls, counted in optimizer steps."})
    lr_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps of linear warm-up. Default: 500, or a tenth of all steps where that is less. A file's --config "
            "warm-up that is longer than the run is cut to that."
        },
    )
    adam_beta1: float = field(default=0.95, metadata={"help": "beta 1 of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "beta 2 of AdamW."})
    adam_weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay of AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "epsilon of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    max_nonfinite_steps: int = field(
        default=10,
        metadata={
            "help": "A step whose loss or gradient is not finite changes nothing; this many in a row end the run."
        },
    )
    use_ema: bool = field(
        default=True, metadata={"help": "Average the weights; the average is what is sampled and saved."}
    )
    ema_max_decay: float = field(default=0.9999, metadata={"help": "Largest decay of the average."})
    ema_schedule: Literal["warmup", "constant"] = field(
        default="warmup",
        metadata={"help": "warmup: the decay rises to --ema_max_decay, see --ema_inv_gamma; constant: it is that."},
    )
    ema_inv_gamma: float = field(default=1.0, metadata={"help": "decay at step n is 1 - (1 + n / inv_gamma)^-power."})
    ema_power: float = field(default=0.75, metadata={"help": "See --ema_inv_gamma."})
    mixed_precision: Literal["no", "fp16", "bf16"] = field(
        default="no", metadata={"help": "Type that the UNet computes in."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, a third more time."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the UNet: slow to start, then faster."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Write a checkpoint every so many steps."})
    checkpoints_total_limit: int | None = field(
        default=None, metadata={"help": "Keep only the newest so many checkpoints."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'latest', or the path of a checkpoint. SIGTERM and ctrl-C to the training process (`accelerate launch` of one process "
            "passes nothing on: signal the group) write one and print the command that goes on from it."
        },
    )
    logging_steps: int = field(default=10, metadata={"help": "Write losses every so many steps."})
    report_to: Literal["auto", "none", "trackio", "tensorboard", "wandb"] = field(
        default="auto",
        metadata={
            "help": "A tracker besides loss.jsonl and validation.jsonl. auto: trackio if it is installed; `trackio show` opens it."
        },
    )
    validation_steps: int = field(
        default=1000,
        metadata={
            "help": "Measure bits/dim of --validation_split or --validation_share every so many steps, and after the last: the "
            "averaged weights, the same noise each time, 16 network evaluations an image."
        },
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Sample a grid every so many steps. Default: at the end."}
    )
    metric_interval: int | None = field(
        default=None,
        metadata={
            "help": "Sample every so many steps and measure how far samples are from the training images, beside those held out. "
            "Default: never, it takes time."
        },
    )
    metric_images: int = field(default=1000, metadata={"help": "So many samples then."})
    metric_network: str = field(
        default="efficientnet-lite0",
        metadata={
            "help": "Network whose features are compared: efficientnet-lite0, or a vision model of transformers, by Hub id or folder."
        },
    )
    num_samples: int = field(default=64, metadata={"help": "Images of the sample grid."})
    eval_batch_size: int = field(default=64, metadata={"help": "Images sampled at once by a process."})
    ddpm_num_inference_steps: int | None = field(
        default=None, metadata={"help": "Steps of the path that samples are made with. Default: all."}
    )
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Publish the model with its code and card. The token is HF_TOKEN, or that of `hf auth login`."
        },
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository, 'user/name'. Default: yours, named as the output folder."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make it private."})
    hub_strategy: Literal["end", "every_save"] = field(
        default="end",
        metadata={"help": "Push when training ends, or also, in the background, with every checkpoint."},
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "The model's licence, as the Hub names licences. Default: apache-2.0, or that of the card before."
        },
    )
    typed: frozenset[str] = field(
        default=frozenset(), init=False, compare=False
    )  # settings that the command line itself gave


@dataclass
class EvaluationArguments:
    """What is measured, and how carefully."""

    model: str = field(metadata={"help": "A DDPM: a folder, or a repository on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Revision of that repository."})
    split: str = field(
        default="test",
        metadata={"help": "Split of the images to measure on; held_out: those that --validation_share held out."},
    )
    seed: int = field(default=0, metadata={"help": "Of the training run: it drew the images of --validation_share."})
    max_images: int | None = field(
        default=None,
        metadata={
            "help": "Measure on so many images, evenly spaced over the split (--streaming: the first). Default: all."
        },
    )
    variance_types: list[str] | None = field(
        default=None,
        metadata={
            "help": "Variances to compare: fixed_small, fixed_large, optimal, and the learned type that the model "
            "was trained with. Default: the model's own (--table: all of them)."
        },
    )
    num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "Steps K of the paths. Default: T (--table: 10, 25, 50, 100 and T)."}
    )
    paths: list[str] = field(
        default_factory=lambda: ["even"],
        metadata={
            "help": "even: K timesteps evenly from 0 to T-1; best: the K, 0 and T-1 among them, with the least "
            "bound of optimal."
        },
    )
    decoder: Literal["own", "fitted"] = field(
        default="own",
        metadata={
            "help": "Variance of the decoder: each variance type's own rule, or one fitted number for all but "
            "the learned."
        },
    )
    variance_split: str = field(
        default="train",
        metadata={"help": "Split to measure on what optimal, best, fitted and --save_variances need to know."},
    )
    save_variances: bool = field(
        default=False,
        metadata={
            "help": "Keep the measured variance of each step, and the decoder's with --decoder fitted, in the "
            "scheduler of the model, a folder here; its variance_type becomes optimal."
        },
    )
    full: bool = field(default=False, metadata={"help": "Evaluate every term of the bound."})
    evaluations_per_image: int = field(
        default=38,
        metadata={
            "help": "Network evaluations for each image, without --full; a path of no more steps is measured in full."
        },
    )
    batch_size: int = field(default=128, metadata={"help": "Noisy images through the network at once."})
    noise_seed: int = field(default=0, metadata={"help": "Of the noise, and of the samples."})
    metrics: bool = field(
        default=False,
        metadata={"help": "Sample too, for the rows of --metric_steps, and measure how far samples are from images."},
    )
    metric_images: int = field(
        default=1000, metadata={"help": "Samples for each such row; image i has the seed noise_seed + i."}
    )
    metric_sets: int = field(
        default=1,
        metadata={
            "help": "So many sets of them, each from other seeds: figures are means, standard errors over sets "
            "(--table: at least 2)."
        },
    )
    metric_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of steps to sample at. Default: all that bounds are measured at (--table: 10, 25, "
            "50, 100)."
        },
    )
    samplers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Other samplers beside Algorithm 2, for samples alone: ddim and dpmsolver++ (diffusers'), eta0 "
            "(our DDIM). Needs --metrics. --table: ddim and dpmsolver++, if none is given."
        },
    )
    metric_split: str = field(
        default="train",
        metadata={"help": "Split that samples are compared with; images of --split are held out, beside them."},
    )
    metric_network: str = field(
        default="efficientnet-lite0",
        metadata={
            "help": "Network whose features are compared: efficientnet-lite0, or a vision model of transformers, by Hub id or folder."
        },
    )
    table: bool = field(
        default=False,
        metadata={
            "help": "The whole comparison, as table.md: every variance, 10 to T steps, even and best, a fitted "
            "decoder, samples (at T of fixed_large alone, below T of even paths and of optimal's best ones), "
            "other samplers."
        },
    )
    results_dir: str | None = field(
        default=None, metadata={"help": "Where results go. Default: the model's folder, or outputs/evaluation."}
    )


Arguments = tuple[DataArguments, ModelArguments, RunArguments]

OF_ONE_SOURCE = {
    "dataset_name",
    "dataset_config_name",
    "train_data_dir",
    "train_split",
    "validation_split",
    "image_column",
    "label_column",
}
CHOOSE_IMAGES = OF_ONE_SOURCE - {"validation_split", "label_column"} | {  # what a fingerprint depends on
    "validation_share",
    "resolution",
    "center_crop",
    "image_mode",
    "max_train_samples",
    "on_bad_image",
    "streaming",
    "shuffle_buffer_size",
    "seed",
}

OF_TRAIN_UNCONDITIONAL = {  # flags of diffusers' script that have no namesake here
    "--save_images_epochs": "--sample_steps",
    "--save_model_epochs": "--checkpointing_steps",
    "--logger": "--report_to",
    "--logging_dir": "the folder --output_dir, which holds the logs",
    "--hub_token": "the environment variable HF_TOKEN",
    "--enable_xformers_memory_efficient_attention": "nothing: PyTorch's own attention is used",
    "--local_rank": "nothing: accelerate launch tells each process",
    "--preserve_input_precision": "nothing: images are of 8 bits here",
    "--batch_size": "--train_batch_size",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each flag's default behind its help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or isinstance(action, argparse._StoreFalseAction)
        return action.help if told else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """argparse over the dataclasses, without abbreviations, whose errors suggest the nearest flag."""

    def error(self, message: str) -> Any:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            if flag in OF_TRAIN_UNCONDITIONAL:
                message += f" (in the place of {flag}: {OF_TRAIN_UNCONDITIONAL[flag]})"
            elif near:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags\n")

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        if (
            settings.get("action") == "store_false"
        ):  # the --no_ form of a switch that is on: it comes with the switch's own words
            settings |= {"help": f"Turn --{settings['dest']} off.", "default": True}
        if names[0] == "--attention_levels":  # HfArgumentParser wants one value at least of each list
            settings["nargs"] = "*"
        return super().add_argument(*names, **settings)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The settings of a training run from the command line and, under it, the YAML file of `--config`.

    Exits with status 2 and one line on an unknown flag or key, a value of the wrong type, or settings that contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, parts = _parse((DataArguments, ModelArguments, RunArguments), argv)
    parts[2].typed = typed_flags(argv)
    try:
        check_arguments(*parts)
    except ValueError as error:
        parser.error(str(error))
    return parts


def parse_evaluation_arguments(argv: list[str] | None = None) -> tuple[DataArguments, EvaluationArguments]:
    """The settings of an evaluation; a training run's YAML file serves too, for the images it names."""
    training_only = {f.name for cls in (ModelArguments, RunArguments) for f in fields(cls)}
    parser, (data, evaluation) = _parse((DataArguments, EvaluationArguments), argv, training_only)
    counts = {
        "--num_inference_steps": min(evaluation.num_inference_steps or [1]),
        "--max_images": evaluation.max_images or 1,
        "--metric_sets": evaluation.metric_sets,
        "--metric_steps": min(evaluation.metric_steps or [1]),
        "--evaluations_per_image": evaluation.evaluations_per_image - 1,
        "--batch_size": evaluation.batch_size,
    }
    for name, count in counts.items():
        if count < 1:
            parser.error(f"{name} is too small; allowed: at least {2 if name == '--evaluations_per_image' else 1}")
    choices: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "--variance_types": (evaluation.variance_types or [], VARIANCE_TYPES),
        "--paths": (evaluation.paths, ("even", "best")),
        "--samplers": (evaluation.samplers, ("ddim", "eta0", "dpmsolver++")),
    }
    for name, (given, known) in choices.items():
        if unknown := [value for value in given if value not in known]:
            parser.error(f"{name} has {', '.join(unknown)}; each must be one of {', '.join(known)}")
    if evaluation.table:
        evaluation.metrics, evaluation.decoder, evaluation.paths = True, "fitted", ["even", "best"]
        evaluation.samplers = evaluation.samplers or ["ddim", "dpmsolver++"]
        evaluation.metric_sets = max(evaluation.metric_sets, 2)  # a spread needs two
    if evaluation.save_variances and not Path(evaluation.model).is_dir():
        parser.error(
            f"--save_variances writes into the model's folder and --model is {evaluation.model}, which must be a "
            "folder here: download the repository first (hf download), or leave --save_variances out"
        )
    if evaluation.samplers and not evaluation.metrics:
        parser.error("--samplers have no bits/dim; allowed with --metrics")
    if (data.dataset_name is None) == (data.train_data_dir is None):
        parser.error("name the images: --dataset_name or --train_data_dir, or --config with one of the two")
    return data, evaluation


def _parse(classes: tuple[Any, ...], argv: list[str] | None, ignored: set[str] = frozenset()) -> tuple[_Parser, Any]:  # type: ignore[assignment]
    """An instance of each dataclass from the line over the file; keys of the file in `ignored` are another script's."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(classes, allow_abbrev=False, description=__doc__, formatter_class=_Help)
    parser.add_argument("--config", help="YAML file of flags; flags given beside it win.")
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    known, line = config.parse_known_args(argv)
    tokens = _read_config(parser, known.config, line, ignored) if known.config else []
    namespace = parser.parse_args(tokens + line)
    return parser, tuple(cls(**{f.name: getattr(namespace, f.name) for f in fields(cls) if f.init}) for cls in classes)


def typed_flags(line: list[str]) -> frozenset[str]:
    """The names of the flags on a command line, without dashes."""
    words = (word.partition("=")[0].replace("-", "_") for word in line)
    return frozenset(word.removeprefix("__") for word in words if word.startswith("__"))


def _read_config(parser: _Parser, path: str, line: list[str], ignored: set[str]) -> list[str]:
    """The flags that a YAML file stands for, so that argparse checks them as it checks the line's."""
    try:
        # As text: argparse does the converting, and YAML would make a number of 1e3, but a string of 1e-3, and `no` false.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} holds {type(values).__name__}; allowed: lines of the form 'flag: value'")
    values = {key.replace("-", "_"): value for key, value in values.items()}
    given = typed_flags(line)
    if given & {"dataset_name", "train_data_dir"}:  # another source of images: nothing of the file's own fits it
        values = {key: value for key, value in values.items() if key not in OF_ONE_SOURCE}
    if given & CHOOSE_IMAGES:
        values.pop("data_fingerprint", None)
    if "validation_split" in given:
        values.pop("validation_share", None)
    if "validation_share" in given:
        values.pop("validation_split", None)
    tokens: list[str] = []
    for key, value in values.items():
        if key in ignored and f"--{key}" not in parser._option_string_actions:
            continue
        if f"--{key}" not in parser._option_string_actions or key == "config":
            near = difflib.get_close_matches(f"--{key}", parser._option_string_actions, n=1)
            parser.error(
                f"--config {path} has the unknown key {key!r}" + (f" (did you mean {near[0][2:]!r}?)" if near else "")
            )
        if isinstance(value, dict):
            parser.error(f"--config {path}: {key} is {value!r}; allowed: one value, or a list")
        if value not in ("", "~", "null"):
            tokens += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return tokens


def check_arguments(data: DataArguments, model: ModelArguments, run: RunArguments) -> None:
    """Settings that can be judged before anything is loaded.

    Raises:
        ValueError: a number out of its range, or settings that contradict each other.
    """
    at_least_1 = {
        "--ddpm_num_steps": model.ddpm_num_steps,
        "--layers_per_block": model.layers_per_block,
        "--train_batch_size": run.train_batch_size,
        "--eval_batch_size": run.eval_batch_size,
        "--gradient_accumulation_steps": run.gradient_accumulation_steps,
        "--num_epochs": run.num_epochs,
        "--max_train_steps": run.max_train_steps,
        "--max_train_samples": data.max_train_samples,
        "--shuffle_buffer_size": data.shuffle_buffer_size,
        "--checkpointing_steps": run.checkpointing_steps,
        "--checkpoints_total_limit": run.checkpoints_total_limit,
        "--logging_steps": run.logging_steps,
        "--max_nonfinite_steps": run.max_nonfinite_steps,
        "--validation_steps": run.validation_steps,
        "--max_validation_images": data.max_validation_images,
        "--sample_steps": run.sample_steps,
        "--metric_interval": run.metric_interval,
        "--num_samples": run.num_samples,
        "--ddpm_num_inference_steps": run.ddpm_num_inference_steps,
    }
    for name, count in at_least_1.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; allowed: at least 1")
    for name, number in {
        "--learning_rate": run.learning_rate,
        "--max_grad_norm": run.max_grad_norm,
        "--snr_gamma": run.snr_gamma,
        "--ema_inv_gamma": run.ema_inv_gamma,
        "--ema_power": run.ema_power,
    }.items():
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name} is {number}; allowed: above 0")
    at_least_0 = {
        "--lr_warmup_steps": run.lr_warmup_steps or 0,
        "--dataloader_num_workers": data.dataloader_num_workers,
        "--seed": run.seed,
        "--adam_weight_decay": run.adam_weight_decay,
        "--adam_epsilon": run.adam_epsilon,
    }
    for name, number in at_least_0.items():
        if not number >= 0:
            raise ValueError(f"{name} is {number}; allowed: at least 0")
    fractions = {
        "--dropout": model.dropout,
        "--label_dropout": data.label_dropout,
        "--adam_beta1": run.adam_beta1,
        "--adam_beta2": run.adam_beta2,
        "--ema_max_decay": run.ema_max_decay,
    }
    for name, number in fractions.items():
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {number}; allowed: from 0 to below 1")
    if (data.dataset_name is None) == (data.train_data_dir is None):
        raise ValueError(
            f"--dataset_name is {data.dataset_name} and --train_data_dir is {data.train_data_dir}; allowed: exactly one of them"
        )
    if data.validation_share is not None:
        if not 0 < data.validation_share < 1:
            raise ValueError(f"--validation_share is {data.validation_share}; it must be above 0 and below 1")
        if data.validation_split is not None:
            raise ValueError("--validation_share and --validation_split are both given; give one of them")
        if data.streaming:
            raise ValueError(
                "--validation_share needs images that are stored; with --streaming give --validation_split"
            )
    held_out = data.validation_split is not None or data.validation_share is not None
    if run.metric_interval is not None and (data.streaming or not held_out):
        raise ValueError(
            f"--metric_interval is {run.metric_interval} with {'--streaming' if data.streaming else 'no --validation_split'}; allowed: with "
            "images that are stored, and others to compare with (--validation_split or --validation_share)"
        )
    if data.streaming and run.max_train_steps is None:
        raise ValueError("--streaming wants --max_train_steps: nobody knows how many images a pass has")
    if data.streaming and data.dataloader_num_workers > 1:
        raise ValueError(
            f"--dataloader_num_workers is {data.dataloader_num_workers} with --streaming; allowed: 0 or 1, each would read everything"
        )
    if data.resolution is not None and (len(data.resolution) > 2 or min(data.resolution) < 1):
        raise ValueError(f"--resolution is {data.resolution}; allowed: one side, or height and width, of at least 1")
    if run.train_batch_size % run.gradient_accumulation_steps:
        raise ValueError(
            f"--train_batch_size is {run.train_batch_size} with --gradient_accumulation_steps {run.gradient_accumulation_steps}; "
            "allowed: a batch that splits evenly"
        )
    if (run.ddpm_num_inference_steps or 0) > model.ddpm_num_steps and model.pretrained_model_name_or_path is None:
        raise ValueError(
            f"--ddpm_num_inference_steps is {run.ddpm_num_inference_steps}; allowed: at most {model.ddpm_num_steps} (--ddpm_num_steps)"
        )
    if run.max_train_steps is not None and "lr_warmup_steps" in run.typed:
        warmup_steps(run, run.max_train_steps)


def warmup_steps(run: RunArguments, steps: int) -> int:
    """Optimizer steps of warm-up of a run of so many steps; one that a file asks for is cut where the run is shorter.

    Raises:
        ValueError: the command line itself asks for more than there are steps.
    """
    usual, asked = min(500, steps // 10), run.lr_warmup_steps
    if asked is None or asked <= steps:
        return usual if asked is None else asked
    if "lr_warmup_steps" in run.typed:
        raise ValueError(f"--lr_warmup_steps is {asked} and training ends after {steps} steps; it must be at most that")
    return usual


def one_line(message: Warning | str, *where: Any, **also: Any) -> str:
    """A warning as the scripts show it: without the line of our code that gave it."""
    return f"warning: {message}\n"


def as_config(*arguments: Any) -> dict[str, Any]:
    """The settings as `--config` reads them back, less what was asked of one launch alone."""
    return {
        name: value
        for part in arguments
        for name, value in asdict(part).items()
        if value is not None and name not in ("overwrite_output_dir", "resume_from_checkpoint", "typed")
    }
