"""table.md, the results of `evaluate.py --table`: the bounds, their samples, and the findings."""

from .findings import findings, kernel_distances
from .records import BoundRecord, Evaluation
from .reports import Column, bound_columns, headline_text, kernel_text, markdown, yardstick_text
from .validation import Row


def results_table(rows: list[Row], evaluation: Evaluation) -> str:
    """Markdown: the protocol, the table, and the sentences below it."""
    kernels = kernel_distances(evaluation.samples)
    caption = [f"bits/dim: {evaluation.protocol}; ± standard error over images."]
    if evaluation.samples:
        caption.append(_kernel_caption(evaluation))

    def kernel(row: BoundRecord) -> str:
        return kernel_text(kernels[row.key]) if row.key in kernels else ""

    columns = [*bound_columns(emphasis="**"), Column("kernel distance x 1000", kernel, 0)]
    lines = [markdown(columns, evaluation.results)]
    with_bound = {row.key for row in evaluation.results}
    for key, value in kernels.items():
        if key not in with_bound:
            lines.append(f"| {' | '.join(map(str, key))} | - | - | - | no bound | {kernel_text(value)} |")
    headline = filter(None, [headline_text(evaluation)])
    sentences = [*headline, *yardstick_text(evaluation).splitlines(), *findings(rows, kernels)]
    return "\n".join([*caption, "", *lines, "", *(f"- {text}" for text in sentences), ""])


def _kernel_caption(evaluation: Evaluation) -> str:
    protocol = evaluation.samples[0].metrics.protocol
    sets = {row.metrics.protocol.sampling.get("sets", 1) for row in evaluation.samples}
    precision = protocol.sampling.get("mixed_precision")
    precise = f", made in {precision} mixed precision," if precision else ""
    single, within = (" (one set at T)", ", or the jackknife's within one") if len(sets) > 1 else ("", "")
    held_out = [f"; held-out images have {kernel_text(row.kernel)}" for row in evaluation.metrics if not row.is_sampled]
    return (
        f"Kernel distance x 1000: {max(sets)} sets{single} of {protocol.num_generated} samples{precise} against "
        f"{protocol.num_real} images of the split {protocol.split}, features of {protocol.network} "
        f"({protocol.preprocessing}), ± standard error over the sets{within}{''.join(held_out)}."
    )
