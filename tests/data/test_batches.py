"""What global step n sees: the same for any number of processes, and whatever came before it."""

import pickle
import zlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddpm_notes_pipeline.data import StepBatches, step_seed
from tests.support.comparing import assert_same

EVERYTHING = {"random_flip": True, "label_dropout": 0.3, "null_label": 10}


def test_item_has_the_documented_shapes_dtypes_and_ranges(digits):
    item = StepBatches(digits, 6, seed=1)[4]
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in item.items()}
    assert shapes == {
        "pixel_values": ((6, 1, 8, 8), torch.uint8),
        "noise": ((6, 1, 8, 8), torch.float32),
        "u": ((6,), torch.float64),
        "class_labels": ((6,), torch.int64),
    }


def test_every_epoch_shows_each_image_once_in_a_new_order(digits):
    batches = StepBatches(digits, 100, seed=0)
    seen = np.concatenate([batches.indices(step) for step in range(44)])  # 1438 images: epochs end inside batches
    epochs = [seen[e * 1438 : (e + 1) * 1438] for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1438))
    assert (epochs[0] == epochs[1]).mean() < 0.02 and (epochs[1] == epochs[2]).mean() < 0.02
    assert (StepBatches(digits, 100, seed=1).indices(0) != batches.indices(0)).any()


def test_batch_larger_than_the_set_runs_through_several_epochs(load):
    few = load(dataset_name="digits", max_samples=10)
    counts = np.bincount(StepBatches(few, 25, seed=0).indices(3), minlength=10)  # positions 75..99
    assert counts.sum() == 25 and set(counts) == {2, 3}


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_all_processes_make_the_batch_of_one(digits, large, processes):
    for images, options in ((digits, EVERYTHING), (large, {"random_flip": True})):
        whole = StepBatches(images, 12, 5, **options)
        shares = [StepBatches(images, 12, 5, n, processes, **options) for n in range(processes)]
        for step in (0, 1, 250):  # 250 * 12 is in the third epoch of digits
            parts = [share[step] for share in shares]
            assert_same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, whole[step])
            assert all(t.untyped_storage().nbytes() == t.nbytes for part in parts for t in part.values())


def test_item_does_not_depend_on_what_was_asked_before(digits):
    straight = StepBatches(digits, 64, 3, **EVERYTHING)
    items = [straight[step] for step in range(50)]
    for step in (49, 7, 22, 23):  # 22 holds the end of the first epoch
        assert_same(StepBatches(digits, 64, 3, **EVERYTHING)[step], items[step])
    assert_same(straight[0], items[0])  # back again, from a later epoch
    assert_same(pickle.loads(pickle.dumps(straight))[30], items[30])


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_from_step_n_continues_the_run(digits, workers):
    batches = StepBatches(digits, 500, 3, **EVERYTHING)
    loader = DataLoader(batches, batch_size=None, sampler=range(2, 8), num_workers=workers)
    for step, item in enumerate(loader, start=2):
        assert_same(item, batches[step])
    assert step == 7


def test_steps_seeds_and_draws_are_all_different():
    seeds = {step_seed(seed, step, name) for seed in range(5) for step in range(200) for name in ("noise", "u", "flip")}
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds) == 3000  # torch keeps the low 32 bits
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 0, "noise") == step_seed(0, 0, "noise") and isinstance(step_seed(0, 0, "u"), int)
    torch.Generator().manual_seed(max(seeds))
    for seed, step in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="-1"):
            step_seed(seed, step, "noise")


def test_order_and_draws_are_those_of_every_version(digits):
    """Of the formula, written out: another version resumes a run with the same batches."""

    def generator(step: int, name: bytes) -> torch.Generator:
        words = np.random.SeedSequence([3, step, zlib.crc32(name)]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)

    batches = StepBatches(digits, 8, 3, random_flip=True)
    order = torch.randperm(1438, generator=generator(1, b"epoch"))  # step 180: 1440 to 1447, in epoch 1
    assert batches.indices(180).tolist() == order[2:10].tolist()
    item, flipped = batches[180], torch.rand(8, generator=generator(180, b"flip")) < 0.5
    images = digits.take(order[2:10])
    assert torch.equal(item["pixel_values"], torch.where(flipped[:, None, None, None], images.flip(-1), images))
    assert torch.equal(item["noise"], torch.randn((8, 1, 8, 8), generator=generator(180, b"noise")))
    assert torch.equal(item["u"], torch.rand(8, generator=generator(180, b"u"), dtype=torch.float64))


