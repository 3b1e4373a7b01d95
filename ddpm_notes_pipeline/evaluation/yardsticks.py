"""What a number of bits/dim has to beat: simple codes for the same images.

Histograms are of the model's own training images; a level that is rare in a context is smoothed
towards the level's share in the whole channel, by as much as codes the training images best when
each is left out in turn. So each of them is a code that could be sent. xz, PNG and WebP see the
images alone.
"""

import io
import lzma
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from ..core.levels import NUM_LEVELS
from ..data import ImageSet
from .pixel_batches import ONE_SHAPE, uint8_batches

MOST_DIMS = 2**15  # up to which every pixel gets a histogram of its own (64 MB of counts)
NEIGHBOUR_EDGES = torch.tensor([1, 64, 128, 192, 255])  # black, four greys, white
MOST_TRAINING_PIXELS = 2**26  # that `image_yardsticks` counts
BATCH = 256  # images that `image_yardsticks` reads at once
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass
class Yardsticks:
    """bits/dim of simple codes.

    Attributes:
        bits: by name, from the simplest to the best informed; a code that was not tried is absent.
        num_images: how many were coded. num_training_images: how many the histograms are of.
    """

    bits: dict[str, float]
    num_images: int
    num_training_images: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {bits:.3f}" for name, bits in self.bits.items())

    def verdict(self, bits: float, error: float = 0.0) -> str:
        """`verdict` on these codes."""
        return verdict(self.bits, bits, error)


def verdict(yardsticks: Mapping[str, float], bits: float, error: float = 0.0) -> str:
    """One sentence: which of some codes (bits/dim by name) a number of bits/dim beats, which not.

    Args:
        error: standard error of `bits`. Closer than two of them is neither.
    """
    if not math.isfinite(error):  # of a single image
        error = 0.0
    groups: dict[str, list[str]] = {"fewer bits than": [], "not fewer than": [], "within two standard errors of": []}
    beaten, better, close = groups.values()
    for name, other in yardsticks.items():
        if bits + 2 * error < other:
            beaten.append(name)
        else:
            (better if bits - 2 * error >= other else close).append(f"{name} ({other:.3f})")
    if len(beaten) == len(yardsticks):
        return f"Fewer bits than each of {len(beaten)} simple codes."
    if len(better) == len(yardsticks):
        return f"More bits than each of {len(better)} simple codes."
    text = "; ".join(f"{words} {', '.join(names)}" for words, names in groups.items() if names)
    return f"{text[0].upper()}{text[1:]}."


class Histogram:
    """A histogram of the 256 levels in each of some contexts.

    Args:
        contexts: how many.
    """

    def __init__(self, contexts: int) -> None:
        self.counts = torch.zeros(contexts, NUM_LEVELS, dtype=torch.int64)

    def add(self, context: torch.Tensor, level: torch.Tensor) -> None:
        """Count levels (...), int64, in their contexts (...)."""
        cells = (context * NUM_LEVELS + level).flatten()
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).reshape(self.counts.shape)

    def shares(self, parent: torch.Tensor) -> torch.Tensor:
        """(contexts, 256) probabilities: (count + strength parent) / (total + strength).

        The strength is that of a few which codes each counted pixel best without itself.

        Args:
            parent: (contexts, 256) probabilities, above 0.
        """
        counts = self.counts.double()
        total = counts.sum(1, keepdim=True)

        def bits(strength: float) -> float:
            without = (counts - 1 + strength * parent) / (total - 1 + strength)
            return -float((counts * without.clamp(min=1e-300).log2())[counts > 0].sum())

        strength = min((2.0**i for i in range(-2, 13)), key=bits)
        return (counts + strength * parent) / (total + strength)


