"""bits/dim and samples of a set: progress bars with an end, stops, and what the room may import."""

import ast
import json
import math

import pytest
import torch
from accelerate import Accelerator

from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.records import BoundRecord, Evaluation
from ddpm_notes_pipeline.evaluation.sampling import sample
from ddpm_notes_pipeline.evaluation.validation import (
    Row,
    decoder_of,
    measure_bits_per_dim,
    save_evaluation,
)
from ddpm_notes_pipeline.evaluation.yardsticks import Yardsticks
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from tests.evaluation.test_evaluate import save_model
from tests.support.launching import ROOT


class StopAfter:
    """A stop that is received after it was asked for `n` times."""

    def __init__(self, n):
        self.n = n

    @property
    def received(self):
        self.n -= 1
        return int(self.n < 0)

    def agreed(self):
        return int(self.n < 0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return DDPMNotesPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def images():
    return load_images("digits", split="test", max_samples=21, show_progress=False)


def test_the_progress_bar_over_a_set_has_a_total(pipeline, images, capsys):
    """It had none, so no estimate of the remaining time."""
    pipeline.set_progress_bar_config(desc="validate", mininterval=0)
    result = measure_bits_per_dim(Accelerator(), pipeline, images, evaluations_per_image=4)
    shown = capsys.readouterr().err
    assert "validate:   0%" in shown and "16/21" in shown and "21/21" in shown and "image/s" in shown
    pipeline.set_progress_bar_config(disable=True)
    quiet = measure_bits_per_dim(Accelerator(), pipeline, images, evaluations_per_image=4)
    assert torch.equal(quiet.per_image, result.per_image) and not capsys.readouterr().err


def test_anything_that_says_stop_ends_measuring_and_sampling(pipeline, images):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"evaluations_per_image": 4}
    assert measure_bits_per_dim(Accelerator(), pipeline, images, StopAfter(0), **settings) is None
    assert measure_bits_per_dim(Accelerator(), pipeline, images, StopAfter(9), **settings) is not None

    steps = []
    settings = {"num_inference_steps": 6, "watch": lambda x, i, n: steps.append((i, n))}
    assert sample(Accelerator(), pipeline, 5, 2, stops=StopAfter(3), **settings) is None
    assert steps == [(0, 6), (1, 6), (2, 6)]
    whole = sample(Accelerator(), pipeline, 5, 2, stops=StopAfter(100), num_inference_steps=6)
    assert torch.equal(whole, sample(Accelerator(), pipeline, 5, 3, num_inference_steps=6))


def test_the_ranges_are_found_on_images_from_all_over_the_set(pipeline):
    """Many sets are sorted by class: their first images are all alike."""
    pipeline.set_progress_bar_config(disable=True)
    images = load_images("digits", split="test", show_progress=False)
    light = images.take(range(len(images))).flatten(1).sum(1)
    dark, bright = light[:180].argsort()[:16].sort().values, 180 + light[180:].argsort()[-48:].sort().values
    images = images.part(torch.cat([dark, bright]).numpy(), "the dark ones first")
    settings = {"evaluations_per_image": 4}
    measured = measure_bits_per_dim(Accelerator(), pipeline, images, **settings)
    x = images.take(range(64))
    expected = pipeline.bits_per_dim(x, pilot_images=x[::4], **settings)
    assert torch.equal(measured.per_image, expected.per_image)
    torch.testing.assert_close(measured.per_timestep, expected.per_timestep)  # bits_per_dim.png shows it
    assert not torch.equal(measured.per_image, pipeline.bits_per_dim(x, **settings).per_image)


LEVELS = {"weights": [[1.0] * 256], "decoder_blur": {0: 0.01}, "guess_blur": {0: 0.01}}


@pytest.mark.parametrize(
    ("settings", "path", "kind", "variance"),
    [
        ({}, [9, 0], "own", 5.453188e-05),
        ({"decoder_variance": 0.01}, [9, 0], "fitted", 0.01),
        ({"decoder_variance": {4: 0.02}}, [9, 0], "own", 5.453188e-05),
        ({"decoder_variance": {4: 0.02}}, [9, 4], "fitted", 0.02),
        ({"variance_type": "learned_range", "decoder_variance": 0.01}, [9, 0], "own", None),
        ({"levels": LEVELS, "decoder_variance": 0.01}, [9, 0], "levels", None),
    ],
)
def test_a_row_says_which_decoder_it_was_measured_with(settings, path, kind, variance):
    """With levels it named the variance of a Gaussian that was not used."""
    scheduler = DDPMNotesScheduler(**settings)
    assert decoder_of(scheduler, path) == (kind, None if variance is None else pytest.approx(variance, rel=1e-6))


def test_the_record_keeps_decoder_and_yardsticks_and_reads_files_without_them(pipeline, images, tmp_path):
    result = measure_bits_per_dim(Accelerator(), pipeline, images, evaluations_per_image=4)
    names = {"variance_type": "fixed_small", "path": "even", "num_inference_steps": 40, "decoder_type": "levels"}
    row = Row(BoundRecord.from_dict({**result, **names}), result)
    (tmp_path / Evaluation.MAP).write_bytes(b"of other numbers")
    save_evaluation(tmp_path, images, [row], None, yardsticks=Yardsticks({"xz": 2.5}, 21, 1438))
    record = Evaluation.read(tmp_path)
    assert record.yardsticks == {"xz": 2.5} and record.results[0].decoder_type == "levels"
    assert record.results[0].decoder == result.decoder and "knows which levels occur" in record.protocol
    assert not (tmp_path / Evaluation.MAP).exists()

    old = json.loads((tmp_path / Evaluation.FILE).read_text())
    del old["yardsticks"], old["results"][0]["decoder_type"]
    (tmp_path / Evaluation.FILE).write_text(json.dumps(old))
    record = Evaluation.read(tmp_path)
    assert record.yardsticks is None and record.results[0].decoder_type == "own" and record.as_dict() == old


def test_an_evaluation_of_one_image_is_json(pipeline, images, tmp_path):
    """It had NaN for the errors that one image does not tell, which strict readers refuse."""
    one = images.at_most(1)
    result = measure_bits_per_dim(Accelerator(), pipeline, one, evaluations_per_image=4)
    names = {"variance_type": "fixed_small", "path": "even", "num_inference_steps": 40}
    save_evaluation(tmp_path, one, [Row(BoundRecord.from_dict({**result, **names}), result)], None)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / Evaluation.FILE).read_text(), parse_constant=refuse)
    row = Evaluation.read(tmp_path).results[0]
    assert math.isnan(row.standard_error) and all(map(math.isnan, row.standard_errors.values()))
    assert row.total == result.total


@pytest.mark.parametrize(("room", "above"), [("evaluation", {"hub", "training"}), ("hub", {"training"})])
def test_a_room_imports_none_above_it(room, above):
    for path in (ROOT / "ddpm_notes_pipeline" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not above & set((node.module or "").split(".")), f"{path}:{node.lineno}"
