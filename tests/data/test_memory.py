"""The memory of a training process does not grow with its set.

RssAnon is the memory that only the process holds. (RSS also counts pages of mapped files, which the
system can take back at any time.)
"""

import re
import shutil
from pathlib import Path

import pytest

from tests.data.making import random_pixels, table_of, write_parquet
from tests.support.launching import TINY, TRAIN

FEW, MANY = 2_000, 50_000
SIDE, A_FILE = 32, 1_000

# Ordinary training, with a thread that reads the process's own status every 10 ms.
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


def write_shards(folder: Path, count: int) -> Path:
    """`count` colour images of 32x32, 3 kB of noise each, in parquet files as the Hub has them.

    In several: `datasets` converts a set to its own format when it first sees it, and then holds
    one such file at a time as a whole.
    """
    write_parquet(folder, table_of([*random_pixels(A_FILE, SIDE, SIDE, 3)]), "train-0")
    for i in range(1, count // A_FILE):
        shutil.copyfile(folder / "train-0.parquet", folder / f"train-{i}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/PID/status is Linux's")
def test_fifty_thousand_images_take_hardly_more_memory_than_two_thousand(train, tmp_path):
    """While they are decoded, and while batches are drawn from all over the set."""
    peaks = {}
    for count in (FEW, MANY):
        images = write_shards(tmp_path / f"images-{count}", count)
        own = ["--dataset_name", images, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / f"run-{count}"]
        result = train(WATCHED, TRAIN, *TINY[2:], *own, script="-c")
        assert f"{count} images of 3x{SIDE}x{SIDE}" in result.stdout
        assert len(list((tmp_path / "cache").glob("*.images"))) == len(peaks) + 1
        peaks[count] = int(re.search(r"RssAnon: (\d+) kB", result.stdout)[1]) / 1e3
    print(f"RssAnon at most: {peaks} MB")
    pixels = MANY * SIDE * SIDE * 3 / 1e6
    assert pixels > 150 and abs(peaks[MANY] - peaks[FEW]) < 50
