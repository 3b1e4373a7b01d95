"""How long training takes to be as good as the official script's loop.

    python tests/benchmarks/time_to_quality.py --data digits --seeds 0 1 --output_dir quality
    python tests/benchmarks/time_to_quality.py --data digits --runs official quarter

Every run trains the recipe's network on the embedded images: by the loop of diffusers'
train_unconditional.py for so many steps of 64 images, and by training/train.py for fewer, with one
setting changed at a time. All are measured alike by training/evaluate.py: the bound on the
held-out images with fixed_small and with levels fitted on the training images, and the kernel
distance of samples of DPM-Solver++ to them. Seconds are of training alone, without start-up. Runs
that have ended are kept in --output_dir, so that the command goes on where it was stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.records import Evaluation, TrainingRecord
from ddpm_notes_pipeline.training.arguments import ModelArguments
from ddpm_notes_pipeline.training.networks import new_unet
from measure import ROOT, environment
from models import save_images
from training_loops import peer_loop

RECIPES = {"digits": "training/configs/digits.yaml", "mnist": "training/configs/mnist.yaml"}
STEPS = {"digits": 2500, "mnist": 4000}  # of the official loop
SAMPLER_STEPS, SETS, HELD_OUT = 25, 3, 1000


@dataclass
class Run:
    """A way to train.

    Attributes:
        share: of the official loop's steps. flags: of training/train.py, over the recipe's.
        network: settings of the UNet that differ.
        official: the official loop, with this learning rate; None for training/train.py.
    """

    share: float
    flags: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    official: float | None = None


FIXED = {"variance_type": "fixed_small", "objective": "simple", "ddpm_beta_schedule": "linear", "train_batch_size": 64}
LEFT_OUT = ("validation", "log_snr", "timestep", "norm", "resnet")  # of the recipe: what its settings begin with
COSINE = {"ddpm_beta_schedule": "squaredcos_cap_v2"}
LOG_SNR = {"ddpm_beta_schedule": "log_snr", "log_snr_range": [8, -7]}
RUNS = {
    "official": Run(1, official=1e-4),
    "official, lr 1e-3": Run(1, official=1e-3),
    "half": Run(0.5),
    "quarter": Run(0.25),
    "half, cosine": Run(0.5, COSINE),
    "quarter, cosine": Run(0.25, COSINE),
    "half, log SNR": Run(0.5, LOG_SNR),
    "half, log SNR, batches of 32": Run(1, LOG_SNR | {"train_batch_size": 32}),
    "quarter, log SNR": Run(0.25, LOG_SNR),
    "eighth, log SNR": Run(0.125, LOG_SNR),
    "eighth, log SNR, batches of 32": Run(0.25, LOG_SNR | {"train_batch_size": 32}),
    "eighth, log SNR, batches of 16": Run(0.5, LOG_SNR | {"train_batch_size": 16}),
    "quarter, log SNR, stratified t": Run(0.25, LOG_SNR | {"timestep_sampling": "stratified"}),
    "quarter, log SNR, EMA 0.99": Run(0.25, LOG_SNR | {"ema_max_decay": 0.99}),
    "quarter, log SNR, lr 5e-4": Run(0.25, LOG_SNR | {"learning_rate": 5e-4}),
    "quarter, log SNR, lr 2e-3": Run(0.25, LOG_SNR | {"learning_rate": 2e-3}),
    "quarter, log SNR, batches of 32": Run(0.5, LOG_SNR | {"train_batch_size": 32}),
    "quarter, log SNR, 4 groups": Run(0.25, LOG_SNR, {"norm_num_groups": 4}),
    "quarter, log SNR, scale and shift": Run(0.25, LOG_SNR, {"resnet_time_scale_shift": "scale_shift"}),
    "quarter, log SNR, compiled": Run(0.25, LOG_SNR | {"torch_compile": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, default="digits")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, help=f"of the official loop; default: {STEPS}")
    parser.add_argument("--block_out_channels", nargs="+", type=int, help="of the network; default: the recipe's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    arguments = parser.parse_args()
    recipe = yaml.safe_load((ROOT / RECIPES[arguments.data]).read_text())
    recipe = {name: value for name, value in recipe.items() if not name.startswith(LEFT_OUT)} | FIXED
    recipe["dataset_name"] = arguments.data  # the embedded images
    recipe["block_out_channels"] = arguments.block_out_channels or recipe["block_out_channels"]
    steps = arguments.steps or STEPS[arguments.data]
    torch.set_num_threads(arguments.threads)
    output_dir = arguments.output_dir.absolute() / arguments.data  # the scripts start in another folder
    results: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for name in arguments.runs:
            folder = output_dir / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            results.setdefault(name, []).append(finished(folder, recipe, RUNS[name], steps, seed, arguments.threads))
            print(f"{folder}: {results[name][-1]}", flush=True)
    text = table(results)
    (output_dir / "table.md").write_text(text)
    print(text, end="")


def finished(folder: Path, recipe: dict[str, Any], run: Run, steps: int, seed: int, threads: int) -> dict[str, float]:
    """Train and measure, unless that has been done; seconds, bits/dim and kernel distance."""
    path = folder / "quality.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    settings = recipe | run.flags | {"max_train_steps": max(1, round(steps * run.share)), "seed": seed}
    asked = json.dumps([settings, run.network, threads])
    kept = folder / "asked.json"
    if found and (not kept.exists() or kept.read_text() != asked):
        sys.exit(f"{folder} has a run of other settings: name another --output_dir")
    if "seconds" not in found:
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(asked)
        settings["model_config_name_or_path"] = str(save_network(folder / "network", recipe, run.network))
        found["seconds"] = official(folder, settings, run.official) if run.official else ours(folder, settings, threads)
        path.write_text(json.dumps(found))  # whatever happens to the measurement
    if "bits" not in found:
        found |= measured(folder, recipe, threads)
        path.write_text(json.dumps(found))
    return found


def save_network(folder: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Write the configuration of the recipe's UNet, with these settings changed."""
    names = {one.name for one in fields(ModelArguments)}
    model = ModelArguments(**{name: value for name, value in recipe.items() if name in names})
    unet = new_unet(model, load_images(recipe["dataset_name"], show_progress=False))
    UNet2DModel.from_config(unet.config, **changes).save_config(folder)
    return folder


