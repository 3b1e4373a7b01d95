"""How far samples are from images of the data: distances over the features of a named network, and plain pixel statistics.

Features phi(x) of two sets of images are compared as

    Frechet distance     |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))               of Gaussians fitted to each (arXiv 1706.08500)
    kernel distance      E k(x, x') + E k(y, y') - 2 E k(x, y),  k(a, b) = (a.b / d + 1)^3    unbiased (arXiv 1801.01401)
    precision, recall    the part of one set inside the other's balls around each image, out to its third neighbour (arXiv 1904.06991)

None of these is a number of the model alone. It changes with the network, the counts, the split and the resizing, so every result carries them
(`MetricProtocol`) and its name has the network in it: "FID" is the Frechet distance over Inception, which is not among the networks
here, and the figures of one network are not comparable with another's. The Frechet distance is biased by the counts; the kernel
distance is not, and has a standard error. What perfect samples would get is found by putting held-out images in the samples' place.

Pixel statistics need no network: the errors of each pixel's mean and variance, and how far a sample is from the nearest training image, beside
the same for held-out images: much nearer means memorised. Files are not seen here, only pixels: that one set went through JPEG and the
other did not changes every figure and cannot be told from pixels alone; `source` is where the protocol says what is known of it.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..data import ImageSet
from .features import OFFLINE_NETWORK, FeatureFile, FeatureNetwork, feature_file, import_eval, load_feature_network

NEIGHBORS = 3  # k of precision and recall, as published
SUBSETS = 10  # left out one after the other for the kernel distance's standard error
PROBES = 1000  # at most so many images of a set look for their nearest training image
FEWEST_IMAGES = 2 * (NEIGHBORS + 1)
ROWS = 1024  # of a table of distances at once


# ------------------------------------------------------------------------------------------------ distances


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance (squared, as everywhere) of Gaussians fitted to features a (N, d) and b (M, d), in float64 by torchmetrics.

    Needs at least 2 rows each; with N or M <= d a covariance is singular and the distance too large for what the counts can tell.
    """
    given = nn.Identity()
    given.num_features = a.shape[1]  # type: ignore[assignment]
    # Features of all processes are here already: the metric must not add those of the others again.
    metric = import_eval("torchmetrics.image.fid").FrechetInceptionDistance(feature=given, sync_on_compute=False)
    for features, real in ((a, True), (b, False)):
        for rows in features.cpu().split(ROWS):
            metric.update(rows.double(), real=real)
    return max(0.0, float(metric.compute()))  # rounding takes it below zero where the sets are one


