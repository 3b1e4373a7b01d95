"""Images per second of training/train.py, beside the official script's loop and the bare step.

Four processes, started and compiled once; three are suspended while the fourth runs some steps. Our
script is unaware of this: its loss.jsonl shows when a step is done.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measure import HERE, ROOT, Child, Row, ratio_row, rounds_of
from models import BATCH, CONFIGS, describe, describe_fast, fast_precision, make_images

STEPS = {"S": 20, "L": 2}  # per round
ROUNDS = {"S": 11, "L": 7}


class OurTraining(Child):
    """training/train.py, suspended and continued from outside."""

    def __init__(self, folder: Path, flags: list[str], logging_steps: int) -> None:
        self.rows = folder / "out" / "loss.jsonl"
        script = str(ROOT / "training" / "train.py")
        flags = [*flags, "--output_dir", str(folder / "out"), "--logging_steps", str(logging_steps)]
        flags += ["--cache_dir", str(folder / "cache")]
        super().__init__([sys.executable, script, *flags], folder, stdout=subprocess.DEVNULL)

    def done(self) -> int:
        """Number of steps whose losses are written."""
        try:
            return self.rows.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def run(self, steps: int) -> float:
        """Run so many more steps, a multiple of the logging steps; returns seconds."""
        goal = self.done() + steps
        started = self.clock()
        self.signal(signal.SIGCONT)
        size = -1
        while True:
            now = self.rows.stat().st_size if self.rows.exists() else 0
            if now != size:
                size = now
                if self.done() >= goal:
                    break
            self.check()
            time.sleep(0.001)
        seconds = self.clock() - started
        self.signal(signal.SIGSTOP)
        return seconds


class Loop(Child):
    """A loop of training_loops.py."""

    def __init__(self, kind: str, size: str, word: str, folder: Path) -> None:
        words = [str(HERE / "training_loops.py"), kind, size, word]
        super().__init__([sys.executable, *words], folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, steps: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "done":
            self.process.wait()
            self.check()

    def run(self, steps: int) -> float:
        started = self.clock()
        self.start(steps)
        self.wait()
        return self.clock() - started


def our_flags(size: str, images: Path, folder: Path) -> list[str]:
    """Flags of training/train.py for the defaults of the official script, compiled."""
    config = folder / f"unet-{size}.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIGS[size]}))
    flags = ["--dataset_name", str(images), "--model_config_name_or_path", str(config)]
    flags += ["--train_batch_size", str(BATCH), "--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    flags += ["--report_to", "none"]  # the other loops have no tracker either
    return [*flags, "--mixed_precision", fast_precision(size), "--torch_compile"]


def start(size: str, folder: Path) -> dict[str, OurTraining | Loop]:
    """The four processes; "ours" first. They start and compile at the same time."""
    images = make_images(size, folder)
    runners: dict[str, OurTraining | Loop] = {}
    try:
        runners["ours"] = OurTraining(folder / "ours", our_flags(size, images, folder), min(10, STEPS[size]))
        precision = fast_precision(size)
        for kind, word in (("peer", str(images)), ("bare", precision), ("update", precision)):
            runners[kind] = loop = Loop(kind, size, word, folder / kind)
            loop.start(STEPS[size])
        for runner in runners.values():
            if isinstance(runner, Loop):
                runner.wait()
        runners["ours"].run(STEPS[size])
    except BaseException:
        end(runners)
        raise
    return runners


def end(runners: dict[str, OurTraining | Loop]) -> None:
    for runner in runners.values():
        runner.end()


def measure(size: str) -> dict[str, list[float]]:
    """Seconds per step of each, once per round."""
    with tempfile.TemporaryDirectory() as folder:
        runners = start(size, Path(folder))
        times: dict[str, list[float]] = {kind: [] for kind in runners}
        try:
            for i in range(rounds_of(ROUNDS[size]) + 1):
                for kind, runner in runners.items():
                    seconds = runner.run(STEPS[size]) / STEPS[size]
                    if i > 0:  # the first round warms up
                        times[kind].append(seconds)
        finally:
            end(runners)
    return times


def rate(seconds: float) -> str:
    return f"{BATCH / seconds:.4g} images/s"


def training() -> Iterator[Row]:
    for size in STEPS:
        times = measure(size)
        fast = describe_fast(size)
        what, bare = f"training/train.py {describe(size)}, {fast}", f"bare step, {fast}, resident data"
        yield ratio_row(what, "official script's loop", times["peer"], times["ours"], unit=rate)
        yield ratio_row(what, bare, times["bare"], times["ours"], limit=True, unit=rate)
        yield ratio_row(what, "bare step that clips and averages, too", times["update"], times["ours"], unit=rate)
