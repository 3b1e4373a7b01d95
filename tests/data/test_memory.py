"""The memory of a training process does not grow with its set.

RssAnon is what a process holds of its own. (RSS also counts pages of mapped files, which the system takes back when it needs them.)
"""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image

from tests.support.launching import TINY, TRAIN

FEW, MANY = 2_000, 50_000
SIDE, A_FILE = 32, 1_000

# Training as ever, and beside it a thread that looks at the process's own status every 10 ms.
WATCHED = """
import pathlib, re, runpy, sys, threading
found, ended = [], threading.Event()
def watch():
    while not ended.wait(0.01):
        found.append(int(re.search(r"RssAnon:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]))
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    ended.set()
    print(f"RssAnon: {max(found)} kB at most of {len(found)} times")
"""


def write_images(folder: Path, count: int) -> Path:
    """So many 32x32 colour images, 3 kB of noise each, in parquet files as the Hub has them.

    In several, for `datasets`, which converts a set to its own format when it sees it first, holds one such file at a time as a whole.
    """
    random, rows = np.random.default_rng(0), []
    for pixels in random.integers(0, 256, (A_FILE, SIDE, SIDE, 3), dtype=np.uint8):
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        rows.append({"bytes": file.getvalue(), "path": None})
    table = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    folder.mkdir()
    table.to_parquet(folder / "train-0.parquet")
    for i in range(1, count // A_FILE):
        shutil.copyfile(folder / "train-0.parquet", folder / f"train-{i}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/PID/status is Linux's")
def test_fifty_thousand_images_take_hardly_more_memory_than_two_thousand(train, tmp_path):
    """While they are decoded, and while batches are drawn from all over the set."""
    most = {}
    for count in (FEW, MANY):
        images = write_images(tmp_path / f"images-{count}", count)
        own = ["--dataset_name", images, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / f"run-{count}"]
        result = train(WATCHED, TRAIN, *TINY[2:], *own, script="-c")
        assert f"{count} images of 3x{SIDE}x{SIDE}" in result.stdout
        assert len(list((tmp_path / "cache").glob("*.images"))) == len(most) + 1
        most[count] = int(re.search(r"RssAnon: (\d+) kB", result.stdout)[1]) / 1e3
    print(f"RssAnon at most: {most} MB")
    pixels = MANY * SIDE * SIDE * 3 / 1e6
    assert pixels > 150 and abs(most[MANY] - most[FEW]) < 50
