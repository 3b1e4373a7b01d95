"""Whole calls of the pipeline, beside the bare loop over its UNet and beside `DDPMPipeline`."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from measure import Row, count_row, in_unit, interleave, median, ratio_row
from models import BATCH, describe, describe_fast, fast_precision, make_unet

STEPS = {"S": 40, "L": 4}
ROUNDS = {"S": 15, "L": 9}


def pipelines(size: str) -> dict[str, Any]:
    """Ours, the peer's, and ours with the fastest settings, all with the same weights."""
    unet = make_unet(size).eval()
    made = {
        "ours": DDPMNotesPipeline(unet, DDPMNotesScheduler()),
        "peer": DDPMPipeline(unet, DDPMScheduler()),
        "fast": DDPMNotesPipeline(copy.deepcopy(unet), DDPMNotesScheduler()),
    }
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    if fast_precision(size) == "bf16":
        made["fast"].unet.to(torch.bfloat16)
    # The Python wrapper around the kernels costs a twentieth of the small network's time.
    made["fast"].unet.to(memory_format=torch.channels_last).compile(options={"cpp_wrapper": True})
    return made


def call(pipeline: Any, size: str) -> Callable[[], Any]:
    return lambda: pipeline(
        batch_size=BATCH, num_inference_steps=STEPS[size], generator=torch.Generator().manual_seed(0)
    )


def bare(pipeline: Any, size: str) -> Callable[[], Any]:
    """The network alone, called as often as by the pipeline: no noise, no step, no images."""
    unet = pipeline.unet
    shape = (BATCH, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    x = randn_tensor(shape, dtype=unet.dtype)
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(STEPS[size])

    @torch.no_grad()
    def loop() -> None:
        for t in scheduler.timesteps:
            unet(x, t, return_dict=False)

    return loop


def sampling() -> Iterator[Row]:
    for size in STEPS:
        made = pipelines(size)
        calls = {name: call(pipeline, size) for name, pipeline in made.items()}
        calls |= {"bare": bare(made["ours"], size), "bare fast": bare(made["fast"], size)}
        times = interleave(calls, ROUNDS[size], seconds=0)

        def per_step(seconds: float, size: str = size) -> str:
            return f"{in_unit(seconds / STEPS[size])}/step"

        what, fast = f"`pipe({BATCH})` {describe(size)}", f"channels_last + {describe_fast(size)}"
        yield from [
            ratio_row(what, "bare UNet loop", times["bare"], times["ours"], limit=True, unit=per_step),
            ratio_row(what, "`DDPMPipeline`", times["peer"], times["ours"], unit=per_step),
            ratio_row(f"{what}, {fast}", f"bare, {fast}", times["bare fast"], times["fast"], unit=per_step),
            ratio_row(f"{what}, {fast}", "`DDPMPipeline`", times["peer"], times["fast"], unit=per_step),
        ]
        if size == "L":
            yield from processor(made["ours"], times["bare"])


def processor(pipeline: Any, seconds: list[float]) -> list[Row]:
    """The larger network beside the processor's matrix-product rate, and that rate in bf16."""
    shape = (BATCH, pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.unet(torch.zeros(shape), 0)
    flops, n = counter.get_total_flops(), 2048
    matrices = {
        name: torch.randn(n, n).to(dtype) for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items()
    }
    times = interleave({name: lambda matrix=matrix: matrix @ matrix for name, matrix in matrices.items()}, seconds=0)
    rates = {name: 2e-9 * n**3 / median(times[name]) for name in matrices}
    network = 1e-9 * flops * STEPS["L"] / median(seconds)
    return [
        count_row("float32 network L", "the processor's matrix products", rates["float32"], network, "GFLOP/s"),
        count_row("matrix products in bf16", "in float32", rates["float32"], rates["bf16"], "GFLOP/s"),
    ]
