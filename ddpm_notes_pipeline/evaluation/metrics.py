"""How far samples are from images: distances over features of a named network, pixel statistics.

No figure is a property of the model alone. It depends on the network, the numbers of images, the
split and the resizing, so every result carries its protocol and has the network in its name. "FID"
is the Frechet distance over Inception, which is not among the networks here; figures over different
networks do not compare. Put held-out images in the samples' place to see what perfect samples get.

Pixel statistics need no network: errors of each pixel's mean and variance, and the distance of
samples to their nearest training image, beside that of held-out images. Samples that are much
nearer are memorised. Only pixels are seen here: if one set went through JPEG and the other did not,
every figure changes and the pixels alone cannot tell; `source` records what is known of it.

Samples of a model with classes are also read by a classifier of the real images (class_reader.py).
"""

import os
import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import ImageSet
from .class_reader import ClassReader
from .distances import NEIGHBORS, SUBSETS, FeatureSet, frechet_distance, kernel_distance, precision_recall
from .features import CHANNELS, OFFLINE_NETWORK, FeatureNetwork, feature_file, import_eval, load_feature_network
from .pixel_batches import agreed_shape
from .reading import ImageReader, SetStatistics, with_float64
from .records import MetricProtocol, SampleMetrics

FEWEST_IMAGES = 2 * (NEIGHBORS + 1)
# efficientnet-lite0 on a CPU takes 1.3 times longer for 32 at once: glibc returns blocks of more
# than 32 MiB to the system after each use, and most layers' blocks then are.
BATCH_SIZE = 16
LEAST_SHARE = 0.05  # of images from JPEG files, or resized, that matters


def measure_samples(
    generated: Any,
    real: Any,
    train: Any = None,
    held_out: Any = None,
    network: FeatureNetwork | str | None = OFFLINE_NETWORK,
    batch_size: int = BATCH_SIZE,
    sampling: dict[str, Any] | None = None,
    source: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
    class_labels: Any = None,
) -> SampleMetrics:
    """Compare samples with real images. Collective: every rank must call it.

    Args:
        generated, real, train, held_out: images as an `ImageSet`, uint8 or floats in [0, 1]
            (N, C, H, W), or batches of such (also as {"pixel_values": ...}), which are read once
            and never held whole. All of one shape. `train` and `held_out` are only used for the
            nearest training image. An iterator can be passed for only one of the four.
        network: a `FeatureNetwork`, a name for `load_feature_network`, or None: pixel statistics
            alone.
        batch_size: images through the network at once.
        sampling, source: kept in the protocol: steps, variance, seeds; JPEG or PNG, resizing.
        cache_dir: where features of `real` are cached if it is an `ImageSet`, keyed by its
            fingerprint, the network's name, weights and preprocessing. Default:
            `$HF_HOME/ddpm_notes_pipeline`.
        accelerator: splits the work over its processes, which must all get the same images. Every
            process returns the same result, whatever their number.
        show_progress: show progress bars.
        class_labels: (N,) of `generated`: how many of them show their class is measured, if `real`
            is an `ImageSet` with labels, not all the same, and there is a network.

    Raises:
        ValueError: images of another range, type, shape or number of channels, too few images,
            features that are not finite, another number of labels.
    """
    compared = SampleComparison(
        real,
        train,
        held_out,
        network,
        batch_size=batch_size,
        cache_dir=cache_dir,
        accelerator=accelerator,
        show_progress=show_progress,
    )
    return compared.measure(generated, sampling, source, class_labels)