def kernel_distance(a: torch.Tensor, b: torch.Tensor, subsets: int = SUBSETS, seed: int = 0) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy of features a (N, d) and b (M, d), and its standard error.

    All pairs count. The standard error is the jackknife's: both sets are dealt (by `seed`) into disjoint subsets, and the distance without
    each is compared. It is right where the sets differ, and up to sqrt(2) too large where they do not. Deviations over random subsets that overlap, which others print, shrink to nothing as subsets grow to the whole.
    """
    polynomial = import_eval("torchmetrics.image.kid").poly_kernel  # degree 3, gamma 1 / d, coefficient 1
    fewest = min(len(a), len(b))
    parts = min(subsets, fewest)
    if parts < 2 or fewest - math.ceil(fewest / parts) < 2:
        raise ValueError(f"{len(a)} and {len(b)} images in {subsets} subsets; allowed: at least 3 images, 2 subsets")
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        [f[rows].double() for rows in torch.randperm(len(f), generator=generator).tensor_split(parts)] for f in (a, b)
    )
    same = [torch.zeros(parts, parts, dtype=torch.float64) for _ in range(2)]  # sums of k over pairs of subsets
    cross = torch.zeros(parts, parts, dtype=torch.float64)

    def add_up(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.stack([polynomial(rows, g).sum() for rows in f.split(ROWS)]).sum().cpu()

    for i in range(parts):
        for table, f in zip(same, (x, y)):
            for j in range(i + 1):
                table[i, j] = table[j, i] = add_up(f[i], f[j])
            table[i, i] -= ((f[i].square().sum(1) / f[i].shape[1] + 1) ** 3).sum().cpu()  # no image with itself
        for j in range(parts):
            cross[i, j] = add_up(x[i], y[j])
    sizes = [torch.tensor([len(part) for part in f], dtype=torch.float64) for f in (x, y)]

    def distance(kept: torch.Tensor) -> float:
        n, m = (size[kept].sum() for size in sizes)
        xx, yy, xy = (table[kept][:, kept].sum() for table in (*same, cross))
        return float(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))

    without = np.array([distance(torch.arange(parts) != i) for i in range(parts)])
    error = math.sqrt((parts - 1) * float(np.mean((without - without.mean()) ** 2)))
    return distance(torch.ones(parts, dtype=torch.bool)), error


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = NEIGHBORS) -> tuple[float, float]:
    """Part of the generated features (M, d) inside the real manifold, and part of the real ones (N, d) inside the generated.

    A manifold is the union of balls around each of its images that reach out to its k-th nearest other one.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} and {len(generated)} images; allowed: more than k = {k} on either side")

    def inside(points: torch.Tensor, manifold: torch.Tensor) -> float:
        # k + 1: the nearest is the image itself
        radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _squared_distances(manifold, manifold)])
        return float(torch.cat([(d <= radii).any(1) for d in _squared_distances(points, manifold)]).double().mean())

    return inside(generated, real), inside(real, generated)


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """|a_i - b_j|^2 in float64, some rows at a time. Exact for 8-bit pixels: products and sums of whole numbers."""
    b = b.double()
    norms = b.square().sum(1)
    for rows in a.split(ROWS):
        rows = rows.double()
        yield (rows.square().sum(1, keepdim=True) + norms - 2 * (rows @ b.T)).clamp(min=0)


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True)
class MetricProtocol:
    """What a figure depends on beside the model.

    Attributes:
        network, weights, num_features, preprocessing: of the features; None where only pixels were compared.
        num_generated, num_real: images on either side. image_shape: (C, H, W) of both before the network's resizing.
        real, split, fingerprint: name, split and pixels' digest of the real images, where they are an `ImageSet`.
        num_train, num_nearest, num_held_out_nearest: training images, and the images (at most 1000, evenly spaced) that looked for
            their nearest one among them.
        source: what the caller says of files: JPEG or PNG, resized by what. sampling: of samples: steps, variance, seeds.
        notes: what was warned of.
    """

    network: str | None
    weights: str | None
    num_features: int | None
    preprocessing: str | None
    num_generated: int
    num_real: int
    image_shape: tuple[int, int, int]
    real: str | None = None
    split: str | None = None
    fingerprint: str | None = None
    num_train: int | None = None
    num_nearest: int | None = None
    num_held_out_nearest: int | None = None
    source: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    arithmetic: str = "features float32, statistics float64"
    pixels: str = "pixel statistics: scale 0..1, root mean square over pixels"
    neighbors: int = NEIGHBORS
    kernel_subsets: int = SUBSETS