def official(folder: Path, settings: dict[str, Any], learning_rate: float) -> float:
    """Train by the official loop and save; seconds of its steps."""
    torch.manual_seed(settings["seed"])
    images = load_images(settings["dataset_name"], show_progress=False)
    pixels = images.take(range(len(images))).permute(0, 2, 3, 1).numpy()
    unet = UNet2DModel.from_config(UNet2DModel.load_config(settings["model_config_name_or_path"]))
    steps, warmup = settings["max_train_steps"], settings["lr_warmup_steps"]
    data = str(save_images(pixels, folder / "images"))
    loop = peer_loop(unet, data, settings["train_batch_size"], learning_rate, warmup, steps)
    started = time.perf_counter()
    for _ in range(steps):
        average = next(loop)
    seconds = time.perf_counter() - started
    average.copy_to(unet.parameters())
    DDPMNotesPipeline(unet, DDPMScheduler()).save_pretrained(folder / "model")
    return seconds


def ours(folder: Path, settings: dict[str, Any], threads: int) -> float:
    """Train by training/train.py; seconds without start-up, but with the checkpoint at the end."""
    config = folder / "settings.yaml"
    fixed = {"output_dir": str(folder / "model"), "checkpointing_steps": settings["max_train_steps"]}
    fixed |= {"num_samples": 1, "ddpm_num_inference_steps": 2, "report_to": "none", "fit_levels": False}
    config.write_text(yaml.safe_dump(settings | fixed))
    script(threads, "train.py", "--config", config, "--overwrite_output_dir", "true")
    record = TrainingRecord.read(folder / "model")
    assert record is not None
    return record.seconds


def measured(folder: Path, recipe: dict[str, Any], threads: int) -> dict[str, float]:
    """What training/evaluate.py says of a model."""
    words = f"""--split test --max_images {HELD_OUT} --variance_types fixed_small --decoder levels
        --metrics --metric_steps {SAMPLER_STEPS} --samplers dpmsolver++ --metric_images 500 --metric_sets {SETS}""".split()
    script(threads, "evaluate.py", "--model", folder / "model", "--dataset_name", recipe["dataset_name"], *words)
    record = Evaluation.read(folder / "model")
    assert record is not None
    bits, kernel = record.results[0], next(row for row in record.metrics if row.is_sampled).kernel
    return {"bits": bits.total, "bits_error": bits.standard_error, "kernel": kernel[0], "kernel_error": kernel[1]}


def script(threads: int, name: str, *words: Any) -> None:
    """Run a script of training/.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, str(ROOT / "training" / name), *map(str, words)]
    done = subprocess.run(
        command, env=environment() | {"OMP_NUM_THREADS": str(threads)}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means over the seeds, and how much sooner each run ends than the first."""
    lines = ["| run | seconds | sooner | bits/dim | kernel distance x 1000 |", "|---|---|---|---|---|"]
    first = statistics.mean(run["seconds"] for run in next(iter(results.values())))
    for name, runs in results.items():
        seconds = statistics.mean(run["seconds"] for run in runs)
        bits = ", ".join(f"{run['bits']:.3f} ± {run['bits_error']:.3f}" for run in runs)
        kernel = ", ".join(f"{1000 * run['kernel']:.2f} ± {1000 * run['kernel_error']:.2f}" for run in runs)
        lines.append(f"| {name} | {seconds:.0f} | {first / seconds:.2f} x | {bits} | {kernel} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