class SampleComparison:
    """Compares sets of samples with the same real images.

    `real` and `held_out` are read once, with the first set, and the features of `real` are kept in
    float64 (100 MB for 10,000 images). `train` is read for each set: it must not be an iterator if
    there are several. Collective: every rank must make it and use it alike.

    Args:
        real, train, held_out, network, batch_size, cache_dir, accelerator, show_progress: as of
            `measure_samples`.

    Raises:
        ValueError: as of `measure_samples`.
    """

    def __init__(
        self,
        real: Any,
        train: Any = None,
        held_out: Any = None,
        network: FeatureNetwork | str | None = OFFLINE_NETWORK,
        batch_size: int = BATCH_SIZE,
        cache_dir: str | os.PathLike[str] | None = None,
        accelerator: Accelerator | None = None,
        show_progress: bool = True,
    ) -> None:
        if held_out is not None and train is None:
            raise ValueError("held_out is given without train; the nearest training image needs both")
        if isinstance(network, str):
            network = load_feature_network(network)
            network.to(accelerator.device if accelerator else "cuda" if torch.cuda.is_available() else "cpu")
        self.real, self.train, self.held_out, self.network = real, train, held_out, network
        self.accelerator, self.cache_dir = accelerator, cache_dir
        sets = {"real": real, "train": train, "held_out": held_out}
        self.sets = {name: images for name, images in sets.items() if images is not None}
        self.reader = ImageReader(batch_size, accelerator, show_progress, agreed_shape(self.sets))
        self.class_reader = ClassReader()
        self._held_out_distances: torch.Tensor | None = None  # to their nearest training images

    def measure(
        self,
        generated: Any,
        sampling: dict[str, Any] | None = None,
        source: str | None = None,
        class_labels: Any = None,
    ) -> SampleMetrics:
        """Compare a set of samples. Arguments and errors are those of `measure_samples`."""
        sets = {"generated": generated, **self.sets}
        self._check_channels(agreed_shape(sets))
        ours, theirs = self._real_statistics, self.reader.read("generated", generated, self.network)
        if min(ours.count, theirs.count) < FEWEST_IMAGES:
            raise ValueError(f"{theirs.count} generated and {ours.count} real images; must be at least {FEWEST_IMAGES}")
        notes = _notes(sets, ours, theirs)
        if self.accelerator is None or self.accelerator.is_main_process:
            for note in notes:
                warnings.warn(note, stacklevel=3)  # through `measure_samples`, to its caller
        figures, protocol = self._distances(theirs), self._protocol()
        if class_labels is not None and self._has_classes:
            figures["class_accuracy"], protocol["classifier"] = self._class_accuracy(theirs, class_labels)
        if self.train is not None:
            nearest, counts = self._nearest_training_images(theirs)
            figures |= nearest
            protocol |= counts
        protocol |= {"num_generated": theirs.count, "source": source, "sampling": sampling or {}, "notes": notes}
        return SampleMetrics(MetricProtocol(**protocol, neighbors=NEIGHBORS, kernel_subsets=SUBSETS), **figures)

    def _check_channels(self, shape: tuple[int, ...] | None) -> None:
        if self.network is not None and shape is not None and shape[0] not in CHANNELS:
            takes = f"{self.network.name} takes 1, 3 or 4 (network=None: pixels alone)"
            raise ValueError(f"images have {shape[0]} channels; {takes}")

    @cached_property
    def _real_statistics(self) -> SetStatistics:
        """Collective at its first use."""
        network = self.network
        cache = None if network is None else feature_file(self.real, network, self.cache_dir)
        return self.reader.read("real", self.real, network, cache)

    @cached_property
    def _real_features(self) -> FeatureSet:
        return self._feature_set(self._real_statistics, seed=0)

    def _feature_set(self, statistics: SetStatistics, seed: int) -> FeatureSet:
        assert self.network is not None and statistics.features is not None
        return FeatureSet(statistics.features.to(with_float64(self.network.mean.device)), seed)

    @property
    def _has_classes(self) -> bool:
        """Whether classes can be read: in features, of real images of more than one class."""
        labels = self.real.labels if isinstance(self.real, ImageSet) else None
        return self.network is not None and labels is not None and bool(np.ptp(labels))

    def _protocol(self) -> dict[str, Any]:
        """What is known of the real images and of the network."""
        real = self._real_statistics
        protocol: dict[str, Any] = {}
        if self.network is not None:
            preprocessing = self.network.preprocessing_of(real.mean.shape[0])
            protocol |= {"network": self.network.name, "weights": self.network.weights}
            protocol |= {"num_features": self.network.num_features, "preprocessing": preprocessing}
        if isinstance(self.real, ImageSet):
            protocol |= {"real": self.real.name, "split": self.real.split, "fingerprint": self.real.fingerprint}
            protocol |= {"classes": self.real.source.classes}
        return protocol | {"num_real": real.count, "image_shape": list(real.mean.shape)}

    def _distances(self, generated: SetStatistics) -> dict[str, float]:
        """The figures by name, those over features only with a network."""
        real = self._real_statistics
        figures = {
            f"pixel_{name}_error": float((getattr(generated, name) - getattr(real, name)).square().mean().sqrt())
            for name in ("mean", "variance")
        }
        if self.network is None:
            return figures
        a, b = self._real_features, self._feature_set(generated, seed=1)
        figures["frechet_distance"] = frechet_distance(a, b)
        figures["kernel_distance"], figures["kernel_distance_standard_error"] = kernel_distance(a, b)
        figures["precision"], figures["recall"] = precision_recall(a, b)
        return figures

    def _class_accuracy(self, generated: SetStatistics, class_labels: Any) -> tuple[float, str | None]:
        """Share of generated images that show their class, and what reads them."""
        ours, theirs = self._real_statistics.features, generated.features
        assert ours is not None and theirs is not None
        if len(class_labels) != generated.count:
            raise ValueError(f"{len(class_labels)} class_labels for {generated.count} images; must be one each")

        def read() -> tuple[float, str | None]:
            self.class_reader.fit(ours, self.real.labels)
            return self.class_reader.accuracy(theirs, np.asarray(class_labels)), self.class_reader.description

        if self.accelerator is None:
            return read()
        import_eval("sklearn.linear_model")  # if it is missing, all processes say so
        return broadcast_object_list([read() if self.accelerator.is_main_process else None])[0]

    def _nearest_training_images(self, generated: SetStatistics) -> tuple[dict[str, float], dict[str, Any]]:
        """Median distances of generated and held-out images, and the protocol's counts."""
        probes = [generated.probes]
        # in one pass with the first samples: `train` may be an iterator
        if self.held_out is not None and self._held_out_distances is None:
            probes.append(self.reader.read("held_out", self.held_out).probes)
        count, distances, _ = self.reader.nearest(self.train, torch.cat(probes))
        own, *held_out = distances.split([len(part) for part in probes])
        if held_out:
            self._held_out_distances = held_out[0]
        of_each = {"": own, "held_out_": self._held_out_distances}
        of_each = {kind: values for kind, values in of_each.items() if values is not None}
        figures = {f"{kind}nearest_train_distance": float(values.median()) for kind, values in of_each.items()}
        return figures, {"num_train": count} | {f"num_{kind}nearest": len(values) for kind, values in of_each.items()}


def _notes(sets: dict[str, Any], real: SetStatistics, generated: SetStatistics) -> list[str]:
    """What makes the figures of these sets misleading, as far as can be seen."""
    notes = []
    known = {name: images for name, images in sets.items() if isinstance(images, ImageSet)}
    for attribute, what in (("lossy", "came from JPEG files"), ("resized", "were resized when they were loaded")):
        shares = {name: getattr(images, attribute) / images.file.num_images for name, images in known.items()}
        most = max(shares.values(), default=0.0)
        if most >= LEAST_SHARE and min(shares.values()) < most / 2:
            seen = ", ".join(f"{share:.0%} of {name}" for name, share in shares.items())
            notes.append(f"of the images, {seen} {what}: part of their distance is due to that")
    if real.features is not None and min(real.count, generated.count) <= real.features.shape[1]:
        notes.append(
            f"frechet_distance of {generated.count} generated and {real.count} real images over "
            f"{real.features.shape[1]} features: a covariance of so few images is singular and the distance biased "
            "upwards; compare it only at equal numbers of images, or see kernel_distance"
        )
    return notes
