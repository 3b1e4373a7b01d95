"""The files of training/configs: each trains, as it stands, on images like those it names.

A folder of the data set's name, in the directory where training starts, is read instead of the Hub.
Flags make the network smaller; at its full size it is built, and a gradient taken of it.
"""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from ddpm_notes_pipeline.objectives import Objective
from ddpm_notes_pipeline.training.networks import make_model
from ddpm_notes_pipeline.training.parser import parse_arguments
from tests.support.launching import ROOT

CONFIGS = ROOT / "training" / "configs"
SMALL = (
    "--block_out_channels 32 32 --layers_per_block 1 --attention_levels 1 --max_train_steps 2 --lr_warmup_steps 1 --train_batch_size 4 "
    "--max_validation_images 4 --num_samples 2 --ddpm_num_inference_steps 2 --report_to none --mixed_precision no --output_dir run"
).split()


def encoded(random: np.random.Generator, height: int, width: int, kind: str = "PNG") -> bytes:
    """An image file of noise."""
    file = io.BytesIO()
    PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def make_cifar10(home: Path, random: np.random.Generator) -> None:
    """Parquet files of a train and a test split, columns img and label, as uoft-cs/cifar10 has."""
    features = Features({"img": Image(), "label": ClassLabel(names=list("abcdefghij"))})
    for split, count in (("train", 20), ("test", 10)):
        images = [{"bytes": encoded(random, 32, 32), "path": None} for _ in range(count)]
        table = Dataset.from_dict({"img": images, "label": [i % 10 for i in range(count)]}, features=features)
        (home / "uoft-cs" / "cifar10").mkdir(parents=True, exist_ok=True)
        table.to_parquet(home / "uoft-cs" / "cifar10" / f"{split}-00000-of-00001.parquet")


def make_mnist(home: Path, random: np.random.Generator) -> None:
    """Grey parquet files of a train and a test split, in a folder, as ylecun/mnist has."""
    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    for split, count in (("train", 20), ("test", 10)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images = [PIL.Image.fromarray(image) for image in pixels]
        table = Dataset.from_dict({"image": images, "label": [i % 10 for i in range(count)]}, features=features)
        (home / "ylecun" / "mnist" / "mnist").mkdir(parents=True, exist_ok=True)
        table.to_parquet(home / "ylecun" / "mnist" / "mnist" / f"{split}-00000-of-00001.parquet")


def make_flowers(home: Path, random: np.random.Generator) -> None:
    """One split, one column, photographs of many sizes."""
    images = [
        {"bytes": encoded(random, *random.integers(66, 100, 2), "JPEG"), "path": f"image_{i:05d}.jpg"}
        for i in range(100)
    ]
    folder = home / "huggan" / "flowers-102-categories"
    folder.mkdir(parents=True)
    Dataset.from_dict({"image": images}, features=Features({"image": Image()})).to_parquet(
        folder / "train-00000-of-00001.parquet"
    )


def make_folder(home: Path, random: np.random.Generator) -> None:
    """Files of two kinds and many sizes, one of them cut short."""
    (home / "my_images" / "some").mkdir(parents=True)
    for i in range(11):
        kind = ("PNG", "JPEG")[i % 2]
        path = home / "my_images" / ("some" if i % 3 else ".") / f"{i}.{kind.lower()}"
        content = encoded(random, *random.integers(40, 90, 2), kind)
        path.write_bytes(content if i != 7 else content[: len(content) // 2])


def make_tiles(home: Path, random: np.random.Generator) -> None:
    """Files of every mode that the tiles have, in sub-folders, some of another size or class."""
    for i in range(60):
        mode, kind = ("P", "RGBA", "RGB", "L", "LA")[i % 5], ("mon", "item", "player", "dngn", "misc", "gui")[i % 6]
        sides = (48, 40) if i % 7 == 0 else (32, 32)
        image = PIL.Image.fromarray(random.integers(0, 256, (*sides, 4), dtype=np.uint8)).convert(mode)
        if mode == "P":
            image.info["transparency"] = 0
        path = home / "tiles" / "releases" / "Nov-2015" / kind / "some" / f"training_{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


MAKE = {"cifar10": make_cifar10, "flowers": make_flowers, "folder": make_folder, "tiles": make_tiles}
MAKE |= {"digits": None, "mnist": make_mnist}
SIZES = {"cifar10": (3, 32), "flowers": (3, 64), "folder": (3, 64), "digits": (1, 8), "mnist": (1, 28)}
SIZES |= {"tiles": (4, 32)}
TRAINED_ON = {"cifar10": 20, "flowers": 96, "folder": 10, "digits": 1438, "mnist": 20, "tiles": 36}
OF_FILES = {"folder": " of 11 files", "tiles": " of 60 files"}


def test_every_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MAKE)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_a_recipe_trains_on_images_like_those_it_names(train, tmp_path, name):
    if MAKE[name] is not None:
        MAKE[name](tmp_path, np.random.default_rng(0))
    result = train("--config", CONFIGS / f"{name}.yaml", *SMALL, cwd=tmp_path, timeout=400)
    channels, side = SIZES[name]
    of_files = OF_FILES.get(name, "")
    assert f"{TRAINED_ON[name]} images{of_files} of {channels}x{side}x{side} from " in result.stdout
    assert ("1 left out" in result.stdout) == (name == "folder")
    if name == "folder":  # said in a line, without a line of our code
        assert re.search(
            r"^warning: my_images: left out 1 of 11 images\n  1: .*: row \d+ \(.*\b7\.jpeg\)$",
            result.stderr,
            re.MULTILINE,
        )
    rows = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["loss"] < 10 for row in rows)
    data, _, _ = parse_arguments(["--config", str(CONFIGS / f"{name}.yaml")])
    held_out = data.validation_split or data.validation_share
    assert (held_out is None) == (name == "folder")
    if held_out is not None:
        (row,) = map(json.loads, (tmp_path / "run" / "validation.jsonl").read_text().splitlines())
        assert row["step"] == 2 and row["images"] == 4 and row["bits_per_dim"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "flowers"])
def test_the_network_of_a_recipe_is_the_one_it_names(name):
    """As many weights as published.

    35.7 M (arXiv 2006.11239, appendix B); 113.7 M, diffusers' default for 64x64.
    """
    _, model, run = parse_arguments(["--config", str(CONFIGS / f"{name}.yaml")])
    channels, side = SIZES[name]
    unet, scheduler = make_model(model, SimpleNamespace(channels=channels, size=(side, side), num_classes=None))
    weights = sum(parameter.numel() for parameter in unet.parameters())
    assert weights == pytest.approx({"cifar10": 35.7e6, "flowers": 113.7e6}[name], rel=2e-3)
    attends = {"cifar10": [16], "flowers": [4]}[name]  # sides of the levels with attention
    assert [side >> i for i, kind in enumerate(unet.config.down_block_types) if kind.startswith("Attn")] == attends

    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn((2, 1, channels, side, side), generator=generator)
    loss = Objective(scheduler, run.objective)(unet, x_0.clamp(-1, 1), noise, torch.tensor([500])).mean()
    loss.backward()
    assert 0 < loss.item() < 10
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in unet.parameters())
