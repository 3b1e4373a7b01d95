"""The loops that training is compared with, as a program: a number on stdin runs so many steps.

python training_loops.py peer SIZE FOLDER       diffusers' train_unconditional.py, re-enacted
python training_loops.py bare SIZE no|bf16      forward, backward, optimizer step; compiled, on
                                                resident data
python training_loops.py update SIZE no|bf16    the same with clipping and averaged weights
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from models import BATCH, CONFIGS, make_unet

OPTIMIZER: dict[str, Any] = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}


def peer_loop(
    unet: UNet2DModel,
    folder: str,
    batch_size: int = BATCH,
    learning_rate: float = OPTIMIZER["lr"],
    warmup: int = 500,
    steps: int = 100_000,
    mixed_precision: str = "no",
) -> Iterator[EMAModel]:
    """The script's defaults: plain AdamW, EMAModel, the loss read at every step.

    Args:
        unet: trained in place. folder: a saved data set with a column "image".
        warmup, steps: of the learning rate's schedule; the loop itself never ends.

    Yields:
        the average of the weights, after each step.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    ema = EMAModel(
        unet.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=type(unet),
        model_config=unet.config,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(unet.parameters(), **OPTIMIZER | {"lr": learning_rate})
    images = datasets.load_from_disk(folder)
    side, mode = unet.config.sample_size, "L" if unet.config.in_channels == 1 else "RGB"

    def to_tensor(image: Any) -> torch.Tensor:
        """Resize, crop, tensor in [0, 1], normalised to [-1, 1]."""
        image = image.convert(mode)
        if image.size != (side, side):
            image = image.resize((side, side), 2)
        pixels = np.asarray(image).reshape(side, side, -1).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels)).float().div(255).sub(0.5).div(0.5)

    images.set_transform(lambda rows: {"input": [to_tensor(image) for image in rows["image"]]})
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=0)
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    global_step = 0
    while True:
        unet.train()
        bar = tqdm(total=len(loader))
        for batch in loader:
            clean = batch["input"].to(dtype)
            noise = torch.randn(clean.shape, dtype=dtype, device=clean.device)
            t = torch.randint(0, 1000, (clean.shape[0],), device=clean.device).long()
            noisy = scheduler.add_noise(clean, noise, t)
            with accelerator.accumulate(unet):
                loss = F.mse_loss(unet(noisy, t).sample.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
                bar.update(1)
                global_step += 1
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": global_step}
            logs["ema_decay"] = ema.cur_decay_value
            bar.set_postfix(**logs)
            accelerator.log(logs, step=global_step)
            yield ema
        bar.close()


def bare_loop(size: str, precision: str, clip_and_average: bool = False) -> Iterator[None]:
    """Forward, backward and optimizer step on one resident batch; no log."""
    unet = make_unet(size).train()
    optimizer = torch.optim.AdamW(unet.parameters(), **OPTIMIZER, fused=True)
    shape = (BATCH, CONFIGS[size]["in_channels"], *[CONFIGS[size]["sample_size"]] * 2)
    noisy, noise, t = torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, (BATCH,))
    unet.compile()
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = unet(noisy, t, return_dict=False)[0]
        F.mse_loss(output.float(), noise).backward()
        if clip_and_average:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        if clip_and_average:
            with torch.no_grad():
                torch._foreach_lerp_(average, list(unet.parameters()), 1e-4)
        optimizer.zero_grad(set_to_none=True)
        yield


def main() -> None:
    kind, size, word = sys.argv[1:]
    torch.set_num_threads(1)
    loops: dict[str, Callable[[str, str], Iterator[Any]]] = {
        "peer": lambda size, folder: peer_loop(make_unet(size), folder),
        "bare": bare_loop,
        "update": lambda size, precision: bare_loop(size, precision, clip_and_average=True),
    }
    loop = loops[kind](size, word)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(loop)
        print("done", flush=True)


if __name__ == "__main__":
    main()
