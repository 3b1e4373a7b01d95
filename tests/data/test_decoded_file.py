"""The decoded file: made once, found again, whole or not there, and never held in memory."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from ddpm_notes_pipeline.data import load_images
from tests.data.making import random_pixels, table_of, write_images, write_parquet
from tests.support.launching import ROOT


def test_second_load_decodes_nothing(load, tmp_path):
    folder = write_images(tmp_path / "f", {"a.png": random_pixels(4, 4)})
    first = load(folder)
    before = os.stat(first.file.path)
    second = load(folder)
    after = os.stat(second.file.path)
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert second.file.path == first.file.path
    assert torch.equal(first.take([0]), second.take([0])) and first.fingerprint == second.fingerprint
    assert load(folder, resolution=3).file.path != first.file.path


@pytest.mark.parametrize("form", ["folder", "table of paths"])
def test_changed_file_is_decoded_again(load, tmp_path, form):
    old, new = random_pixels(2, 4, 4)
    path = write_images(tmp_path / "f", {"a.png": old}) / "a.png"
    arguments = {"train_data_dir": tmp_path / "f"}
    if form == "table of paths":  # the table itself does not change
        table = write_parquet(tmp_path / "t", table_of([{"bytes": None, "path": str(path)}]))
        arguments = {"dataset_name": str(table)}
    first = load(**arguments)
    np.testing.assert_array_equal(first.take([0])[0, 0], old)
    write_images(tmp_path / "f", {"a.png": new})
    second = load(**arguments)
    np.testing.assert_array_equal(second.take([0])[0, 0], new)
    assert second.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_pixels_not_of_the_file_names(load, tmp_path):
    def load_one(name: str, pixels: np.ndarray):
        return load(write_images(tmp_path / name, {"a.png": pixels}))

    pixels = random_pixels(4, 4)
    first, second = load_one("one", pixels), load_one("two", pixels)
    assert first.file.path != second.file.path and first.fingerprint == second.fingerprint
    pixels[0, 0] ^= 1
    third = load_one("three", pixels)
    assert third.fingerprint != first.fingerprint
    flat = load_one("four", pixels.reshape(2, 8))  # the same bytes in another shape
    assert flat.fingerprint != third.fingerprint


def test_files_and_fingerprints_are_those_of_every_version(load):
    """Of the formulas, written out: another version finds the decoded file and knows the images."""
    from sklearn.datasets import load_digits

    images = load(dataset_name="digits", split="test", resolution=16, center_crop=True)
    every_fifth = np.floor(load_digits().images[4::5] * 255 / 16 + 0.5).astype(np.uint8)
    key = [2, hashlib.blake2b(every_fifth.tobytes()).hexdigest(), [16, 16], True, None, "error"]
    assert images.file.path.name == f"{hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()}.images"
    pixels = images.take(range(359)).numpy().tobytes() + json.dumps(["L", 359, [16, 16]]).encode()
    sizes = np.array([[16, 16]], np.int32).tobytes()
    assert images.fingerprint == hashlib.blake2b(pixels + sizes, digest_size=16).hexdigest()
    few = images.at_most(3)
    index = np.array([0, 119, 239], np.int64).tobytes()
    assert few.fingerprint == hashlib.blake2b(images.fingerprint.encode() + index, digest_size=16).hexdigest()


@pytest.mark.parametrize("length", [0, 5, 64, 1000, -1])
def test_decoded_file_cut_short_is_made_again(load, length):
    images = load(dataset_name="digits", max_samples=100)
    truth = images.file.path.read_bytes()
    images.file.path.write_bytes(truth[:length])
    again = load(dataset_name="digits", max_samples=100)
    assert again.file.path.read_bytes() == truth and again.fingerprint == images.fingerprint


def decode_at_once(barrier, cache_dir, results):
    barrier.wait(60)
    images = load_images("digits", cache_dir=cache_dir, resolution=16, show_progress=False)
    results.put((images.fingerprint, int(images.take(range(len(images))).sum())))


def test_processes_decoding_one_set_at_once_all_end_with_a_whole_file(digits, tmp_path):
    context = multiprocessing.get_context("fork")  # `digits` has read the arrays already: all start together
    barrier, results = context.Barrier(3), context.SimpleQueue()
    workers = [context.Process(target=decode_at_once, args=(barrier, tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len({results.get() for _ in workers}) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".images"]


def test_default_place_is_below_the_hugging_face_home():
    images = load_images("digits", max_samples=5)
    assert images.file.path.parent == Path(datasets.config.HF_CACHE_HOME, "ddpm_notes_pipeline")


MEMORY = """
import sys
from ddpm_notes_pipeline.data import StepBatches, load_images

def anonymous_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

def use(n):
    images = load_images(sys.argv[1], resolution=64, cache_dir=sys.argv[2], max_samples=n, show_progress=False)
    batches = StepBatches(images, 64, seed=0)
    for step in range(n // 64):
        batches[step]
    return images

first = use(500)
before = anonymous_mb()
second = use(5000)
print(anonymous_mb() - before, second.file.path.stat().st_size / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_set(tmp_path):
    table_of([*random_pixels(100, 8, 8, 3)] * 50).save_to_disk(tmp_path / "t")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "t"), str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    growth, decoded = map(float, result.stdout.split())
    assert decoded > 55  # MB: 5000 images of 64x64x3
    assert growth < 20
