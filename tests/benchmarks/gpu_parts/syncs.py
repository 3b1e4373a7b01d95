"""No step of training or sampling waits for the device: none would pass torch's sync debug mode."""

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from gpu_parts.network import forget, new_network, random_images, recipe_network, steps_of, training_run
from gpu_parts.setting import NEEDS_CUDA, Row, Setting

WARM_UP = 3
TRAINING = {
    "float32": "--mixed_precision no",
    "bf16, two loader processes": "--mixed_precision bf16 --dataloader_num_workers 2",
    "bf16, compiled": "--mixed_precision bf16 --torch_compile",
    "hybrid loss": "--objective hybrid --variance_type learned_range --loss_weighting min_snr "
    "--timestep_sampling stratified --gradient_accumulation_steps 2",
    "the bound as loss": "--objective vlb --variance_type learned_range",
    "fp16": "--mixed_precision fp16",
}
REPORTED = "fp16"  # the loss scaler is accelerate's and torch's: reported, no failure
LEVELS = {
    "weights": [[1.0] * 256] * 3,
    "decoder_blur": {0: 1e-3, 999: 1e-2},
    "guess_blur": {0: 1e-3, 900: 0.1},
}
SAMPLING = {
    "DDPM": ({}, {}),
    "DDIM": ({}, {"eta": 0.0}),
    "learned variance, levels": ({"variance_type": "learned_range", "levels": LEVELS}, {}),
}


def measure(setting: Setting) -> Iterator[Row]:
    count = 2 if setting.quick else 8
    setting = replace(setting, quick=True)  # a small network waits as a large one does
    images, waited = random_images(setting), []
    cases = [(f"training, {name}", flags) for name, flags in TRAINING.items()]
    cases += [(f"sampling, {name}", case) for name, case in SAMPLING.items()]
    for what, case in cases:
        what, strict = f"host syncs, {what}", not what.endswith(REPORTED)
        if not setting.cuda and not strict:
            continue  # accelerate refuses fp16 on a CPU
        forget()
        try:
            train(setting, count, images, case) if isinstance(case, str) else sample(setting, count, *case)
        except RuntimeError as error:
            traceback.print_exc()  # where
            waited += [what] if strict else []
            yield Row(what, f"waits: {str(error).splitlines()[0]}")
            continue
        yield Row(what, f"none in {count} steps", 0) if setting.cuda else Row(what, NEEDS_CUDA)
    if waited:
        raise RuntimeError(f"{len(waited)} wait for the device, see the tracebacks above: {'; '.join(waited)}")


def train(setting: Setting, count: int, images: Path, flags: str) -> None:
    run = training_run(setting, images, "run", "--overwrite_output_dir", "--logging_steps", "1000000", *flags.split())
    steps = steps_of(run)
    for _ in range(WARM_UP):
        next(steps)
    with no_sync(setting):
        for _ in range(count):
            next(steps)
    steps.close()


def sample(setting: Setting, count: int, scheduler: dict, call: dict) -> None:
    config = recipe_network(setting) | {"out_channels": 6 if "variance_type" in scheduler else 3}
    pipe = DDPMNotesPipeline(new_network(config).eval().to(setting.device), DDPMNotesScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    with contextlib.ExitStack() as stack:

        def watch(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
            if i == WARM_UP - 1:
                stack.enter_context(no_sync(setting))
            if i == WARM_UP + count - 1:
                stack.close()
            return {}

        pipe(4, num_inference_steps=WARM_UP + count + 1, output_type="pt", callback_on_step_end=watch, **call)


@contextlib.contextmanager
def no_sync(setting: Setting) -> Iterator[None]:
    """A block in which an operation that waits for a CUDA device raises RuntimeError."""
    if setting.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if setting.cuda:
            torch.cuda.set_sync_debug_mode("default")
