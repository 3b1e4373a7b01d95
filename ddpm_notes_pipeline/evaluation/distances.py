"""Distances between two sets of feature vectors or pixels.

For features a (N, d) and b (M, d):

    Frechet    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))                arXiv 1706.08500
    kernel     E k(a, a') + E k(b, b') - 2 E k(a, b),  k(x, y) = (x.y / d + 1)^3  arXiv 1801.01401
    precision  share of generated inside the k-nearest-neighbour balls of real    arXiv 1904.06991
    recall     share of real inside those of generated

The Frechet distance is biased by the numbers of images. The kernel distance is unbiased and has a
standard error. Statistics are computed in float64. A set's own sums of k and its balls are kept
with it: real images are compared with many sets of samples.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import nn

from .features import import_eval

NEIGHBORS = 3  # k of precision and recall, as published
SUBSETS = 10  # of the jackknife
CHUNK_ROWS = 1024  # rows of a distance matrix at a time


class FeatureSet:
    """Features of a set of images in float64, with its sums of k and its balls, found once.

    Args:
        features: (N, d).
        seed: of the random subsets of `kernel_distance`. Sets that are compared must have different
            ones.
    """

    def __init__(self, features: torch.Tensor, seed: int) -> None:
        self.features = features.double()
        self._order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        self._sums_by_number: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    def subsets(self, n: int) -> list[torch.Tensor]:
        """The features in n disjoint random subsets."""
        return [self.features[rows] for rows in self._order.tensor_split(n)]

    def kernel_sums(self, n: int) -> torch.Tensor:
        """Sums of k over pairs of images of subsets i and j, none with itself: (n, n)."""
        if n not in self._sums_by_number:
            subsets = self.subsets(n)
            self._sums_by_number[n] = _kernel_sums(subsets, subsets)
        return self._sums_by_number[n]

    @cached_property
    def squared_radii(self) -> torch.Tensor:
        """(N,), of the balls around the features, which reach to the k-th nearest other."""
        distances = _squared_distances(self.features, self.features)
        # NEIGHBORS + 1: the nearest point is the point itself
        return torch.cat([squared.kthvalue(NEIGHBORS + 1, dim=1).values for squared in distances])


def frechet_distance(a: FeatureSet, b: FeatureSet) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    Computed by torchmetrics in float64. Both must have at least 2 images. With no more images than
    features a covariance is singular and the distance is biased upwards.
    """
    features_as_given = nn.Identity()
    features_as_given.num_features = a.features.shape[1]  # type: ignore[assignment]
    # Every process already has all features: the metric must not gather them again.
    metric = import_eval("torchmetrics.image.fid").FrechetInceptionDistance(
        feature=features_as_given, sync_on_compute=False
    )
    for one, real in ((a, True), (b, False)):
        for rows in one.features.cpu().split(CHUNK_ROWS):
            metric.update(rows, real=real)
    return max(0.0, float(metric.compute()))  # rounding can make it negative for equal sets


def kernel_distance(a: FeatureSet, b: FeatureSet, subsets: int = SUBSETS) -> tuple[float, float]:
    """Unbiased squared MMD of two sets of features, and its standard error.

    All pairs count. The standard error is the jackknife's: both sets are split at random (by their
    seeds) into disjoint subsets, and the distances that leave one of them out are compared. It is
    right where the sets differ and up to sqrt(2) too large where they do not. The usual deviation
    over overlapping random subsets shrinks to zero as the subsets grow.

    Raises:
        ValueError: fewer than 3 images on either side, or fewer than 2 subsets.
    """
    fewest = min(len(a), len(b))
    parts = min(subsets, fewest)
    if parts < 2 or fewest - math.ceil(fewest / parts) < 2:
        raise ValueError(f"{len(a)} and {len(b)} images in {subsets} subsets; must be at least 3 images and 2 subsets")
    x, y = a.subsets(parts), b.subsets(parts)
    within_x, within_y, between = a.kernel_sums(parts), b.kernel_sums(parts), _kernel_sums(x, y)
    sizes_x, sizes_y = (torch.tensor([len(part) for part in f], dtype=torch.float64) for f in (x, y))

    def distance(kept: torch.Tensor) -> float:
        n, m = sizes_x[kept].sum(), sizes_y[kept].sum()
        xx, yy, xy = (sums[kept][:, kept].sum() for sums in (within_x, within_y, between))
        return float(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))

    without_one = torch.tensor([distance(torch.arange(parts) != i) for i in range(parts)], dtype=torch.float64)
    error = math.sqrt(parts - 1) * float(without_one.std(correction=0))
    return distance(torch.ones(parts, dtype=torch.bool)), error


def _kernel_sums(x: list[torch.Tensor], y: list[torch.Tensor]) -> torch.Tensor:
    """Sum of k over all pairs of subsets i of x and j of y: (len(x), len(y)) float64.

    Where `y is x`, pairs of an image with itself do not count.
    """
    polynomial = import_eval("torchmetrics.image.kid").poly_kernel  # degree 3, gamma 1 / d, coefficient 1
    same = y is x
    sums = torch.zeros(len(x), len(y), dtype=torch.float64)
    for i, f in enumerate(x):
        for j, g in enumerate(y[: i + 1] if same else y):
            sums[i, j] = torch.stack([polynomial(rows, g).sum() for rows in f.split(CHUNK_ROWS)]).sum().cpu()
            if same:
                sums[j, i] = sums[i, j]
        if same:
            sums[i, i] -= ((f.square().sum(1) / f.shape[1] + 1) ** 3).sum().cpu()
    return sums


def precision_recall(real: FeatureSet, generated: FeatureSet) -> tuple[float, float]:
    """Precision and recall of generated features beside real ones.

    Precision is the share of generated features inside the real manifold, recall the share of real
    ones inside the generated manifold. A manifold is the union of balls around its points, each
    reaching to the k-th nearest other point.

    Raises:
        ValueError: k = 3 or fewer images on either side.
    """
    if min(len(real), len(generated)) <= NEIGHBORS:
        more = f"must be more than k = {NEIGHBORS} on either side"
        raise ValueError(f"{len(real)} and {len(generated)} images in precision and recall; {more}")

    def share_inside(points: FeatureSet, manifold: FeatureSet) -> float:
        distances = _squared_distances(points.features, manifold.features)
        return float(torch.cat([(squared <= manifold.squared_radii).any(1) for squared in distances]).double().mean())

    return share_inside(generated, real), share_inside(real, generated)


def nearest_rows(points: torch.Tensor, chunks: Iterable[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance of points (N, d) to the nearest row of all chunks, and that row's number.

    Args:
        chunks: number of the first row, and the rows (M, d).

    Returns:
        (N,) float64, infinite where there are no chunks, and (N,) int64, then -1.
    """
    points = points.double()
    nearest = torch.full((len(points),), math.inf, dtype=torch.float64, device=points.device)
    number = torch.full((len(points),), -1, device=points.device)
    for first, chunk in chunks:
        for squared in _squared_distances(chunk.to(points.device), points):
            lowest, row = squared.min(0)
            number = torch.where(lowest < nearest, first + row, number)
            nearest = torch.minimum(nearest, lowest)
            first += len(squared)
    return nearest, number


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """|a_i - b_j|^2 in float64, some rows i at a time. Exact for 8-bit pixels: sums of integers."""
    b = b.double()
    norms = b.square().sum(1)
    for rows in a.split(CHUNK_ROWS):
        rows = rows.double()
        yield (rows.square().sum(1, keepdim=True) + norms - 2 * (rows @ b.T)).clamp(min=0)
