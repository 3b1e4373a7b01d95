"""The benchmarks' two UNets, S and L, and images that fit them.

S: 8x8x1, 1.6 M weights. L: 32x32x3, 6.5 M weights. Both are trained with 16 images per step.
"""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import UNet2DModel

from measure import interleave, median

BATCH = 16
CONFIGS = {
    "S": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 2,
        "block_out_channels": (64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 16,
    },
    "L": {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 32,
    },
}


@lru_cache
def fast_precision(size: str) -> str:
    """The faster precision for forward and backward passes, "bf16" or "no".

    bf16 is faster if the processor has a unit for it. S is too small to gain.
    """
    if size == "S":
        return "no"
    unet = make_unet(size)
    x, t = torch.randn(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64)

    def both_passes(enabled: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = unet(x, t, return_dict=False)[0]
        output.float().pow(2).mean().backward()

    times = interleave({"no": lambda: both_passes(False), "bf16": lambda: both_passes(True)}, rounds=3, seconds=0)
    return min(times, key=lambda precision: median(times[precision]))


def describe_fast(size: str) -> str:
    """The fastest settings, in words."""
    if size == "L":
        return "bf16 + compile" if fast_precision(size) == "bf16" else "compile (bf16 is slower here)"
    return "compile"


def make_unet(size: str, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**CONFIGS[size])


def describe(size: str) -> str:
    side, channels = CONFIGS[size]["sample_size"], CONFIGS[size]["in_channels"]
    return f"{size} ({side}x{side}x{channels})"


def make_images(size: str, folder: Path, count: int = 1024) -> Path:
    """A saved data set of PNG files: the digits; for L, enlarged to 32x32 in three channels."""
    from sklearn.datasets import load_digits

    side, channels = CONFIGS[size]["sample_size"], CONFIGS[size]["in_channels"]
    digits = np.rint(load_digits().images * (255 / 16)).astype(np.uint8).repeat(side // 8, 1).repeat(side // 8, 2)
    planes = np.stack([np.roll(digits, -k, 0)[np.arange(count) % len(digits)] for k in range(channels)], -1)
    return save_images(planes, folder / f"images-{size}")


def save_images(images: np.ndarray, path: Path) -> Path:
    """A saved data set of PNG files, of uint8 images (N, H, W, C)."""
    import datasets

    rows = []
    for image in images:
        file = io.BytesIO()
        PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(str(path))
    return path
