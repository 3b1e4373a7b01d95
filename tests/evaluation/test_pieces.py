"""A measurement that was stopped goes on: what was finished is used, and only where it belongs."""

import re
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from ddpm_notes_pipeline.data import hold_out, load_images
from ddpm_notes_pipeline.evaluation.pieces import Piece, Pieces, image_settings, int_keys
from ddpm_notes_pipeline.evaluation.samples import SampleTable
from tests.evaluation.test_evaluate import EVALUATE, SAMPLES, results, save_model, save_network
from tests.support.launching import ROOT, error_lines

# Variances are measured on the twentieth of the training images that is not held out.
FLAGS = (
    "--variance_types fixed_small optimal --num_inference_steps 5 40 --max_images 21 --validation_share 0.95".split()
)
FLAGS += "--evaluations_per_image 6 --metrics --metric_images 20 --batch_size 8".split()
FLAGS += ["--config", ROOT / "training" / "configs" / "digits.yaml"]
WRITE = "ddpm_notes_pipeline.evaluation.pieces:Pieces._write"
# Row of held-out images, V_t; bound, three parts and the set of 5 steps; bound, a part of 40 steps.
KEPT = 9
# Counts the images that the network is evaluated on, and then is training/evaluate.py.
COUNTED = f"""
import runpy
from diffusers import UNet2DModel
images, forward = [], UNet2DModel.forward
def counted(self, sample, *more, **settings):
    images.append(len(sample))
    return forward(self, sample, *more, **settings)
UNet2DModel.forward = counted
runpy.run_path({str(EVALUATE)!r}, run_name="__main__")
print("evaluated on", sum(images), "images")
"""


def evaluate(train, folder, *flags, **options):
    """A real process; its flags are those above, its model is the same each time."""
    if not folder.exists():
        save_model(folder)
    network = save_network(folder.parent / "small-vit")
    return train(
        COUNTED, "--model", folder, "--metric_network", network, *FLAGS, *flags, script="-c", timeout=300, **options
    )


def evaluated_on(done):
    return int(re.search(r"evaluated on (\d+) images", done.stdout)[1])


