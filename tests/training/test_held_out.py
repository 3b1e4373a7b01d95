"""Images that are held out must be new to the model that is measured on them."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ddpm_notes_pipeline.data import hold_out, load_images
from ddpm_notes_pipeline.training.arguments import DataArguments, ModelArguments, RunArguments
from ddpm_notes_pipeline.training.held_out import seen_in_training
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


def seen(home, share: float = SHARE, seed: int = 0, folder: str = "mine", model: str = "model") -> str | None:
    data = DataArguments(train_data_dir=str(home / folder), validation_share=share)
    every = load_images(train_data_dir=home / folder, cache_dir=home / "cache", show_progress=False)
    return seen_in_training(str(home / model), None, data, seed, hold_out(every, share, seed)[0])


def test_the_images_that_a_run_held_out_are_new_to_its_model(trained, recwarn):
    assert seen(trained) is None
    run_of(trained, "longer", base="model").train()
    assert not [warning for warning in recwarn if "training" in str(warning.message)]


def test_those_of_another_seed_or_share_are_not(trained):
    ends = f"; they must be equal, or images that {trained}/model was trained on are held out"
    assert seen(trained, seed=1) == "--seed is 1 and was 0 in training" + ends
    assert seen(trained, share=0.3) == "--validation_share is 0.3 and was 0.25 in training" + ends


def test_one_more_file_holds_out_others(trained):
    """The share is drawn from the images in their order: nearly all of it would change."""
    write_images(trained / "grown" / "mine", [f"{n:02d}.png" for n in range(COUNT + 4)], side=8)
    message = (
        "model was trained on 9 images of mine, and there are 12 besides those held out: if the images have changed"
    )
    assert message in str(seen(trained, folder="grown/mine"))


def test_fine_tuning_warns_of_a_folder_and_refuses_a_data_set(trained):
    """Only the last name of a folder is known: it may be another one."""
    with pytest.warns(UserWarning, match=r"unless these are other images than those of .*model: --seed is 1 and was 0"):
        run_of(trained, "other", base="model", seed=1)
    digits = {"train_data_dir": None, "dataset_name": "digits", "max_train_samples": 40}
    run_of(trained, "digits", **digits).train()
    with pytest.raises(ValueError, match=r"^--seed is 1 and was 0 in training; they must"):
        run_of(trained, "digits-2", base="digits", seed=1, **digits)
    assert not (trained / "digits-2" / "loss.jsonl").exists()
    with pytest.raises(ValueError, match="no such file or folder"):  # and no question to the Hub
        run_of(trained, "digits-2", base="no/such/model", **digits)


@pytest.mark.parametrize(
    ("run", "given"),
    [
        ({"train_data_dir": "./theirs"}, {}),
        ({"dataset_name": "me/theirs"}, {}),
        ({"train_data_dir": "./mine", "train_split": "validation"}, {}),
        ({"train_data_dir": "./mine", "classes": ["mon"]}, {"classes": ["item", "dngn"], "label_column": "label"}),
        ([1, 2], {}),
        ({"dataset_name": {"name": "mine"}}, {}),
        ("!!python/object:os.system {}", {}),
    ],
)
def test_another_data_set_split_or_class_is_new_whatever_the_settings(tmp_path, run, given):
    """And nothing is said where a file of that name is no record of ours."""
    text = run if isinstance(run, str) else yaml.safe_dump(run)
    (tmp_path / "training_config.yaml").write_text(text)
    data = DataArguments(train_data_dir=str(tmp_path / "mine"), validation_share=SHARE, **given)
    write_images(Path(data.train_data_dir), ["a.png", "b.png"], side=8)
    images = load_images(train_data_dir=data.train_data_dir, cache_dir=tmp_path, show_progress=False)
    assert seen_in_training(str(tmp_path), None, data, 7, images) is None


@pytest.mark.parametrize(("trained_on", "same"), [("./faces", True), ("me/faces", True), ("you/faces", False)])
def test_a_folder_may_hold_the_data_set_of_the_hub_that_has_its_name(tmp_path, trained_on, same):
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump({"dataset_name": trained_on, "train_split": "train"}))
    images = load_images("digits", cache_dir=tmp_path, show_progress=False)
    data = DataArguments(dataset_name="me/faces", validation_share=SHARE)
    assert (seen_in_training(str(tmp_path), None, data, 0, images) is not None) == same


def test_overlapping_splits_and_classes_are_the_same_images(tmp_path):
    (tmp_path / "training_config.yaml").write_text(
        yaml.safe_dump({"dataset_name": "digits", "train_split": "train[:90%]"})
    )
    images = load_images("digits", cache_dir=tmp_path, show_progress=False)
    for split in ("train", "test+train"):
        data = DataArguments(dataset_name="digits", train_split=split, validation_share=SHARE)
        assert "--train_split is" in str(seen_in_training(str(tmp_path), None, data, 0, images))
