"""The tables of bounds and of samples, with the same columns for a terminal and for Markdown."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from .records import BoundRecord, Estimate, Evaluation, FewestSteps, SampleMetrics, SampleRecord, of_classes
from .yardsticks import verdict


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head. cell: a record's text in it. width: of its cells in a terminal.
    """

    name: str
    cell: Callable[[Any], str]
    width: int


def markdown(columns: Sequence[Column], records: Iterable[Any]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = ["|".join(["", *(f" {column.name} " for column in columns), ""]), f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(column.cell(record) for column in columns)} |" for record in records]
    return "\n".join(lines)


def text_header(columns: Sequence[Column]) -> str:
    """Heads of the columns and a rule, for a terminal."""
    names = " | ".join(f"{column.name:>{column.width}}" for column in columns)
    return names + "\n" + "-+-".join("-" * column.width for column in columns)


def text_line(columns: Sequence[Column], record: Any) -> str:
    """One row, for a terminal."""
    return " | ".join(f"{column.cell(record):>{column.width}}" for column in columns)


# ------------------------------------------------------------ bounds


def bound_columns(digits: int = 4, emphasis: str = "") -> list[Column]:
    """Variance, path, K, the three parts and their total in bits/dim, with standard errors.

    `emphasis` is put around the totals.
    """

    def part(name: str) -> Callable[[BoundRecord], str]:
        return lambda row: f"{getattr(row, name):.{digits}f} ± {row.standard_errors[name]:.{digits}f}"

    return [
        Column("variance", lambda row: row.variance_type, 13),
        Column("path", lambda row: row.path, 4),
        Column("K", lambda row: str(row.num_inference_steps), 5),
        Column("L_T", part("prior"), 17),
        Column("sum of KLs", part("diffusion"), 19),
        Column("L_0", part("decoder"), 17),
        Column(
            "total, bits/dim",
            lambda row: f"{emphasis}{row.total:.{digits}f} ± {row.standard_error:.{digits}f}{emphasis}",
            19,
        ),
    ]


def _decoder_cell(row: BoundRecord) -> str:
    if row.decoder_variance is not None:
        return f"{row.decoder_variance:.3e}"
    return "levels" if row.decoder_type == "levels" else "network's"


TERMINAL_COLUMNS = [
    *bound_columns(digits=5),
    Column("decoder var", _decoder_cell, 11),
    Column("evaluations", lambda row: str(row.network_evaluations), 11),
]


def bound_table(evaluation: Evaluation) -> str:
    """The bounds as a Markdown table, below the headline if there is one."""
    table = markdown(bound_columns(emphasis="**"), evaluation.results)
    return f"{headline_text(evaluation)}\n\n{table}" if evaluation.headline else table


def headline_text(evaluation: Evaluation) -> str:
    """One sentence: the headline and its parts; empty without one."""
    row = evaluation.headline
    if row is None:
        return ""
    return (
        f"{row.name}, {row.images} images: **{row.total:.4f} ± {row.standard_error:.4f} bits/dim** (L_T {row.prior:.4f}, "
        f"sum of KLs {row.diffusion:.4f}, L_0 {row.decoder:.4f})."
    )


def yardstick_text(evaluation: Evaluation) -> str:
    """Two lines: the yardsticks, and which of them `best` beats; empty without any."""
    if not evaluation.yardsticks:
        return ""
    best, codes = evaluation.best, ", ".join(f"{name} {bits:.3f}" for name, bits in evaluation.yardsticks.items())
    return (
        f"Yardsticks, bits/dim of simple codes for the same images: {codes}.\n"
        f"{best.name}, {best.total:.3f}: {verdict(evaluation.yardsticks, best.total, best.standard_error)}"
    )


# ------------------------------------------------------------ samples


def kernel_text(kernel: Estimate) -> str:
    """A kernel distance x 1000 with its standard error."""
    return f"{1000 * kernel[0]:.2f} ± {1000 * kernel[1]:.2f}"


def _figure_column(figure: Field) -> Column:
    def cell(row: SampleRecord) -> str:
        value = getattr(row.metrics, figure.name)
        return "" if value is None else format(value, figure.metadata["form"])

    return Column(figure.metadata["head"], cell, 9)


SAMPLE_COLUMNS = [
    Column("images", lambda row: row.source, 13),
    Column("guidance", lambda row: "" if row.guidance_scale is None else f"{row.guidance_scale:g}", 8),
    Column("path", lambda row: row.path or "", 8),
    Column("K", lambda row: str(row.num_inference_steps or ""), 5),
    Column("n", lambda row: str(row.metrics.protocol.num_generated), 6),
    Column("kernel distance", lambda row: "{:.5f} ± {:.5f}".format(*row.kernel), 19),
    *(_figure_column(figure) for figure in fields(SampleMetrics) if figure.metadata.get("head")),
]


def sample_columns(records: Sequence[SampleRecord]) -> list[Column]:
    """Those with something in them: not every model has classes."""
    return [column for column in SAMPLE_COLUMNS if any(column.cell(record) for record in records)]


def sample_caption(records: Sequence[SampleRecord]) -> str:
    """What the table of samples shows, and how it was measured."""
    metrics, held_out = records[-1].metrics, not records[0].is_sampled
    protocol, nearest = metrics.protocol, metrics.nearest_train_distance is not None
    distance = ", and the median distance to the nearest training image," if nearest else ""
    precision = protocol.sampling.get("mixed_precision")
    copies = ": samples much nearer than held-out images are copies" if nearest and held_out else ""
    sentences = [
        f"Distances from {protocol.num_real} images of {protocol.real}{of_classes(protocol.classes)}, split {protocol.split}, "
        f"over {protocol.num_features} features of {protocol.network} (no Inception: no FID); {protocol.preprocessing}.",
        "Perfect samples would get the row of held-out images." if held_out else "",
        f"The network computed samples in {precision} mixed precision." if precision else "",
        "Kernel distances compare at any n, Frechet distances only at equal n.",
        f"The errors of each pixel's mean and variance{distance} are root mean squares over pixels in [0, 1]{copies}.",
    ]
    if protocol.classifier:
        sentences.append(
            f"Class acc is the share of images that a {protocol.classifier} reads as the class that they were asked for "
            "(the idea of GAN-test, arXiv 1807.09499)."
        )
    return " ".join(filter(None, sentences))


def fewest_steps_text(fewest: FewestSteps) -> str:
    """One sentence: the fewest steps at equal quality."""
    ours = kernel_text((fewest.kernel_distance, fewest.standard_error))
    theirs = kernel_text((fewest.reference_kernel_distance, fewest.reference_standard_error))
    return (
        f"The fewest steps at equal quality: {fewest.num_inference_steps} {fewest.path} steps of {fewest.name}, kernel "
        f"distance x 1000 {ours}, no worse than {fewest.reference_steps} steps of fixed_large, {theirs}, within two "
        f"standard errors; {fewest.reference_steps / fewest.num_inference_steps:.3g} times fewer."
    )


def nearest_text(evaluation: Evaluation) -> str:
    """One sentence: how near training images are to samples and to held-out images.

    Of the samples with the lowest kernel distance; empty if nothing was held out.
    """
    row = evaluation.nearest_samples
    if row is None or not row.metrics.nearest_train_distance or not row.metrics.held_out_nearest_train_distance:
        return ""
    ours, theirs = row.metrics.nearest_train_distance, row.metrics.held_out_nearest_train_distance
    return (
        f"The median distance to the nearest training image is {ours:.4f} for samples of {row.name}, "
        f"{row.num_inference_steps} {row.path} steps, and {theirs:.4f} for held-out images: {ours / theirs:.2f} times as "
        "far. Copies would be far below 1."
    )


def sample_text(records: Sequence[SampleRecord]) -> str:
    """Caption and table for a terminal."""
    columns = sample_columns(records)
    lines = (text_line(columns, record) for record in records)
    return "\n".join([textwrap.fill(sample_caption(records), 120), text_header(columns), *lines])


def sample_table(records: Sequence[SampleRecord]) -> str:
    """The samples as a Markdown table."""
    return markdown(sample_columns(records), records)
