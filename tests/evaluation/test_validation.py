"""bits/dim and samples of a set: progress bars with an end, stops, and what the room may import."""

import ast

import pytest
import torch
from accelerate import Accelerator

from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.sampling import sample
from ddpm_notes_pipeline.evaluation.validation import measure_bits_per_dim
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
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


@pytest.mark.parametrize(("room", "above"), [("evaluation", {"hub", "training"}), ("hub", {"training"})])
def test_a_room_imports_none_above_it(room, above):
    for path in (ROOT / "ddpm_notes_pipeline" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not above & set((node.module or "").split(".")), f"{path}:{node.lineno}"
