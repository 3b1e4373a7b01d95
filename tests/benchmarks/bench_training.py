"""Images a second of training/train.py itself, against the official script's loop and the bare step.

Four processes, of which three are stopped while the fourth runs some steps: fast turns, although each has started and compiled on its own.
Our script is told nothing of this. Its loss.jsonl says when a step is done.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measure import HERE, ROOT, Child, Row, ratio_row, turns
from models import BATCH, CONFIGS, describe, describe_fast, fast_precision, make_images

STEPS = {"S": 20, "L": 2}  # a turn
ROUNDS = {"S": 11, "L": 7}


class OurTraining(Child):
    """training/train.py, stopped and continued from outside."""

    def __init__(
        self, folder: Path, words: list[str], logging_steps: int, threads: int = 1, processes: int = 1
    ) -> None:
        self.rows, self.logging_steps = folder / "out" / "loss.jsonl", logging_steps
        launch = [str(ROOT / "training" / "train.py")]
        if processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
            launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            launch += ["--num_cpu_threads_per_process", str(threads), str(ROOT / "training" / "train.py")]
        words = [*words, "--output_dir", str(folder / "out"), "--logging_steps", str(logging_steps)]
        words += ["--cache_dir", str(folder / "cache")]
        super().__init__([sys.executable, *launch, *words], folder, threads, stdout=subprocess.DEVNULL)

    def done(self) -> int:
        """Steps whose losses are written."""
        try:
            return self.rows.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def run(self, steps: int) -> float:
        """Seconds for so many more steps (a multiple of the logging steps), after which it is stopped."""
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


def our_words(size: str, images: Path, folder: Path, fast: bool = True) -> list[str]:
    """Options of training/train.py for the settings of the official script's defaults."""
    config = folder / f"unet-{size}.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIGS[size]}))
    words = ["--dataset_name", str(images), "--model_config_name_or_path", str(config)]
    words += ["--train_batch_size", str(BATCH), "--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    words += ["--report_to", "none"]  # the other loops have no tracker either
    return [*words, "--mixed_precision", fast_precision(size), "--torch_compile"] if fast else words


def training() -> Iterator[Row]:
    for size in STEPS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images = make_images(size, folder)
            logging_steps = min(10, STEPS[size])
            runners: dict[str, OurTraining | Loop] = {}
            try:
                runners["ours"] = OurTraining(folder / "ours", our_words(size, images, folder), logging_steps)
                for kind, word in (("peer", str(images)), *((kind, fast_precision(size)) for kind in ("bare", "update"))):
                    runners[kind] = Loop(kind, size, word, folder / kind)
                    runners[kind].start(STEPS[size])  # type: ignore[union-attr]
                for runner in runners.values():  # started and compiled at the same time
                    if isinstance(runner, Loop):
                        runner.wait()
                runners["ours"].run(STEPS[size])
                times: dict[str, list[float]] = {kind: [] for kind in runners}
                for turn in range(turns(ROUNDS[size]) + 1):
                    for kind, runner in runners.items():
                        seconds = runner.run(STEPS[size]) / STEPS[size]
                        if turn:  # the first one is for warming up
                            times[kind].append(seconds)
            finally:
                for runner in runners.values():
                    runner.end()

        def rate(seconds: float) -> str:
            return f"{BATCH / seconds:.4g} images/s"

        fast = describe_fast(size)
        what = f"training/train.py {describe(size)}, {fast}"
        yield ratio_row(what, "official script's loop", times["peer"], times["ours"], ">= 1.35", rate)
        yield ratio_row(what, f"bare step, {fast}, resident data", times["bare"], times["ours"], "<= 1.03", rate)
        yield ratio_row(what, "bare step that clips and averages, too", times["update"], times["ours"], "", rate)