def test_noise_is_standard_normal_and_u_uniform(digits):
    batches = StepBatches(digits, 500, 0)
    items = [batches[step] for step in range(20)]
    noise, u = torch.cat([item["noise"] for item in items]).double(), torch.cat([item["u"] for item in items])
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5  # 4 standard errors, as everywhere here
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 10_000) ** 0.5
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 50  # chi-square of 19 degrees of freedom: p < 1e-4


def test_half_of_the_images_are_mirrored_left_to_right(digits):
    batches, plain = StepBatches(digits, 1000, 0, random_flip=True), StepBatches(digits, 1000, 0)
    masks = []
    for step in range(2):
        now, then = batches[step], plain[step]
        same = (now["pixel_values"] == then["pixel_values"]).flatten(1).all(1)
        mirrored = (now["pixel_values"] == then["pixel_values"].flip(-1)).flatten(1).all(1)
        assert (same ^ mirrored).all() and 430 < mirrored.sum() < 570
        assert torch.equal(now["noise"], then["noise"]) and torch.equal(now["u"], then["u"])
        masks.append(mirrored)
    assert 400 < (masks[0] ^ masks[1]).sum() < 600


def test_labels_are_dropped_with_the_given_probability(digits):
    kept = StepBatches(digits, 4000, 0)[0]["class_labels"]
    some = StepBatches(digits, 4000, 0, label_dropout=0.1, null_label=10)[0]["class_labels"]
    dropped = some == 10
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.09 / 4000) ** 0.5
    assert torch.equal(some[~dropped], kept[~dropped])
    assert (StepBatches(digits, 40, 0, label_dropout=1.0, null_label=10)[0]["class_labels"] == 10).all()


def test_labels_belong_to_their_images(digits):
    batches = StepBatches(digits, 64, 0)
    index = batches.indices(3)
    np.testing.assert_array_equal(batches[3]["class_labels"], digits.labels[index])
    assert torch.equal(batches[3]["pixel_values"], digits.take(index))


def test_set_without_labels_gives_none(large):
    assert "class_labels" not in StepBatches(large, 4, 0)[0]


def test_random_crops_are_whole_windows_in_every_place_there_is_room_for(large):
    batches, corners = StepBatches(large, 12, 0), set()
    for step in range(60):
        for n, image in zip(batches.indices(step), batches[step]["pixel_values"].int(), strict=True):
            top, left = image[1, 0, 0].item(), image[2, 0, 0].item()
            assert (image[0] == n).all()
            assert (image[1] == top + torch.arange(16)[:, None]).all() and (image[2] == left + torch.arange(16)).all()
            corners.add((n % 2, top, left))
    assert corners == {(0, 0, left) for left in range(15)} | {(1, top, 0) for top in range(9)}
    centre = large.take([0, 1]).int()
    assert centre[0, 2, 0, 0] == 7 and centre[1, 1, 0, 0] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size .* is 0"),
        ({"batch_size": 10, "num_processes": 4}, "is 10; it must be a multiple of 4"),
        ({"process_index": 2, "num_processes": 2}, r"process_index is 2; it must be in 0\.\.1"),
        ({"seed": -1}, "seed is -1"),
        ({"label_dropout": 1.5, "null_label": 10}, "label_dropout is 1.5"),
        ({"label_dropout": 0.1}, r"null_label .*\(got None\)"),
        ({"label_dropout": 0.1, "null_label": 9}, r"classes: 10\) and a null_label that is none .*\(got 9\)"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatches(**{"images": digits, "batch_size": 8, "seed": 0, **arguments})


def test_label_dropout_without_labels_is_refused(large):
    with pytest.raises(ValueError, match="label_column"):
        StepBatches(large, 8, 0, label_dropout=0.1, null_label=10)


def test_length_is_num_steps_where_given(digits):
    batches = StepBatches(digits, 4, 0, num_steps=3)
    assert len(batches) == 3 and len(list(batches)) == 3
    for step in (-1, 3):
        with pytest.raises(IndexError, match=rf"step {step} must be in 0\.\.2"):
            batches[step]
    with pytest.raises(TypeError, match="num_steps"):
        len(StepBatches(digits, 4, 0))
