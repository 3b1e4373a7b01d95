"""What a table of results says: which relations of the papers hold, the speed-up at equal quality.

Bounds of two rows are compared on the same images, so the standard error of their difference is far
below that of either. Kernel distances are compared by their standard errors over sets of samples. A
difference counts if it exceeds two standard errors.
"""

import math
from collections.abc import Iterable

from ..names import LEARNED_VARIANCES
from .records import Estimate, Key, SampleRecord
from .reports import kernel_text
from .validation import Row

SIGNIFICANT = 2.0  # standard errors


def kernel_distances(samples: Iterable[SampleRecord]) -> dict[Key, Estimate]:
    """Kernel distance and its standard error of each row of samples without guidance.

    Guidance changes the distribution that is sampled: its rows are not compared with these.
    """
    return {row.key: row.kernel for row in samples if row.is_sampled and row.guidance_scale is None}


def findings(rows: list[Row], kernels: dict[Key, Estimate]) -> list[str]:
    """A sentence for each relation, whether it holds and where not, and for the speed-up."""
    table, T = {row.record.key: row for row in rows}, rows[0].T
    fixed = [
        v for v in dict.fromkeys(row.record.variance_type for row in rows) if v not in ("optimal", *LEARNED_VARIANCES)
    ]
    claims = {
        "The optimal variance has the lowest bound of the fixed ones, at every K and path": [
            (("optimal", path, k), (v, path, k)) for name, path, k in table if name == "optimal" for v in fixed
        ],
        "The best K steps have a lower bound than K even ones, with the optimal variance": [
            (("optimal", "best", k), ("optimal", "even", k)) for v, path, k in table if (v, path) == ("optimal", "best")
        ],
        f"Of even paths, all {T} steps have the lowest bound, for each variance": [
            ((v, "even", T), (v, "even", k)) for v, path, k in table if path == "even" and k < T
        ],
    }
    sentences = []
    for claim, keys in claims.items():
        pairs = [(table[a], table[b]) for a, b in keys if a in table and b in table]
        if pairs:
            sentences.append(_verdict(claim, pairs))
    return [*sentences, *filter(None, (_worst_samples(kernels), equal_quality(table, kernels, T)))]


def fewest_steps(kernels: dict[Key, Estimate], T: int) -> Key | None:
    """The fewest steps whose samples are no worse than those of T steps of fixed_large.

    Of rows with equally many, that with the lowest kernel distance. None if no row with fewer is as
    good, or that of T was not sampled.
    """
    return next(iter(_as_good(kernels, T)), None)


def _as_good(kernels: dict[Key, Estimate], T: int) -> list[Key]:
    """Rows of fewer steps with samples no worse than those of the reference, the fewest first."""
    reference: Key = ("fixed_large", "even", T)
    if reference not in kernels:
        return []
    keys = [key for key in kernels if key[2] < T and not _is_above(kernels[key], kernels[reference])]
    return sorted(keys, key=lambda key: (key[2], kernels[key]))


def equal_quality(table: dict[Key, Row], kernels: dict[Key, Estimate], T: int) -> str:
    """The fewest steps whose samples and bound are no worse than those of T steps of fixed_large.

    Empty if that row was not measured.
    """
    reference: Key = ("fixed_large", "even", T)
    if reference not in kernels or reference not in table:
        return ""
    as_good = _as_good(kernels, T)
    with_bound = [key for key in as_good if key in table and not _is_higher(table[key], table[reference])]
    without = [key for key in as_good if key not in table]

    def fewest(keys: list[Key], what: str) -> str:
        if not keys:
            return f"{what}: none of these rows"
        name, path, k = keys[0]
        bound = f", {table[keys[0]].result.total:.3f} bits/dim" if keys[0] in table else ""
        return f"{what}: {k} {path} steps of {name} ({kernel_text(kernels[keys[0]])}{bound}), {T / k:.3g} times fewer"

    bound = f"{table[reference].result.total:.3f} bits/dim"
    return (
        f"No worse than {T} steps of fixed_large (kernel distance {kernel_text(kernels[reference])}, {bound}), "
        f"within {SIGNIFICANT:g} standard errors. {fewest(with_bound, 'By samples and bound')}. "
        f"{fewest(as_good, 'By samples alone')}. "
        f"{fewest(without, 'By samples alone, other samplers')}."
    )


def _worst_samples(kernels: dict[Key, Estimate]) -> str:
    """Whether fixed_large has the worst samples at the fewest steps (arXiv 2102.09672, 3.2)."""
    even = {key: kernel for key, kernel in kernels.items() if key[1] == "even"}
    k = min((key[2] for key in even), default=0)
    few = {key[0]: kernel for key, kernel in even.items() if key[2] == k}
    if "fixed_large" not in few or len(few) < 2:
        return ""
    large = few.pop("fixed_large")
    close = [f"{name} ({kernel_text(kernel)})" for name, kernel in few.items() if not _is_above(large, kernel)]
    claim = f"At the fewest steps, K = {k}, fixed_large's samples are the worst"
    if not close:
        return f"{claim}: holds ({kernel_text(large)})."
    return f"{claim}: does not hold ({kernel_text(large)}): not worse than {', '.join(close)}."


def _verdict(claim: str, pairs: list[tuple[Row, Row]]) -> str:
    """Whether in each pair the first bound is not above the second, and the pairs where it is."""
    against = []
    for a, b in pairs:
        if _is_higher(a, b):
            mean, error = _difference(a, b)
            names = (" ".join(map(str, row.record.key)) for row in (a, b))
            against.append(f" is {mean:.4f} ± {error:.4f} above ".join(names))
    if not against:
        return f"{claim}: holds in {len(pairs)} of {len(pairs)} comparisons."
    return f"{claim}: does not hold in {len(against)} of {len(pairs)} comparisons: {'; '.join(against)}."


def _difference(a: Row, b: Row) -> Estimate:
    """Difference of two bounds in bits/dim, and its standard error over their common images."""
    difference = a.result.per_image - b.result.per_image
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def _is_higher(a: Row, b: Row) -> bool:
    mean, error = _difference(a, b)
    return mean > SIGNIFICANT * error


def _is_above(a: Estimate, b: Estimate) -> bool:
    return a[0] - b[0] > SIGNIFICANT * math.hypot(a[1], b[1])
