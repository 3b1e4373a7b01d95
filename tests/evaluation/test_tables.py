"""The results table: its numbers are the measured ones, its sentences follow from them."""

import pytest
import torch

from ddpm_notes_pipeline.evaluation.findings import equal_quality, fewest_steps, findings, kernel_distances
from ddpm_notes_pipeline.evaluation.records import BoundRecord, Evaluation, MetricProtocol, SampleMetrics, SampleRecord
from ddpm_notes_pipeline.evaluation.tables import results_table
from ddpm_notes_pipeline.evaluation.validation import Row
from ddpm_notes_pipeline.pipeline_ddpm_notes import BitsPerDimOutput
from tests.evaluation.test_evaluate import EVALUATE, SAMPLES, results, save_model, save_network
from tests.support.launching import ROOT, launch, once

SETS = 2


def row(variance, path, steps, total, spread=0.1, T=100):
    """Four images whose bounds are `total` on average; images differ far more than rows."""
    own = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * spread / 100
    parts = torch.stack([torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0]) - 2.5 + total + own, torch.zeros(4)], 1)
    result = BitsPerDimOutput.from_parts(parts.double(), torch.zeros(T), 64, 1)
    names = {"variance_type": variance, "path": path, "num_inference_steps": steps}
    return Row(BoundRecord.from_dict({**result, **names}), result)


def test_relations_that_hold_and_that_do_not():
    rows = [
        row("fixed_small", "even", 10, 9.0),
        row("fixed_small", "even", 100, 4.0),
        row("optimal", "even", 10, 5.0),
        row("optimal", "best", 10, 5.5),
        row("optimal", "even", 100, 3.9),
    ]
    optimal, best, whole = findings(rows, {})
    assert "optimal variance" in optimal and "holds in 2 of 2" in optimal
    assert "does not hold in 1 of 1" in best and "optimal best 10 is 0.5000 ± 0.0000 above optimal even 10" in best
    assert "all 100 steps" in whole and "holds in 2 of 2" in whole


def test_nothing_is_said_of_all_steps_where_they_were_not_measured():
    """The largest K of the table was called "all 50 steps"."""
    rows = [row("optimal", "even", 10, 9.0), row("optimal", "even", 50, 4.0), row("fixed_large", "even", 50, 5.0)]
    kernels = {("fixed_large", "even", 50): (0.1, 0.01), ("optimal", "even", 10): (0.1, 0.01)}
    assert not [text for text in findings(rows, kernels) if "steps have the lowest" in text or "No worse than" in text]


def table_with_samples(held_out=False, **sampling):
    """Of one row, whose samples were made so."""
    protocol = MetricProtocol(num_generated=8, num_real=9, image_shape=[1, 8, 8], sampling=sampling)
    metrics = SampleMetrics(protocol, kernel_distance=0.1, kernel_distance_standard_error=0.01)
    rows = [row("fixed_small", "even", 10, 4.0)]
    settings = {"data": "digits", "split": "train", "images": 4, "dims": 64, "results": [rows[0].record]}
    samples = [SampleRecord("samples", metrics, "fixed_small", path="even", num_inference_steps=10)]
    first = [SampleRecord("held-out test", metrics)] if held_out else []
    return results_table(rows, Evaluation(**settings, metrics=[*first, *samples]))


def test_the_caption_says_nothing_of_held_out_images_where_there_are_none():
    assert "held-out" not in table_with_samples()
    assert "over the sets; held-out images have 100.00 ± 10.00." in table_with_samples(held_out=True)


def test_the_caption_says_so_if_samples_were_made_in_mixed_precision():
    assert "of 8 samples against" in table_with_samples()
    assert "of 8 samples, made in bf16 mixed precision, against" in table_with_samples(mixed_precision="bf16")


def test_differences_within_two_standard_errors_do_not_count():
    """Alternating signs: the difference has the mean 0.001 and the standard error 0.00058."""
    a, b = row("optimal", "even", 10, 5.001), row("fixed_small", "even", 10, 5.0, spread=0.2)
    assert "holds in 1 of 1" in findings([a, b], {})[0]
    c = row("optimal", "even", 10, 5.002)
    assert "does not hold" in findings([c, b], {})[0]


def test_samples_at_the_fewest_steps():
    kernels = {("fixed_large", "even", 10): (0.5, 0.01), ("fixed_small", "even", 10): (0.3, 0.01)}
    assert findings([row("fixed_small", "even", 100, 4.0)], kernels)[-1].endswith("holds (500.00 ± 10.00).")
    kernels["optimal", "even", 10] = (0.49, 0.01)
    said = findings([row("fixed_small", "even", 100, 4.0)], kernels)[-1]
    assert "does not hold" in said and "not worse than optimal (490.00 ± 10.00)" in said and "fixed_small" not in said