@pytest.fixture(scope="module")
def unstopped(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unstopped") / "model"
    return folder, evaluate(train, folder)


def test_a_killed_run_goes_on_finds_the_same_numbers_and_evaluates_nothing_twice(train, unstopped, tmp_path):
    """But the piece in hand, and one whose file was damaged since."""
    folder = tmp_path / "model"
    evaluate(train, folder, stop_at=(WRITE, KEPT + 1), expect=-signal.SIGKILL)
    assert not (folder / "evaluation.json").exists()
    pieces = sorted((folder / "unfinished").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(pieces) == KEPT - 3  # the parts of a finished set are in it
    part = pieces[-1]  # the first images of 40 steps
    part.write_bytes(part.read_bytes()[:-100])
    (folder / "unfinished" / f"{part.stem}.0123.part").write_bytes(b"half")
    done = evaluate(train, folder)
    assert f"Not measured again: {KEPT - 4} of " in done.stdout and "is damaged and is measured again" in done.stderr
    bounds = sum(row["network_evaluations"] for row in results(folder)["results"][:2])
    variances = len(hold_out(load_images("digits", split="train", show_progress=False), 0.95, 0)[0]) * 32
    assert evaluated_on(done) == evaluated_on(unstopped[1]) - bounds - variances - SAMPLES * 5
    assert (folder / "evaluation.json").read_bytes() == (unstopped[0] / "evaluation.json").read_bytes()
    assert not (folder / "unfinished").exists()


@pytest.mark.slow
def test_a_signal_says_what_is_kept_and_other_settings_leave_it(train, unstopped, tmp_path):
    folder = tmp_path / "model"
    stopped = evaluate(train, folder, stop_at=(WRITE, KEPT + 1), by=signal.SIGTERM, expect=128 + signal.SIGTERM)
    said = f"stopped by SIGTERM while measuring. {folder}/unfinished has {KEPT - 3} finished pieces; "
    assert said + "the same command continues with them" in error_lines(stopped)[-1]
    other = evaluate(train, folder, "--noise_seed", 1)
    assert "Not measured again: 2 of " in other.stdout  # held-out images and V_t: no noise of its own
    assert results(folder)["results"][0]["total"] != results(unstopped[0])["results"][0]["total"]
    assert len(list((folder / "unfinished").iterdir())) == KEPT - 5
    last = evaluate(train, folder)
    assert "Not measured again: 4 of " in last.stdout and results(folder) == results(unstopped[0])


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(train, unstopped, tmp_path):
    folder = tmp_path / "model"
    evaluate(train, folder, stop_at=(WRITE, KEPT + 1), expect=-signal.SIGKILL)
    flags = ["--model", folder, "--metric_network", folder.parent / "small-vit", *FLAGS]
    done = train(*flags, processes=2, script=EVALUATE)
    assert f"Not measured again: {KEPT - 4} of " in done.stdout  # a part of 8 is none of theirs, of 16
    found, truth = results(folder), results(unstopped[0])
    assert found["results"][:2] == truth["results"][:2] and found["metrics"][:2] == truth["metrics"][:2]
    for a, b in zip(found["results"], truth["results"], strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=2e-6)
    assert not (folder / "unfinished").exists()


# -------------------------------------------------------------------- pieces alone


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def value(pieces, settings, new):
    """The value of a piece that is `new` if it is measured."""
    return pieces.get(settings, lambda: Piece({"x": new}, {"y": torch.tensor([new])})).values["x"]


def test_a_piece_is_found_by_all_its_settings_and_comes_back_bit_for_bit(accelerator, tmp_path):
    third, settings = 1 / 3, {"b": [1, 2], "a": 1.0}
    assert value(Pieces(accelerator, tmp_path, {"w": 1}), settings, third) == third
    again = Pieces(accelerator, tmp_path, {"w": 1})
    found = again.get({"a": 1.0, "b": [1, 2]}, lambda: pytest.fail("it was measured again"))
    assert found.values["x"] == third and found.tensors["y"] == torch.tensor([third])
    assert (again.found, again.measured) == (1, 0)
    for of_all, other in (({"w": 2}, settings), ({"w": 1}, {"b": [1, 2], "a": 1.5}), ({"w": 1}, {"b": [1, 2]})):
        assert value(Pieces(accelerator, tmp_path, of_all), other, 7) == 7


def test_a_changed_piece_is_measured_anew(accelerator, tmp_path):
    value(Pieces(accelerator, tmp_path), {}, 1.0)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for damaged in (content[:-1], content[:20], b"", content[:-1] + b"x", content.replace(b"1.0", b"2.0")):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged and is measured again"):
            assert value(Pieces(accelerator, tmp_path), {}, 3.0) == 3.0
        path.write_bytes(content)
    assert value(Pieces(accelerator, tmp_path), {}, 3.0) == 1.0


def test_a_stopped_piece_is_not_kept_and_pieces_of_others_stay(accelerator, tmp_path):
    mine, other = Pieces(accelerator, tmp_path / "a"), Pieces(accelerator, tmp_path / "a", {"w": 2})
    assert mine.get({}, lambda: None) is None and not (tmp_path / "a").exists()
    value(mine, {}, 1), value(other, {}, 2)
    mine.clear()
    assert value(Pieces(accelerator, tmp_path / "a", {"w": 2}), {}, 3) == 2
    other.clear()
    assert not (tmp_path / "a").exists()


def test_a_full_disk_costs_the_piece_and_not_the_measurement(accelerator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be written; a stop would lose this piece"):
        assert value(Pieces(accelerator, tmp_path / "file" / "unfinished"), {}, 1) == 1


def test_images_differ_by_their_labels_where_these_are_used():
    images = load_images("digits", split="test", label_column="label", show_progress=False)
    few, other = images.at_most(3), replace(images, labels=images.labels[::-1])
    assert image_settings(images, False) == image_settings(other, False) != image_settings(few, False)
    assert image_settings(images, True) not in (image_settings(images, False), image_settings(other, True))


def test_whole_numbers_come_back_as_keys():
    assert int_keys({"a": {"0": [1, {"12": 2}]}}) == {"a": {0: [1, {12: 2}]}}


def test_figures_have_the_name_of_the_network_that_was_asked_for(accelerator, tmp_path):
    """A copy of its folder under another name found the figures of the first."""
    images = load_images("digits", split="test", show_progress=False)
    real, held_out, pieces = images.part(range(300), "train"), images.part(range(300, 350), "test"), tmp_path / "pieces"
    for name in ("one", "two"):
        network = str(save_network(tmp_path / name))
        settings = {"network": network, "images": 8, "batch_size": 8, "pieces": Pieces(accelerator, pieces)}
        (row,) = SampleTable(accelerator, real, held_out, train=real, **settings, cache_dir=tmp_path).rows
        assert row.metrics.protocol.network == name
