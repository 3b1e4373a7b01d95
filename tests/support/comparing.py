"""What two runs left, compared."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float, rtol: float = 0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(ours: object, theirs: object, where: str = "") -> None:
    """Nested state, bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors", "timestep_sampler.safetensors"):
        assert_same(load_file(ours / name), load_file(theirs / name), name)
    assert_same(torch.load(ours / "optimizer.bin"), torch.load(theirs / "optimizer.bin"), "optimizer")
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (ours, theirs)]
    assert_same(*({key: manifest[key] for key in ("step", "ema_step", "run")} for manifest in manifests))