def test_equal_quality_wants_both_and_takes_the_fewest_steps():
    rows = [
        row("fixed_large", "even", 1000, 4.0),
        row("optimal", "best", 25, 4.5),
        row("optimal", "best", 50, 3.9),
        row("optimal", "even", 100, 3.8),
    ]
    table = {r.record.key: r for r in rows}
    kernels = {
        ("fixed_large", "even", 1000): (0.10, 0.01),
        ("optimal", "best", 25): (0.10, 0.01),  # good samples, but its bound is higher
        ("optimal", "best", 50): (0.12, 0.01),
        ("optimal", "even", 100): (0.09, 0.01),
        ("DDIM", "trailing", 10): (0.20, 0.01),
        ("DDIM", "trailing", 20): (0.11, 0.01),
    }
    said = equal_quality(table, kernels, 1000)
    assert "By samples and bound: 50 best steps of optimal (120.00 ± 10.00, 3.900 bits/dim), 20 times fewer" in said
    assert "other samplers: 20 trailing steps of DDIM (110.00 ± 10.00), 50 times fewer" in said
    assert "By samples alone: 20 trailing steps of DDIM (110.00 ± 10.00), 50 times fewer" in said
    assert fewest_steps(kernels, 1000) == ("DDIM", "trailing", 20)
    kernels["fixed_small", "even", 20] = (0.105, 0.01)  # as many steps, and nearer
    assert fewest_steps(kernels, 1000) == ("fixed_small", "even", 20)
    kernels["fixed_small", "even", 2] = (0.10 + 2 * 2**0.5 * 0.01 + 1e-6, 0.01)  # just above two standard errors
    assert fewest_steps(kernels, 1000) == ("fixed_small", "even", 20)
    kernels["fixed_small", "even", 2] = (0.10 + 2 * 2**0.5 * 0.01 - 1e-6, 0.01)
    assert fewest_steps(kernels, 1000) == ("fixed_small", "even", 2)
    del kernels["fixed_large", "even", 1000]
    assert fewest_steps(kernels, 1000) is None
    assert equal_quality(table, kernels, 1000) == ""


def made(folder):
    save_model(folder)
    network = save_network(folder.with_name(f"{folder.name}-small-vit"))
    config = ROOT / "training" / "configs" / "digits.yaml"
    command = ["--model", folder, "--config", config, "--table", "--evaluations_per_image", 6, "--max_images", 21]
    command += ["--metric_images", SAMPLES, "--metric_sets", SETS, "--metric_network", network]
    return launch(*command, script=EVALUATE)


@pytest.mark.slow
def test_one_command_makes_the_table():
    folder, done = once("table", made)
    text, written = (folder / "table.md").read_text(), results(folder)
    assert text in done.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    cells = {(row[0], row[1], int(row[2])): row[3:] for row in rows[1:]}
    variances, T = ("fixed_small", "fixed_large", "optimal"), 40
    bounds = {(v, path, k) for v in variances for path in ("even", "best") for k in (10, 25)}
    bounds |= {(v, "even", T) for v in variances}
    others = {(name, "trailing", k) for name in ("DDIM", "DPM-Solver++") for k in (10, 25)}
    assert set(cells) == bounds | others and len(rows) == 1 + len(cells)
    for row in written["results"]:
        found = cells[row["variance_type"], row["path"], row["num_inference_steps"]]
        assert found[3] == f"**{row['total']:.4f} ± {row['standard_error']:.4f}**"
    kernels = kernel_distances(Evaluation.read(folder).metrics)
    assert set(kernels) == {k for k in bounds if k[2] != T and (k[1] == "even" or k[0] == "optimal")} | others | {
        ("fixed_large", "even", T)
    }
    for key, (mean, error) in kernels.items():
        assert cells[key][-1] == f"{1000 * mean:.2f} ± {1000 * error:.2f}"
    assert f"{SETS} sets (one set at T) of {SAMPLES} samples" in text
    sampled = [row for row in written["metrics"] if row["images"] == "samples"]
    (reference,) = (row for row in sampled if row["num_inference_steps"] == T)
    assert "kernel_distance of each set" not in reference
    assert reference["protocol"]["sampling"]["seeds"] == f"0..{SAMPLES - 1}, one an image"
    for row in sampled:
        if row is reference:
            continue
        first, second = row["kernel_distance of each set"]
        network = row["protocol"]["network"]
        assert row[f"kernel_distance ({network})"] == pytest.approx((first + second) / 2)
        assert row[f"kernel_distance_standard_error ({network})"] == pytest.approx(abs(first - second) / 2)
        assert row["protocol"]["sampling"]["seeds"] == f"0..{SETS * SAMPLES - 1}, one an image"
    assert {row["decoder_type"] for row in written["results"]} == {"levels"}
    assert "\n- Yardsticks, " in text and " bits than " in text
    assert text.count("\n- ") == 2 + 5 and "No worse than 40 steps of fixed_large" in text
    card = (folder / "README.md").read_text()
    assert "| DPM-Solver++ | trailing | 10 |" in card
    best = fewest_steps(kernels, T)
    if best is None:
        assert "By samples alone: none of these rows" in text and "fewest_steps" not in written
    else:
        found = written["fewest_steps"]
        assert (found["name"], found["path"], found["num_inference_steps"]) == best
        assert (found["kernel_distance"], found["standard_error"]) == kernels[best]
        assert f"The fewest steps at equal quality: {best[2]} {best[1]} steps of {best[0]}" in card
