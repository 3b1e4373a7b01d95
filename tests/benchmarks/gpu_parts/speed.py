"""Training of the recipe's network, ours beside the official script's loop: images/s and MFU."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_parts.cards import utilization
from gpu_parts.network import (
    arguments,
    forget,
    new_network,
    random_images,
    recipe_network,
    steps_of,
    training_flops,
    training_run,
)
from gpu_parts.setting import Row, Setting, float32_kernels
from training_loops import peer_loop

STANDS, BF16, FASTEST = "official script as it stands", "official script, bf16", "ours, bf16, compiled"


@dataclass
class Case:
    """A way to train.

    Attributes:
        arithmetic: whose peak its MFU is of.
        products, convolutions: those of float32 tensors in TF32. torch's default is that
            convolutions are and products are not.
    """

    name: str
    arithmetic: str
    mixed_precision: str = "no"
    products: bool = False
    convolutions: bool = True
    compiled: bool = False
    official: bool = False


CASES = [
    Case(STANDS, "TF32", official=True),
    Case(BF16, "bf16", "bf16", official=True),
    Case("ours, float32 (no TF32)", "float32", convolutions=False),
    Case("ours, TF32", "TF32", products=True),
    Case("ours, bf16", "bf16", "bf16"),
    Case(FASTEST, "bf16", "bf16", compiled=True),
]


def measure(setting: Setting) -> Iterator[Row]:
    images, config = random_images(setting), recipe_network(setting)
    batch_size = arguments(setting, images).run.train_batch_size
    flops, rates = training_flops(config), {}
    card = torch.cuda.get_device_name() if setting.cuda else "a CPU"
    yield Row("FLOPs of a training step, an image", f"{flops / 1e9:.4g} GFLOP", flops)
    for case in CASES:
        forget()
        float32_kernels(case.products, case.convolutions)
        rates[case.name] = rate = images_per_second(setting, case, config, batch_size, images)
        share = utilization(card, case.arithmetic, flops * rate)
        mfu = f"MFU {share:.1%} of {case.arithmetic}" if share is not None else f"MFU: no peak known of {card}"
        yield Row(f"training, {case.name}", f"{rate:.4g} images/s, {mfu}", rate)
    yield setting.row(f"{FASTEST} / {STANDS}", rates[FASTEST] / rates[STANDS], "times as fast", at_least=3)
    yield setting.row(f"{FASTEST} / {BF16}", rates[FASTEST] / rates[BF16], "times as fast", at_least=1.5)


def images_per_second(setting: Setting, case: Case, config: dict, batch_size: int, images: Path) -> float:
    if case.official:
        steps = peer_loop(new_network(config), str(images), batch_size, mixed_precision=case.mixed_precision)
    else:
        flags = ["--mixed_precision", case.mixed_precision, *(["--torch_compile"] if case.compiled else [])]
        steps = steps_of(training_run(setting, images, case.name, *flags))
    for _ in range(2 if setting.quick else 10):  # compiles, chooses kernels, fills the allocator
        next(steps)
    seconds = setting.seconds(lambda: next(steps))
    steps.close()
    return batch_size / seconds
