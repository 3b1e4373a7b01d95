"""Sampling with the recipe's network at batch 256, ours beside diffusers' DDPMPipeline."""

import traceback
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from gpu_parts.network import forget, new_network, recipe_network
from gpu_parts.setting import Row, Setting

T = 1000  # steps of a full path, which images/s are stated for


def measure(setting: Setting) -> Iterator[Row]:
    batch_size, steps = (2, 2) if setting.quick else (256, 20)
    config = recipe_network(setting)
    for name, dtype, compiled in (
        ("float32 (torch's defaults)", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("bf16, compiled", torch.bfloat16, True),
    ):
        forget()
        unet = new_network(config).eval().to(setting.device, dtype)
        if compiled:
            unet.compile()
        call = {"batch_size": batch_size, "num_inference_steps": steps, "output_type": "pt"}
        ours = steps / seconds_a_call(setting, DDPMNotesPipeline(unet, DDPMNotesScheduler()), call)
        images = f"{batch_size * ours / T:.4g} images/s at {T} steps"
        try:
            theirs = steps / seconds_a_call(setting, DDPMPipeline(unet, DDPMScheduler()), call)
            beside = f"{ours / theirs:.3f} times DDPMPipeline's {theirs:.4g}"
        except Exception as error:  # is theirs, and no failure of ours
            traceback.print_exc()
            beside = f"DDPMPipeline fails: {type(error).__name__}"
        yield Row(f"sampling {batch_size} images, {name}", f"{ours:.4g} steps/s, {images}; {beside}", ours)


def seconds_a_call(setting: Setting, pipe: Any, call: dict) -> float:
    pipe.set_progress_bar_config(disable=True)
    pipe(**call)  # compiles and chooses kernels
    return setting.seconds(lambda: pipe(**call), count=1)