class Contexts:
    """The histograms of one size of images: of a channel, of a pixel, of a pixel's neighbours."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.shape = channels, height, width
        bins = len(NEIGHBOUR_EDGES) + 1
        self.histograms = {"one histogram": Histogram(channels)}
        if channels * height * width <= MOST_DIMS:
            self.histograms["independent pixels"] = Histogram(channels * height * width)
        self.histograms["neighbours"] = Histogram(channels * bins**4)

    def of(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each pixel's context in each kind of histogram, int64 that broadcasts to (B, C, H, W).

        The neighbours are those west, north-west, north and north-east, which come before a pixel;
        outside the image they are black.
        """
        C, H, W = self.shape
        channel = torch.arange(C).reshape(C, 1, 1)
        bins = len(NEIGHBOUR_EDGES) + 1
        coarse = F.pad(torch.bucketize(pixels.long(), NEIGHBOUR_EDGES, right=True), (1, 1, 1, 0))
        north = [coarse[:, :, :H, i : i + W] for i in range(3)]
        neighbours = channel
        for neighbour in (coarse[:, :, 1:, :W], *north):
            neighbours = neighbours * bins + neighbour
        everywhere = torch.arange(C * H * W).reshape(C, H, W)
        return {"one histogram": channel, "independent pixels": everywhere, "neighbours": neighbours}

    def add(self, pixels: torch.Tensor) -> None:
        contexts = self.of(pixels)
        for name, histogram in self.histograms.items():
            histogram.add(contexts[name].expand(pixels.shape), pixels.long())

    def code_lengths(self) -> dict[str, torch.Tensor]:
        """(contexts, 256) bits of each level, by kind of histogram."""
        flat = torch.full((self.shape[0], NUM_LEVELS), 1 / NUM_LEVELS, dtype=torch.float64)
        channel = self.histograms["one histogram"].shares(flat)
        lengths = {}
        for name, histogram in self.histograms.items():
            parent = flat if name == "one histogram" else channel
            repeated = parent.repeat_interleave(len(histogram.counts) // len(parent), 0)
            lengths[name] = -histogram.shares(repeated).log2()
        return lengths


def measure_yardsticks(training: Iterable[torch.Tensor], images: Iterable[torch.Tensor]) -> Yardsticks:
    """Code images with histograms of the training images, and with common compressors.

    Args:
        training, images: batches of uint8 (B, C, H, W), all of one size.

    Raises:
        ValueError: no images.
    """
    contexts, num_training = None, 0
    for pixels in training:
        contexts = contexts or Contexts(*pixels.shape[1:])
        contexts.add(pixels)
        num_training += len(pixels)
    if contexts is None:
        raise ValueError("training is empty; it must have at least one image")
    lengths = contexts.code_lengths()
    bits = dict.fromkeys(("uniform over the levels that occur", *lengths, "xz", "PNG", "WebP"), 0.0)
    xz, num_images = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME), 0
    for pixels in images:
        places = contexts.of(pixels)
        for name, table in lengths.items():
            bits[name] += float(table[places[name].expand(pixels.shape), pixels.long()].sum())
        bits["xz"] += 8 * len(xz.compress(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes()))
        for image in pixels:
            for name, size in compressed_sizes(image).items():
                bits[name] += 8 * size
        num_images += len(pixels)
    if not num_images:
        raise ValueError("images is empty; it must have at least one image")
    bits["xz"] += 8 * len(xz.flush())
    dims = num_images * math.prod(contexts.shape)
    bits = {name: total / dims for name, total in bits.items()}
    occurring = (contexts.histograms["one histogram"].counts > 0).sum(1).double()
    bits["uniform over the levels that occur"] = float(occurring.log2().mean())
    return Yardsticks(bits, num_images, num_training)


def image_yardsticks(training: ImageSet, images: ImageSet) -> Yardsticks:
    """`measure_yardsticks` of two sets. Not collective: for the main process alone.

    Histograms are of 2^26 pixel values of the training set at most, of evenly spaced images.

    Raises:
        ValueError: sets of different shapes, or an empty one.
    """
    shapes = [(one.channels, *one.size) for one in (training, images)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"training has images (C, H, W) of {shapes[0]} and images of {shapes[1]}; {ONE_SHAPE}")
    counted = training.at_most(max(1, MOST_TRAINING_PIXELS // training.dims))
    return measure_yardsticks(uint8_batches("training", counted, BATCH), uint8_batches("images", images, BATCH))


def compressed_sizes(image: torch.Tensor) -> dict[str, int]:
    """Bytes of the PNG and the lossless WebP file of a uint8 image (C, H, W)."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy(), MODES[len(image)])
    png, webp = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    picture.save(webp, "WebP", lossless=True, exact=True, method=6)  # exact: the colour of transparent pixels, too
    return {"PNG": png.tell(), "WebP": webp.tell()}