@dataclass(frozen=True)
class SampleMetrics:
    """Distances of samples from images, and what they hang on.

    Attributes:
        frechet_distance, kernel_distance, kernel_distance_standard_error, precision, recall: over features; None without a network.
        pixel_mean_error, pixel_variance_error: root mean square over pixels of the difference of the mean (variance) of each, scale 0..1.
        nearest_train_distance: median over samples of the root mean square distance to the nearest training image, scale 0..1.
        held_out_nearest_train_distance: the same for held-out images.
    """

    protocol: MetricProtocol
    pixel_mean_error: float
    pixel_variance_error: float
    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_standard_error: float | None = None
    precision: float | None = None
    recall: float | None = None
    nearest_train_distance: float | None = None
    held_out_nearest_train_distance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: figures that were measured, those over features named "frechet_distance (efficientnet-lite0)", and "protocol"."""
        over_features = (
            "frechet_distance",
            "kernel_distance",
            "kernel_distance_standard_error",
            "precision",
            "recall",
        )
        values = {f"{name} ({self.protocol.network})": getattr(self, name) for name in over_features}
        for name in ("pixel_mean_error", "pixel_variance_error"):
            values[name] = getattr(self, name)
        for name in ("nearest_train_distance", "held_out_nearest_train_distance"):
            values[name] = getattr(self, name)
        protocol = asdict(self.protocol)
        protocol |= {"image_shape": list(self.protocol.image_shape), "notes": list(self.protocol.notes)}
        return {name: value for name, value in values.items() if value is not None} | {"protocol": protocol}


def measure_samples(
    generated: Any,
    real: Any,
    train: Any = None,
    held_out: Any = None,
    network: FeatureNetwork | str | None = OFFLINE_NETWORK,
    batch_size: int = 32,
    sampling: dict[str, Any] | None = None,
    source: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
) -> SampleMetrics:
    """Compare samples with real images.

    Args:
        generated, real, train, held_out: images as an `ImageSet`, uint8 or floats in [0, 1] (N, C, H, W), or batches of such (also as
            {"pixel_values": ...}), read once and never held whole. All of one shape. `train` and `held_out` are for the nearest training
            image alone; an iterator can only be one of the four.
        network: a `FeatureNetwork`, a name for `load_feature_network`, or None for pixel statistics alone.
        batch_size: images through the network at once.
        sampling, source: kept in the protocol: steps, variance, seeds; JPEG or PNG, what resized them.
        cache_dir: where features of `real` are kept, if it is an `ImageSet`, by its fingerprint, the network's name and weights and the
            preprocessing. By default `$HF_HOME/ddpm_notes_pipeline`.
        accelerator: splits the images over its processes, which must all be given the same ones; every one returns the same result, and
            it does not depend on their number.

    Raises:
        ValueError: images of another range, type, shape or number of channels than the above, too few of them, features that are not finite.
    """
    sets = {"generated": generated, "real": real, "train": train, "held_out": held_out}
    sets = {name: images for name, images in sets.items() if images is not None}
    if held_out is not None and train is None:
        raise ValueError("held_out is given without train; allowed: both, for the nearest training image of either")
    shape = _agreed_shape(sets)
    if isinstance(network, str):
        network = load_feature_network(network)
        network.to(accelerator.device if accelerator else "cuda" if torch.cuda.is_available() else "cpu")
    if network is not None and shape is not None and shape[0] not in (1, 3):
        raise ValueError(f"images have {shape[0]} channels; {network.name} takes 1 or 3 (network=None: pixels alone)")

    reader = _Reader(batch_size, accelerator, show_progress, shape)
    keeper = None if network is None else feature_file(real, network, cache_dir)
    ours = reader("real", real, network, keeper)
    theirs = reader("generated", generated, network)
    if min(ours.count, theirs.count) < FEWEST_IMAGES:
        raise ValueError(f"{theirs.count} generated and {ours.count} real images; allowed: at least {FEWEST_IMAGES}")
    figures: dict[str, Any] = {
        "pixel_mean_error": _rms(theirs.mean - ours.mean),
        "pixel_variance_error": _rms(theirs.variance - ours.variance),
    }
    notes = _unlike(sets)
    if network is not None:
        assert ours.features is not None and theirs.features is not None
        d, device = network.num_features, _with_float64(network.mean.device)
        a, b = ours.features.to(device), theirs.features.to(device)
        if min(len(a), len(b)) <= d:
            notes.append(
                f"frechet_distance of {len(b)} generated and {len(a)} real images over {d} features: a covariance of so few images "
                "is singular and the distance biased upwards; compare it only at the same counts, or see kernel_distance"
            )
        figures["frechet_distance"] = frechet_distance(a, b)
        figures["kernel_distance"], figures["kernel_distance_standard_error"] = kernel_distance(a, b)
        figures["precision"], figures["recall"] = precision_recall(a, b)
    if accelerator is None or accelerator.is_main_process:
        for note in notes:
            warnings.warn(note, stacklevel=2)
    counts: dict[str, Any] = {}
    if train is not None:
        probes = [theirs.probes]
        if held_out is not None:
            probes.append(reader("held_out", held_out).probes)
        counts["num_train"], nearest = reader.nearest(train, probes)
        for kind, distances in zip(("", "held_out_"), nearest):
            figures[f"{kind}nearest_train_distance"] = float(distances.median())
            counts[f"num_{kind}nearest"] = len(distances)
    known = isinstance(real, ImageSet)
    protocol = MetricProtocol(
        network=None if network is None else network.name,
        weights=None if network is None else network.weights,
        num_features=None if network is None else network.num_features,
        preprocessing=None if network is None else network.preprocessing,
        num_generated=theirs.count,
        num_real=ours.count,
        image_shape=ours.shape,
        real=real.name if known else None,
        split=real.split if known else None,
        fingerprint=real.fingerprint if known else None,
        source=source,
        sampling=dict(sampling or {}),
        notes=tuple(notes),
        **counts,
    )
    return SampleMetrics(protocol, **figures)


def _unlike(sets: dict[str, Any]) -> list[str]:
    """What came to the pixels of one set and not of another on their way, and would pass for a difference between the images."""
    known = {name: images for name, images in sets.items() if isinstance(images, ImageSet)}
    notes = []
    for attribute, what in (("lossy", "came from JPEG files"), ("resized", "were resized when they were loaded")):
        parts = {name: getattr(images, attribute) / len(images) for name, images in known.items()}
        if parts and min(parts.values()) < max(parts.values()) / 2:
            told = ", ".join(f"{part:.0%} of {name}" for name, part in parts.items())
            notes.append(f"of the images, {told} {what}: part of their distance is that")
    return notes


# ------------------------------------------------------------------------------------------------ reading images


@dataclass
class _Read:
    """One set, read once."""

    count: int
    shape: tuple[int, int, int]
    mean: torch.Tensor  # (C, H, W) float64, scale 0..1, as the next one
    variance: torch.Tensor
    probes: torch.Tensor  # (at most PROBES, dims) uint8, evenly spaced
    features: torch.Tensor | None


class _Reader:
    """Reads sets in chunks of batch_size images, chunk c on process c modulo their number: what a chunk holds, and so every
    feature and every sum, does not depend on how many processes there are."""

    def __init__(
        self, batch_size: int, accelerator: Accelerator | None, show_progress: bool, shape: tuple[int, ...] | None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; allowed: a whole number of at least 1")
        self.batch_size, self.accelerator, self.shape = batch_size, accelerator, shape
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.processes: int = 1 if accelerator is None else accelerator.num_processes
        self.show_progress = show_progress and self.rank == 0

    def __call__(
        self, name: str, images: Any, network: FeatureNetwork | None = None, keeper: "FeatureFile | None" = None
    ) -> _Read:
        features = self.everywhere(keeper.read() if keeper is not None else None)
        compute = network is not None and features is None
        own: list[torch.Tensor] = []
        probes: list[tuple[int, torch.Tensor]] = []
        stride, count, chunks, largest = 1, 0, 0, 0
        sums: torch.Tensor | None = None
        for pixels in self.chunks(name, images, f"features of {name} images" if compute else f"{name} images"):
            if sums is None:
                sums = torch.zeros(2, *pixels.shape[1:], dtype=torch.int64)
            numbers = torch.arange(count, count + len(pixels))
            probes.extend((int(i), pixels[i - count].flatten()) for i in numbers[numbers % stride == 0])
            while len(probes) > PROBES:
                stride *= 2
                probes = [(i, probe) for i, probe in probes if i % stride == 0]
            if chunks % self.processes == self.rank:
                whole = pixels.long()
                sums += torch.stack([whole.sum(0), whole.square().sum(0)])
                largest = max(largest, int(pixels.max()))
                if compute:
                    assert network is not None
                    own.append(network(pixels).cpu())
            count, chunks = count + len(pixels), chunks + 1
        if sums is None:
            raise ValueError(f"{name} is empty; allowed: at least {FEWEST_IMAGES} images")
        shape = (int(sums.shape[1]), int(sums.shape[2]), int(sums.shape[3]))
        if self.processes > 1:
            assert self.accelerator is not None
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()
            largest = int(self.gather(torch.tensor([largest])).max())
        if largest == 1:
            raise ValueError(f"{name} has uint8 of 0 and 1 alone: floats in [0, 1] cast to uint8? allowed: 0..255")
        if compute:
            assert network is not None
            features = self.in_order(own, chunks, count, network.num_features)
            if not bool(features.isfinite().all()):
                raise ValueError(f"{network.name} gives features of {name} images that are not finite")
            if keeper is not None and (self.accelerator is None or self.accelerator.is_local_main_process):
                keeper.write(features)
        total, squares = sums.double()
        mean = total / count / 255
        variance = squares / count / 255**2 - mean**2
        return _Read(count, shape, mean, variance, torch.stack([probe for _, probe in probes]), features)

    def chunks(self, name: str, images: Any, description: str, size: int | None = None) -> Iterator[torch.Tensor]:
        """uint8 (size or batch_size, C, H, W) each but the last, all of them, on every process."""
        size = size or self.batch_size
        total = len(images) if isinstance(images, (ImageSet, torch.Tensor, np.ndarray)) else None
        with tqdm(
            desc=description, total=total, unit="image", delay=2, disable=not self.show_progress, leave=False
        ) as bar:
            for pixels in _rebatched(_batches(name, images, size), size):
                self.shape = self.shape or tuple(pixels.shape[1:])
                if tuple(pixels.shape[1:]) != self.shape:
                    raise ValueError(
                        f"{name} has images of shape {tuple(pixels.shape[1:])} (C, H, W) beside {self.shape}; allowed: one shape for all "
                        "sets, reached the same way (load_images has resolution and image_mode)"
                    )
                yield pixels
                bar.update(len(pixels))

    def nearest(self, train: Any, probes: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        """Number of training images; of each probe, the root mean square distance to the nearest of them, scale 0..1."""
        together, count, chunks = torch.cat(probes), 0, 0
        device = torch.device("cpu") if self.accelerator is None else _with_float64(self.accelerator.device)
        together = together.to(device).double()
        best = torch.full((len(together),), math.inf, dtype=torch.float64, device=device)
        for pixels in self.chunks("train", train, "nearest train images", ROWS):
            if chunks % self.processes == self.rank:
                for squared in _squared_distances(pixels.flatten(1).to(device), together):
                    best = torch.minimum(best, squared.min(0).values)
            count, chunks = count + len(pixels), chunks + 1
        if not count:
            raise ValueError("train is empty; allowed: at least one image")
        if self.processes > 1:
            best = self.gather(best[None]).min(0).values
        best = (best.cpu() / together.shape[1]).sqrt() / 255
        return count, list(best.split([len(part) for part in probes]))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        if self.accelerator is None or self.processes == 1:
            return x
        return self.accelerator.gather(x.to(self.accelerator.device)).cpu()

    def everywhere(self, features: torch.Tensor | None) -> torch.Tensor | None:
        """Kept features, if every process has them: those without would wait for the others."""
        return features if bool(self.gather(torch.tensor([int(features is not None)])).min()) else None

    def in_order(self, own: list[torch.Tensor], chunks: int, count: int, num_features: int) -> torch.Tensor:
        """(count, num_features) of all processes, in the images' order."""
        rounds = math.ceil(chunks / self.processes)
        padded = torch.zeros(rounds, self.batch_size, num_features)
        for place, features in zip(padded, own):
            place[: len(features)] = features
        gathered = self.gather(padded).view(self.processes, rounds, self.batch_size, num_features)
        return gathered.transpose(0, 1).reshape(-1, num_features)[:count]


