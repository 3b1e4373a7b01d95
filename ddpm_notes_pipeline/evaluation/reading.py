"""One pass over an image set, split over processes: pixel statistics, probe images, features."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .distances import CHUNK_ROWS, nearest_squared_distances
from .features import FeatureFile, FeatureNetwork
from .image_batches import ONE_SHAPE, number_of, uint8_batches

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
        features = self._if_everywhere(None if cache is None else cache.read())
        missing = network if features is None else None
        computed: list[torch.Tensor] = []
        probes: list[tuple[int, torch.Tensor]] = []
        sums = squares = torch.zeros(1, dtype=torch.int64)
        count, chunks, largest, stride = 0, 0, 0, 1
        for pixels in self._chunks(name, images, f"{'features of ' if missing else ''}{name} images", self.batch_size):
            whole = pixels.long()
            sums, squares, largest = (
                sums + whole.sum(0),
                squares + whole.square().sum(0),
                max(largest, int(whole.max())),
            )
            probes += [(i, pixels[i - count].flatten()) for i in range(count, count + len(pixels)) if i % stride == 0]
            while len(probes) > PROBES:
                stride *= 2
                probes = [(i, probe) for i, probe in probes if i % stride == 0]
            if missing is not None and chunks % self.processes == self.rank:
                computed.append(missing(pixels).cpu())
            count, chunks = count + len(pixels), chunks + 1
        if not count:
            raise ValueError(f"{name} is empty; it must have images")
        if largest == 1:
            raise ValueError(f"{name} has only 0 and 1 as uint8: floats in [0, 1] cast to uint8? It must be 0..255")
        if missing is not None:
            features = self._in_order(computed, chunks, count, missing.num_features)
            if not bool(features.isfinite().all()):
                raise ValueError(f"{missing.name} gives features of {name} images that are not finite")
            if cache is not None and (self.accelerator is None or self.accelerator.is_local_main_process):
                cache.write(features)
        mean = sums.double() / count / 255
        variance = squares.double() / count / 255**2 - mean**2
        return SetStatistics(count, mean, variance, torch.stack([probe for _, probe in probes]), features)

    def nearest(self, train: Any, probes: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        """Number of training images, and the distance of each probe to the nearest one. Collective.

        Distances are root mean squares over pixels, scale 0..1, a tensor for each tensor of probes.
        """
        together, chunks, count = torch.cat(probes), 0, 0
        device = with_float64(torch.device("cpu") if self.accelerator is None else self.accelerator.device)

        def own_chunks() -> Iterator[torch.Tensor]:
            nonlocal chunks, count
            for pixels in self._chunks("train", train, "nearest train images", CHUNK_ROWS):
                if chunks % self.processes == self.rank:
                    yield pixels.flatten(1)
                chunks, count = chunks + 1, count + len(pixels)

        squared = nearest_squared_distances(together.to(device), own_chunks())
        if not count:
            raise ValueError("train is empty; it must have images")
        squared = self._gather(squared[None]).min(0).values.cpu()
        distances = (squared / together.shape[1]).sqrt() / 255
        return count, list(distances.split([len(part) for part in probes]))

    def _chunks(self, name: str, images: Any, description: str, size: int) -> Iterator[torch.Tensor]:
        """All chunks, on every process, with a progress bar."""
        options = {"desc": description, "unit": "image", "delay": 2, "leave": False}
        with tqdm(total=number_of(images), disable=not self.show_progress, **options) as bar:
            for pixels in uint8_batches(name, images, size):
                shape = tuple(pixels.shape[1:])
                self.shape = self.shape or shape
                if shape != self.shape:
                    raise ValueError(f"{name} has images of shape {shape} (C, H, W) beside {self.shape}; {ONE_SHAPE}")
                yield pixels
                bar.update(len(pixels))

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        if self.accelerator is None or self.processes == 1:
            return x
        return self.accelerator.gather(x.to(self.accelerator.device)).cpu()

    def _if_everywhere(self, features: torch.Tensor | None) -> torch.Tensor | None:
        """Cached features if every process has them: all compute, or none."""
        return features if bool(self._gather(torch.tensor([int(features is not None)])).min()) else None

    def _in_order(self, own: list[torch.Tensor], chunks: int, count: int, num_features: int) -> torch.Tensor:
        """(count, num_features) from all processes, in the order of the images."""
        rounds = math.ceil(chunks / self.processes)
        padded = torch.zeros(rounds, self.batch_size, num_features)
        for place, features in zip(padded, own):
            place[: len(features)] = features
        gathered = self._gather(padded).view(self.processes, rounds, self.batch_size, num_features)
        return gathered.transpose(0, 1).reshape(-1, num_features)[:count]


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
