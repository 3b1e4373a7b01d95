"""What a training step takes beside the network: data, loss, clipping, optimizer, average, log."""

import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from gpu_parts.network import forget, new_network, random_images, steps_of, training_run
from gpu_parts.setting import Row, Setting

ROUNDS = 5


def measure(setting: Setting) -> Iterator[Row]:
    """A step of ours beside forward and backward of the same network, in turns."""
    images = random_images(setting)
    for compiled in (False, True):
        forget()
        name = "bf16, compiled" if compiled else "bf16"
        flags = ["--mixed_precision", "bf16", *(["--torch_compile"] if compiled else [])]
        run = training_run(setting, images, name, *flags)
        unet = new_network(run.learner.unet.config).to(setting.device).train()
        if compiled:
            unet.compile()
        loops = {"step": steps_of(run), "network": both_passes(setting, unet, run.settings.run.train_batch_size)}
        for loop in loops.values():
            for _ in range(2 if setting.quick else 10):
                next(loop)
        times: dict[str, list[float]] = {kind: [] for kind in loops}
        for _ in range(2 if setting.quick else ROUNDS):
            for kind, loop in loops.items():
                times[kind].append(setting.seconds(lambda loop=loop: next(loop), count=10, rounds=1))
        step, network = (statistics.median(times[kind]) for kind in ("step", "network"))
        yield Row(f"step of {name}", f"{1e3 * step:.4g} ms, of them the network {1e3 * network:.4g} ms", step)
        yield setting.row(f"not the network, {name}", 100 * (1 - network / step), "%", at_most=3)
        loops["step"].close()
        del run, unet, loops, loop


def both_passes(setting: Setting, unet: UNet2DModel, batch_size: int) -> Iterator[None]:
    """Forward and backward on one resident batch, in bf16."""
    shape = (batch_size, unet.config.in_channels, *[unet.config.sample_size] * 2)
    noisy, noise = (torch.randn(shape, device=setting.device) for _ in range(2))
    t = torch.randint(0, 1000, (batch_size,), device=setting.device)
    while True:
        with torch.autocast(setting.device.type, torch.bfloat16):
            output = unet(noisy, t, return_dict=False)[0]
        F.mse_loss(output.float(), noise).backward()
        unet.zero_grad(set_to_none=True)
        yield