def _with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _rms(x: torch.Tensor) -> float:
    return math.sqrt(float(x.square().mean()))


def _agreed_shape(sets: dict[str, Any]) -> tuple[int, ...] | None:
    """(C, H, W) of the sets whose shape can be seen before they are read, which is checked first: nothing is measured in vain."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, images in sets.items():
        if isinstance(images, ImageSet):
            shapes[name] = (images.channels, *images.size)
        elif isinstance(images, (torch.Tensor, np.ndarray)):
            shapes[name] = tuple(_as_uint8(name, images[:1]).shape[1:])
            _check_range(name, torch.as_tensor(images))
    if len(set(shapes.values())) > 1:
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"images are (C, H, W): {seen}; allowed: one shape for all sets, reached the same way (load_images has resolution and image_mode)"
        )
    return next(iter(shapes.values()), None)


def _batches(name: str, images: Any, size: int) -> Iterator[torch.Tensor]:
    if isinstance(images, ImageSet):
        for i in range(0, len(images), size):
            yield images.take(range(i, min(i + size, len(images))))
    elif isinstance(images, (torch.Tensor, np.ndarray)):
        for i in range(0, len(images), size):
            yield _as_uint8(name, images[i : i + size])
    elif isinstance(images, Iterable) and not isinstance(images, (str, dict)):
        for batch in images:
            yield _as_uint8(name, batch["pixel_values"] if isinstance(batch, dict) else batch)
    else:
        raise ValueError(f"{name} is {type(images).__name__}; allowed: an ImageSet, a tensor (N, C, H, W), or batches")


def _rebatched(batches: Iterator[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    rest: torch.Tensor | None = None
    for batch in batches:
        if rest is not None and len(rest) and rest.shape[1:] == batch.shape[1:]:
            batch = torch.cat([rest, batch])
        elif rest is not None and len(rest):
            yield rest  # of another shape, which the reader refuses
        whole = len(batch) // size * size
        yield from batch[:whole].split(size) if whole else ()
        rest = batch[whole:]
    if rest is not None and len(rest):
        yield rest


def _as_uint8(name: str, images: Any) -> torch.Tensor:
    x = torch.as_tensor(images) if isinstance(images, (torch.Tensor, np.ndarray)) else images
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        seen = f"of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"{name} has a batch {seen}; allowed: tensors (N, C, H, W)")
    if x.shape[1] > 4:
        raise ValueError(f"{name} has a batch of shape {tuple(x.shape)}; allowed: (N, C, H, W) with 1 to 4 channels")
    if x.dtype == torch.uint8:
        return x.cpu()
    _check_range(name, x)
    return (x.cpu().double() * 255).round().to(torch.uint8)


def _check_range(name: str, x: torch.Tensor) -> None:
    if x.dtype == torch.uint8 or not x.numel():
        return
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: uint8, or floats in [0, 1]")
    lowest, highest = float(x.min()), float(x.max())
    if not 0 <= lowest <= highest <= 1:
        hint = " (a model's [-1, 1]? data.to_uint8 turns it into uint8)" if -1.5 <= lowest < 0 else ""
        raise ValueError(f"{name} has floats from {lowest:.4g} to {highest:.4g}; allowed: [0, 1], or uint8{hint}")
