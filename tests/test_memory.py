"""Memory of a training process does not grow with its set."""

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from launching import TINY, TRAIN, environment_of_runs

FEW, MANY = 2_000, 50_000


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[int, Path]:
    """Folders of parquet files, of that many 32x32 images of noise, 3 kB each."""
    random, found = np.random.default_rng(0), {}
    for count in (FEW, MANY):
        found[count] = folder = tmp_path_factory.mktemp("set") / str(count)
        folder.mkdir()
        for part in range(count // 1000):
            images = []
            for pixels in random.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8):
                file = io.BytesIO()
                PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=0)
                images.append({"bytes": file.getvalue(), "path": None})
            info = {"features": {"image": {"_type": "Image"}}}
            schema = pyarrow.schema(
                [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))],
                metadata={"huggingface": str({"info": info}).replace("'", '"')},
            )
            pyarrow.parquet.write_table(pyarrow.table([images], schema=schema), folder / f"train-{part:05d}.parquet")
    return found


def most_held(*flags: object) -> float:
    """The most RssAnon, in MB, of a training process; its status is read every 20 ms. (RSS counts mapped files too.)"""
    command = [sys.executable, str(TRAIN), *map(str, flags)]
    process = subprocess.Popen(
        command, env=environment_of_runs(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    most = 0
    try:
        while process.poll() is None:
            text = Path(f"/proc/{process.pid}/status").read_text()
            most = max([most, *(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.returncode == 0, process.stderr.read()
    return most / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/PID/status is Linux's")
@pytest.mark.parametrize("streaming", [False, True])
def test_fifty_thousand_images_take_hardly_more_memory_than_two_thousand(sets, tmp_path, streaming):
    """While they are decoded, and while they are trained on, from all over the set."""
    flags = [*TINY[2:], "--max_train_steps", 30, "--train_batch_size", 16, "--cache_dir", tmp_path / "cache"]
    flags += ["--streaming"] * streaming
    few, many = (most_held(*flags, "--dataset_name", sets[n], "--output_dir", tmp_path / str(n)) for n in (FEW, MANY))
    print(f"RssAnon: {few:.0f} MB with {FEW} images, {many:.0f} MB with {MANY}")
    assert abs(many - few) < 50
