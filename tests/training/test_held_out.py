"""Images that are held out must be new to the model that is measured on them."""

import dataclasses

import pytest

from ddpm_notes_pipeline.data import hold_out, load_images
from ddpm_notes_pipeline.training.arguments import DataArguments, ModelArguments, RunArguments
from ddpm_notes_pipeline.training.held_out import check_held_out
from ddpm_notes_pipeline.training.run import TrainingRun
from tests.data.making import write_images

SHARE, COUNT = 0.25, 12
pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar at the path")  # of ten timesteps


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with 12 images, and a model of 9 of them that two steps have trained."""
    home = tmp_path_factory.mktemp("held_out")
    write_images(home / "mine", [f"{n:02d}.png" for n in range(COUNT)], side=8)
    run_of(home, "model").train()
    return home


def run_of(home, name: str, base: str | None = None, seed: int = 0, **data) -> TrainingRun:
    images = {"train_data_dir": str(home / "mine"), "validation_share": SHARE, "cache_dir": str(home / "cache")}
    network = ModelArguments(block_out_channels=[8, 8], layers_per_block=1, ddpm_num_steps=10)
    network.pretrained_model_name_or_path = base and str(home / base)
    run = RunArguments(output_dir=str(home / name), max_train_steps=2, train_batch_size=3, report_to="none", seed=seed)
    run = dataclasses.replace(run, num_samples=1, ddpm_num_inference_steps=2, fit_levels=False)
    return TrainingRun(DataArguments(**images | data), network, run)


def check(home, share: float = SHARE, seed: int = 0, folder: str = "mine") -> None:
    data = DataArguments(train_data_dir=str(home / folder), validation_share=share)
    every = load_images(train_data_dir=home / folder, cache_dir=home / "cache", show_progress=False)
    check_held_out(str(home / "model"), None, data, seed, hold_out(every, share, seed)[0])


def test_the_images_that_a_run_held_out_are_new_to_its_model(trained):
    check(trained)
    run_of(trained, "longer", base="model").train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "--seed is 1 and was 0 in training of .*model; they must be equal, or images that it was"),
        ({"share": 0.3}, "--validation_share is 0.3 and was 0.25 in training"),
    ],
)
def test_other_ones_are_refused(trained, changes, message):
    with pytest.raises(ValueError, match=message):
        check(trained, **changes)


def test_fine_tuning_refuses_to_validate_on_images_that_the_model_was_trained_on(trained):
    with pytest.raises(ValueError, match="--seed is 1 and was 0 in training"):
        run_of(trained, "other", base="model", seed=1)
    assert not (trained / "other" / "loss.jsonl").exists()


def test_one_more_file_holds_out_others(trained, tmp_path):
    """The share is drawn from the images in their order: nearly all of it would change."""
    write_images(trained / "grown" / "mine", [f"{n:02d}.png" for n in range(COUNT + 4)], side=8)
    message = r"model was trained on 9 images of mine, and there are 12 besides those held out: the images have changed"
    with pytest.raises(ValueError, match=message):
        check(trained, folder="grown/mine")


def test_another_data_set_is_new_whatever_the_settings(trained):
    write_images(trained / "theirs", [f"{n:02d}.png" for n in range(COUNT + 4)], side=8)
    check(trained, share=0.5, seed=3, folder="theirs")
