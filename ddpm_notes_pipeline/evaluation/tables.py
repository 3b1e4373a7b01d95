"""The results table of `evaluate.py --table`, and what it says: which relations of the papers hold, and how few steps are as good as T.

Bounds of two rows are compared on the same images, so that their difference has a standard error far below either's own. Kernel distances
are compared by the standard errors over sets of samples. A difference counts where it is above two standard errors.
"""

import math
from typing import Any

from ..data import ImageSet
from ..scheduling_ddpm_notes import LEARNED_VARIANCES
from .samples import name_of
from .validation import Row

SURE = 2.0  # standard errors

Key = tuple[str, str, int]  # what makes the samples, path, number of steps


def results_table(rows: list[Row], samples: list[dict[str, Any]], images: ImageSet) -> str:
    """Markdown: the protocol, the table, and the sentences under it."""
    kernels = kernel_distances(samples)
    made = [row for row in samples if row["images"] == "samples"]
    first = rows[0].result
    lines = [
        f"bits/dim: {len(first.per_image)} images of {images.name}, split {images.split}, {first.dims} dims each, ± standard error over images."
    ]
    if made:
        p = made[0]["protocol"]
        lines.append(
            f"Kernel distance x 1000: {p['sampling'].get('sets', 1)} sets of {p['num_generated']} samples against {p['num_real']} images of the split "
            f"{p['split']}, features of {p['network']} ({p['preprocessing']}), ± standard error over the sets; held-out images have {_kernel(samples, 'held-out')}."
        )
    lines += [
        "",
        "| variance | path | K | L_T | sum of KLs | L_0 | total, bits/dim | kernel distance x 1000 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    bounds: set[Key] = set()
    for row in rows:
        r, key = row.result, (row.variance, row.path, row.steps)
        bounds.add(key)
        parts = (
            f"{getattr(r, name):.4f} ± {r.standard_errors[name]:.4f}" for name in ("prior", "diffusion", "decoder")
        )
        cells = [*map(str, key), *parts, f"**{r.total:.4f} ± {r.standard_error:.4f}**", _cell(kernels.get(key))]
        lines.append(f"| {' | '.join(cells)} |")
    for key, kernel in kernels.items():
        if key not in bounds:
            lines.append(f"| {' | '.join(map(str, key))} | - | - | - | no bound | {_cell(kernel)} |")
    return "\n".join([*lines, "", *(f"- {text}" for text in findings(rows, kernels)), ""])


def kernel_distances(samples: list[dict[str, Any]]) -> dict[Key, tuple[float, float]]:
    """Kernel distance and its standard error of each row of samples."""
    found = {}
    for row in samples:
        if row["images"] == "samples":
            network = row["protocol"]["network"]
            found[name_of(row), row["path"], row["num_inference_steps"]] = (
                row[f"kernel_distance ({network})"],
                row[f"kernel_distance_standard_error ({network})"],
            )
    return found


def findings(rows: list[Row], kernels: dict[Key, tuple[float, float]]) -> list[str]:
    """Sentences: each relation, whether it holds in these rows, and where not; then the speed-up at equal quality."""
    table = {(row.variance, row.path, row.steps): row for row in rows}
    said = []
    fixed = [v for v in dict.fromkeys(row.variance for row in rows) if v not in ("optimal", *LEARNED_VARIANCES)]
    pairs = [
        (table["optimal", path, k], table[v, path, k])
        for (name, path, k) in table
        if name == "optimal"
        for v in fixed
        if (v, path, k) in table
    ]
    if pairs:
        said.append(_holds("The optimal variance has the lowest bound of the fixed ones, at every K and path", pairs))
    pairs = [
        (table[v, "best", k], table[v, "even", k])
        for (v, path, k) in table
        if v == "optimal" and path == "best" and (v, "even", k) in table
    ]
    if pairs:
        said.append(_holds("The best K steps have a lower bound than K even ones, with the optimal variance", pairs))
    T = max(row.steps for row in rows)
    pairs = [
        (table[v, "even", T], row)
        for (v, path, k), row in table.items()
        if path == "even" and k < T and (v, path, T) in table
    ]
    if pairs:
        said.append(_holds(f"Of even paths, all {T} steps have the lowest bound, for each variance", pairs))
    return said + [text for text in (_worst_samples(kernels), equal_quality(table, kernels, T)) if text]


def _worst_samples(kernels: dict[Key, tuple[float, float]]) -> str:
    """fixed_large's samples at the fewest steps, against the other variances' (Nichol & Dhariwal, arXiv 2102.09672, section 3.2)."""
    even = {key: value for key, value in kernels.items() if key[1] == "even"}
    if not even:
        return ""
    k = min(key[2] for key in even)
    few = {key[0]: value for key, value in even.items() if key[2] == k}
    if "fixed_large" not in few or len(few) < 2:
        return ""
    large = few.pop("fixed_large")
    close = [f"{name} ({_cell(value)})" for name, value in few.items() if not _above(large, value)]
    text = f"At the fewest steps, K = {k}, fixed_large's samples are the worst"
    return (
        f"{text}: holds ({_cell(large)})."
        if not close
        else f"{text}: does not hold ({_cell(large)}): not worse than {', '.join(close)}."
    )


def equal_quality(table: dict[Key, Row], kernels: dict[Key, tuple[float, float]], T: int) -> str:
    """The fewest steps whose samples, and whose bound where there is one, are no worse than T steps of fixed_large, within error."""
    reference: Key = ("fixed_large", "even", T)
    if reference not in kernels or reference not in table:
        return ""
    both: list[Key] = []
    alone: list[Key] = []
    for key, kernel in sorted(kernels.items(), key=lambda item: item[0][2]):
        if key == reference or _above(kernel, kernels[reference]):
            continue
        if key not in table:
            alone.append(key)
        elif not _is_higher(table[key], table[reference]):
            both.append(key)
    at = f"{T} steps of fixed_large (kernel distance {_cell(kernels[reference])}, {table[reference].result.total:.3f} bits/dim)"

    def told(keys: list[Key], what: str) -> str:
        if not keys:
            return f"{what}: none of these rows"
        name, path, k = keys[0]
        bound = f", {table[keys[0]].result.total:.3f} bits/dim" if keys[0] in table else ""
        return f"{what}: {k} {path} steps of {name} ({_cell(kernels[keys[0]])}{bound}), {T / k:.3g} times fewer"

    return f"No worse than {at}, within {SURE:g} standard errors. {told(both, 'By samples and bound')}. {told(alone, 'By samples alone, other samplers')}."


def _holds(claim: str, pairs: list[tuple[Row, Row]]) -> str:
    """The claim that of each pair the first bound is the lower one, or as low; with the pairs that say otherwise."""
    wrong = [f"{_name(a)} is {_difference(a, b)} above {_name(b)}" for a, b in pairs if _is_higher(a, b)]
    return (
        f"{claim}: holds in {len(pairs)} of {len(pairs)} comparisons."
        if not wrong
        else (f"{claim}: does not hold in {len(wrong)} of {len(pairs)} comparisons: {'; '.join(wrong)}.")
    )


def _paired(a: Row, b: Row) -> tuple[float, float]:
    """Difference of two bounds in bits/dim, and its standard error over the images, which are the same."""
    difference = a.result.per_image - b.result.per_image
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def _is_higher(a: Row, b: Row) -> bool:
    mean, error = _paired(a, b)
    return mean > SURE * error


def _difference(a: Row, b: Row) -> str:
    mean, error = _paired(a, b)
    return f"{mean:.4f} ± {error:.4f}"


def _above(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether one kernel distance is above another by more than their errors."""
    return a[0] - b[0] > SURE * math.hypot(a[1], b[1])


def _name(row: Row) -> str:
    return f"{row.variance} {row.path} {row.steps}"


def _cell(kernel: tuple[float, float] | None) -> str:
    return "" if kernel is None else f"{1000 * kernel[0]:.2f} ± {1000 * kernel[1]:.2f}"


def _kernel(samples: list[dict[str, Any]], images: str) -> str:
    """That of the row of real images, if there is one."""
    for row in samples:
        if row["images"].startswith(images):
            network = row["protocol"]["network"]
            names = (f"kernel_distance ({network})", f"kernel_distance_standard_error ({network})")
            return _cell((row[names[0]], row[names[1]]))
    return "none here"
