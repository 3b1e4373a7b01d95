"""One pass over an image set, split over processes: pixel statistics, probe images, features."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..core.image_batches import number_of_images
from ..data import ImageSet
from .distances import CHUNK_ROWS, nearest_rows
from .features import FeatureFile, FeatureNetwork
from .pixel_batches import ONE_SHAPE, uint8_batches

T = TypeVar("T")
PROBES = 1000  # images of a set, at most, whose nearest training image is found


@dataclass
class SetStatistics:
    """What is kept of a set.

    Attributes:
        count: number of images.
        mean, variance: (C, H, W) float64 of each pixel, scale 0..1.
        probes: (at most PROBES, C*H*W) uint8, evenly spaced over the set.
        features: (count, d) float32; None without a network.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    probes: torch.Tensor
    features: torch.Tensor | None


class ImageReader:
    """Reads sets in chunks of `batch_size` images; process p of P takes chunks p, p + P, ...

    So a chunk, and with it every feature, is the same for any number of processes. Every process
    must read the same sets in the same order.

    Raises:
        ValueError: batch_size below 1; while reading: images of another shape than `shape`, or than
            those before.
    """

    def __init__(
        self, batch_size: int, accelerator: Accelerator | None, show_progress: bool, shape: tuple[int, ...] | None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; must be a whole number of at least 1")
        self.batch_size, self.accelerator, self.shape = batch_size, accelerator, shape
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.processes: int = 1 if accelerator is None else accelerator.num_processes
        self.show_progress = show_progress and self.rank == 0

    def read(
        self, name: str, images: Any, network: FeatureNetwork | None = None, cache: FeatureFile | None = None
    ) -> SetStatistics:
        """Statistics of a set, and its features, computed or from the cache. Collective."""
        features = None if cache is None else cache.read()
        if all(self._gather(features is not None)):
            network = None  # nothing to compute
        computed: list[torch.Tensor] = []
        probes: list[tuple[int, torch.Tensor]] = []
        sums = squares = torch.zeros(1, dtype=torch.int64)
        count, stride = 0, 1
        what = f"{'features of ' if network else ''}{name} images"
        for chunk, pixels in enumerate(self._chunks(name, images, what, self.batch_size)):
            whole = pixels.long()
            sums, squares = sums + whole.sum(0), squares + whole.square().sum(0)
            probes += [(i, image.clone()) for i, image in enumerate(pixels.flatten(1), count) if i % stride == 0]
            while len(probes) > PROBES:
                stride *= 2
                probes = [(i, image) for i, image in probes if i % stride == 0]
            if network is not None and chunk % self.processes == self.rank:
                computed.append(network(pixels).cpu())
            count += len(pixels)
        if not count:
            raise ValueError(f"{name} is empty; it must have images")
        if sums.any() and torch.equal(sums, squares):  # k^2 = k
            raise ValueError(f"{name} has only 0 and 1 as uint8: floats in [0, 1] cast to uint8? It must be 0..255")
        if network is not None:
            rounds = itertools.zip_longest(*self._gather(computed))  # chunks 0..P-1, P..2P-1, ...
            features = torch.cat([part for parts in rounds for part in parts if part is not None])
            if not bool(features.isfinite().all()):
                raise ValueError(f"{network.name} gives features of {name} images that are not finite")
            if cache is not None and (self.accelerator is None or self.accelerator.is_local_main_process):
                cache.write(features)
        mean = sums.double() / count / 255
        variance = squares.double() / count / 255**2 - mean**2
        return SetStatistics(count, mean, variance, torch.stack([image for _, image in probes]), features)

    def nearest(self, train: Any, probes: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Number of training images, distance of each probe to the nearest, and which that is.

        Distances are root mean squares over pixels, scale 0..1. Collective.
        """
        count = 0
        device = with_float64(torch.device("cpu") if self.accelerator is None else self.accelerator.device)

        def own_chunks() -> Iterator[tuple[int, torch.Tensor]]:
            nonlocal count
            for chunk, pixels in enumerate(self._chunks("train", train, "nearest train images", CHUNK_ROWS)):
                count += len(pixels)
                if chunk % self.processes == self.rank:
                    yield count - len(pixels), pixels.flatten(1)

        found = [part.cpu() for part in nearest_rows(probes.to(device), own_chunks())]
        if not count:
            raise ValueError("train is empty; it must have images")
        squared, numbers = (torch.stack(of_all) for of_all in zip(*self._gather(found)))
        lowest, rank = squared.min(0)
        return count, (lowest / probes.shape[1]).sqrt() / 255, numbers.gather(0, rank[None])[0]

    def _chunks(self, name: str, images: Any, description: str, size: int) -> Iterator[torch.Tensor]:
        """All chunks, on every process, with a progress bar."""
        options = {"desc": description, "unit": "image", "delay": 2, "leave": False}
        total = len(images) if isinstance(images, ImageSet) else number_of_images(images)
        with tqdm(total=total, disable=not self.show_progress, **options) as bar:
            for pixels in uint8_batches(name, images, size):
                shape = tuple(pixels.shape[1:])
                self.shape = self.shape or shape
                if shape != self.shape:
                    raise ValueError(f"{name} has images of shape {shape} (C, H, W) beside {self.shape}; {ONE_SHAPE}")
                yield pixels
                bar.update(len(pixels))

    def _gather(self, own: T) -> list[T]:
        """What each process has, in the order of their ranks. Collective."""
        return [own] if self.processes == 1 else gather_object([own])


def nearest_training_images(images: torch.Tensor, train: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """The training image nearest to each of uint8 images (N, C, H, W), and its distance (N,).

    Distances are as of `ImageReader.nearest`. Not collective.
    """
    reader = ImageReader(CHUNK_ROWS, None, show_progress=False, shape=tuple(images.shape[1:]))
    _, distances, numbers = reader.nearest(train, images.flatten(1))
    return torch.cat([train.take([number]) for number in numbers.tolist()]), distances


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
