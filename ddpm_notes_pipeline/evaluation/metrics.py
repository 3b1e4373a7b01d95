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
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import ImageSet
from .class_reader import ClassReader
from .distances import NEIGHBORS, SUBSETS, frechet_distance, kernel_distance, precision_recall
from .features import CHANNELS, OFFLINE_NETWORK, FeatureNetwork, feature_file, import_eval, load_feature_network
from .pixel_batches import agreed_shape
from .reading import ImageReader, SetStatistics, with_float64
from .records import MetricProtocol, SampleMetrics

FEWEST_IMAGES = 2 * (NEIGHBORS + 1)
# On a CPU 32 at once take 1.3 times longer: glibc returns blocks of more than 32 MiB to the system after each use.
BATCH_SIZE = 16


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
    class_reader: ClassReader | None = None,
) -> SampleMetrics:
    """Compare samples with real images. Collective: every rank must call it.

    Args:
        generated, real, train, held_out: images as an `ImageSet`, uint8 or floats in [0, 1]
            (N, C, H, W), or batches of such (also as {"pixel_values": ...}), which are read once
            and never held whole. All of one shape. `train` and `held_out` are only used for the
            nearest training image. An iterator can serve as one of the four only.
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
        class_reader: fitted to `real` where it is not yet: to be given again for the same images.

    Raises:
        ValueError: images of another range, type, shape or number of channels, too few images,
            features that are not finite, another number of labels.
    """
    sets = {"generated": generated, "real": real, "train": train, "held_out": held_out}
    sets = {name: images for name, images in sets.items() if images is not None}
    if held_out is not None and train is None:
        raise ValueError("held_out is given without train; the nearest training image needs both")
    shape = agreed_shape(sets)
    if isinstance(network, str):
        network = load_feature_network(network)
        network.to(accelerator.device if accelerator else "cuda" if torch.cuda.is_available() else "cpu")
    if network is not None and shape is not None and shape[0] not in CHANNELS:
        takes = f"{network.name} takes 1, 3 or 4 (network=None: pixels alone)"
        raise ValueError(f"images have {shape[0]} channels; {takes}")

    reader = ImageReader(batch_size, accelerator, show_progress, shape)
    ours = reader.read("real", real, network, None if network is None else feature_file(real, network, cache_dir))
    theirs = reader.read("generated", generated, network)
    if min(ours.count, theirs.count) < FEWEST_IMAGES:
        raise ValueError(f"{theirs.count} generated and {ours.count} real images; must be at least {FEWEST_IMAGES}")
    notes = _notes(sets, ours, theirs)
    if accelerator is None or accelerator.is_main_process:
        for note in notes:
            warnings.warn(note, stacklevel=2)
    figures = _distances(ours, theirs, network)
    protocol: dict[str, Any] = {}
    labels = real.labels if isinstance(real, ImageSet) else None
    if network is not None and labels is not None and np.ptp(labels) and class_labels is not None:
        read = _class_accuracy(class_reader or ClassReader(), ours, labels, theirs, class_labels, accelerator)
        figures["class_accuracy"], protocol["classifier"] = read
    if network is not None:
        protocol |= {"network": network.name, "weights": network.weights}
        preprocessing = network.preprocessing_of(ours.mean.shape[0])
        protocol |= {"num_features": network.num_features, "preprocessing": preprocessing}
    if isinstance(real, ImageSet):
        protocol |= {"real": real.name, "split": real.split, "fingerprint": real.fingerprint}
        protocol |= {"classes": real.source.classes}
    if train is not None:
        nearest, counts = _nearest_training_images(reader, train, theirs, held_out)
        figures |= nearest
        protocol |= counts
    protocol |= {"num_generated": theirs.count, "num_real": ours.count, "image_shape": list(ours.mean.shape)}
    protocol |= {"source": source, "sampling": sampling or {}, "notes": notes}
    return SampleMetrics(MetricProtocol(**protocol, neighbors=NEIGHBORS, kernel_subsets=SUBSETS), **figures)


def _distances(real: SetStatistics, generated: SetStatistics, network: FeatureNetwork | None) -> dict[str, float]:
    """The figures of two sets by name, those over features only with a network."""
    figures = {
        f"pixel_{name}_error": float((getattr(generated, name) - getattr(real, name)).square().mean().sqrt())
        for name in ("mean", "variance")
    }
    if network is None or real.features is None or generated.features is None:
        return figures
    device = with_float64(network.mean.device)
    a, b = real.features.to(device), generated.features.to(device)
    figures["frechet_distance"] = frechet_distance(a, b)
    figures["kernel_distance"], figures["kernel_distance_standard_error"] = kernel_distance(a, b)
    figures["precision"], figures["recall"] = precision_recall(a, b)
    return figures


def _class_accuracy(
    reader: ClassReader,
    real: SetStatistics,
    labels: np.ndarray,
    generated: SetStatistics,
    class_labels: Any,
    accelerator: Accelerator | None,
) -> tuple[float, str | None]:
    """Share of generated images that show their class, and what reads them. Collective."""
    ours, theirs = real.features, generated.features
    assert ours is not None and theirs is not None

    def read() -> tuple[float, str | None]:
        reader.fit(ours, labels)
        return reader.accuracy(theirs, np.asarray(class_labels)), reader.description

    if accelerator is None:
        return read()
    import_eval("sklearn.linear_model")  # if it is missing, all processes say so
    return broadcast_object_list([read() if accelerator.is_main_process else None])[0]


def _nearest_training_images(
    reader: ImageReader, train: Any, generated: SetStatistics, held_out: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median distances of generated and held-out images, and the protocol's counts. Collective."""
    probes = [generated.probes]
    if held_out is not None:
        probes.append(reader.read("held_out", held_out).probes)
    count, distances, _ = reader.nearest(train, torch.cat(probes))
    of_each = dict(zip(("", "held_out_"), distances.split([len(part) for part in probes])))
    figures = {f"{kind}nearest_train_distance": float(values.median()) for kind, values in of_each.items()}
    return figures, {"num_train": count} | {f"num_{kind}nearest": len(values) for kind, values in of_each.items()}


def _notes(sets: dict[str, Any], real: SetStatistics, generated: SetStatistics) -> list[str]:
    """What makes the figures of these sets misleading, as far as can be seen."""
    notes = []
    known = {name: images for name, images in sets.items() if isinstance(images, ImageSet)}
    for attribute, what in (("lossy", "came from JPEG files"), ("resized", "were resized when they were loaded")):
        shares = {name: getattr(images, attribute) / len(images) for name, images in known.items()}
        if shares and min(shares.values()) < max(shares.values()) / 2:
            seen = ", ".join(f"{share:.0%} of {name}" for name, share in shares.items())
            notes.append(f"of the images, {seen} {what}: part of their distance is due to that")
    if real.features is not None and min(real.count, generated.count) <= real.features.shape[1]:
        notes.append(
            f"frechet_distance of {generated.count} generated and {real.count} real images over "
            f"{real.features.shape[1]} features: a covariance of so few images is singular and the distance biased "
            "upwards; compare it only at equal numbers of images, or see kernel_distance"
        )
    return notes
