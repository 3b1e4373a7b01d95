"""What must not grow: the time of a step with T, with the data set, with the checkpoints kept. What should: the rate with processes."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench_training import OurTraining, our_words
from ddpm_notes_pipeline import DDPMNotesScheduler
from ddpm_notes_pipeline.batches import StepBatches
from ddpm_notes_pipeline.data import ImageSet
from measure import ROOT, Row, Settings, environment, in_unit, interleave, median, ratio_row, turns
from models import BATCH, describe, make_images

CHAINS = (100, 1000, 10_000)
SETS = (1_000, 100_000, 3_000_000)
CHECKPOINTS = 60


def by_chain() -> dict[int, list[float]]:
    """Seconds of one `step` along the path of T steps."""
    x, eps = torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)
    calls = {}
    for T in CHAINS:
        scheduler = DDPMNotesScheduler(num_train_timesteps=T, beta_end=0.02 if T <= 1000 else 0.002)
        t = scheduler.timesteps[T // 2]
        calls[T] = lambda scheduler=scheduler, t=t: scheduler.step(eps, t, x)
    return interleave(calls, rounds=9)  # type: ignore[arg-type, return-value]


def by_set(folder: Path) -> dict[int, list[float]]:
    """Seconds of the batch of a step, of sets of so many 8x8 images."""
    calls = {}
    for count in SETS:
        path = folder / f"{count}.images"
        with path.open("wb") as file:
            file.write(np.random.default_rng(0).integers(0, 256, (count, 64), np.uint8).tobytes())
        stored = np.array([[8, 8]], np.int32)
        images = ImageSet("noise", "train", path, 1, (8, 8), stored, None, None, "-", 0, count)
        batches, steps = StepBatches(images, BATCH, seed=0), iter(range(10**9))
        calls[count] = lambda batches=batches, steps=steps, last=count // BATCH: batches[next(steps) % last]
    return interleave(calls, rounds=9)  # type: ignore[arg-type, return-value]


def by_checkpoints(folder: Path) -> list[float]:
    """Seconds between one checkpoint and the next, two steps of training and the writing, as they gather."""
    words = ["--dataset_name", "digits", "--block_out_channels", "16", "32", "--layers_per_block", "1"]
    words += ["--max_train_steps", str(2 * CHECKPOINTS), "--checkpointing_steps", "2", "--lr_warmup_steps", "0"]
    words += ["--num_samples", "1", "--ddpm_num_inference_steps", "1", "--output_dir", str(folder / "many")]
    words += ["--cache_dir", str(folder / "cache")]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    times = sorted((folder / "many" / f"checkpoint-{2 * n}").stat().st_mtime for n in range(1, CHECKPOINTS + 1))
    return np.diff(times).tolist()


def by_processes(folder: Path) -> dict[str, list[float]]:
    """Seconds a step of training/train.py: one process, and two that share the batch, of one thread each; in turns."""
    images = make_images("L", folder)
    words = our_words("L", images, folder, fast=False)
    runners = {}
    try:
        for processes in (1, 2):
            runners[f"{processes}"] = OurTraining(folder / f"p{processes}", words, 1, processes=processes)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for turn in range(turns(5) + 1):
            for name, runner in runners.items():
                seconds = runner.run(2) / 2
                if turn:
                    times[name].append(seconds)
    finally:
        for runner in runners.values():
            runner.end()
    return times


def growth() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chains, sets, checkpoints = by_chain(), by_set(folder), by_checkpoints(folder)
        clock, Settings.clock = Settings.clock, "wall"  # two processes take twice the processor's time by design
        try:
            processes = by_processes(folder)
        finally:
            Settings.clock = clock
    third = len(checkpoints) // 3
    rows = [
        ratio_row(f"`step`, T = {CHAINS[-1]}", f"T = {CHAINS[0]}", chains[CHAINS[0]], chains[CHAINS[-1]], "<= 1.1"),
        ratio_row(
            f"batch of a step, {SETS[-1]:,} images", f"{SETS[0]:,} images", sets[SETS[0]], sets[SETS[-1]], "<= 1.1"
        ),
        ratio_row(
            f"2 steps and a checkpoint, {CHECKPOINTS - third} to {CHECKPOINTS} kept",
            f"1 to {third} kept",
            checkpoints[:third],
            checkpoints[-third:],
            "<= 1.1",
        ),
        ratio_row(
            f"training {describe('L')}, 2 processes",
            "1 process",
            processes["1"],
            processes["2"],
            show=lambda seconds: f"{BATCH / seconds:.3g} images/s",
        ),
    ]
    plot(chains, sets, checkpoints, processes)
    return rows


def plot(chains: dict, sets: dict, checkpoints: list[float], processes: dict) -> None:
    """bench.png, and the numbers in it as bench.json."""
    import matplotlib.pyplot as plt

    Settings.output_dir.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for axis, times, label in ((axes[0], chains, "T"), (axes[1], sets, "images in the data set")):
        medians = [1e6 * median(values) for values in times.values()]
        axis.plot(list(times), medians, "o-")
        axis.set(xscale="log", xlabel=label, ylim=(0, 1.3 * max(medians)))
    axes[0].set(title="`step`, 16x3x32x32", ylabel="us")
    axes[1].set(title=f"batch of {BATCH} images", ylabel="us")
    axes[2].plot(range(2, len(checkpoints) + 2), [1e3 * value for value in checkpoints], ".")
    axes[2].set(title="2 training steps and a checkpoint", xlabel="checkpoints kept", ylabel="ms", ylim=(0, None))
    axes[3].bar(list(processes), [BATCH / median(values) for values in processes.values()], 0.6)
    axes[3].set(title=f"training {describe('L')}", xlabel="processes", ylabel="images/s")
    figure.savefig(Settings.output_dir / "bench.png", dpi=120)
    plt.close(figure)
    numbers = {"T": chains, "images": sets, "checkpoints": checkpoints, "processes": processes}
    (Settings.output_dir / "bench.json").write_text(json.dumps(numbers))
    for name, times in (("T", chains), ("images", sets)):
        print(f"{name}: " + ", ".join(f"{key:,}: {in_unit(median(v))}" for key, v in times.items()), file=sys.stderr)
