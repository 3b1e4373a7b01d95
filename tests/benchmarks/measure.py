"""How the benchmarks measure.

What is compared runs interleaved (A B C A B C ...), and each round gives one ratio, because the
speed of a machine drifts. Reported are the medians of the times and of the ratios, and the middle
half of the ratios as their spread. Everything runs on one thread. On a busy machine `--clock cpu`
counts CPU time instead of wall-clock time.
"""

import contextlib
import gc
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}


class Settings:
    """The clock, and the factor on the number of rounds."""

    clock = "wall"
    effort = 1.0


@dataclass
class Row:
    """A line of the table; `low` and `high` bound the middle half of the ratios."""

    what: str
    beside: str
    theirs: str
    ours: str
    ratio: float
    low: float
    high: float
    meaning: str = "x faster"

    def __str__(self) -> str:
        digits = 3 if self.ratio < 1.2 else 2 if self.ratio < 10 else 1
        ratio = f"{self.ratio:.{digits}f} {self.meaning} ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return f"| {self.what} | {self.beside} | {self.theirs} | {self.ours} | {ratio} |"


HEADER = "| measured | beside | theirs | ours | ratio (middle half) |\n|---|---|---|---|---|"


def rounds_of(number: int) -> int:
    """A number of rounds, scaled by `Settings.effort`; at least 3."""
    return max(3, round(number * Settings.effort))


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.1
) -> dict[str, list[float]]:
    """Seconds per call of each, once per round; short calls are repeated for about `seconds`."""
    clock = CLOCKS[Settings.clock]
    repeats = {}
    for name, call in calls.items():
        call(), call()  # warm up
        started = clock()
        call()
        repeats[name] = max(1, int(seconds / max(clock() - started, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds_of(rounds)):
            for name, call in calls.items():
                started = clock()
                for _ in range(repeats[name]):
                    call()
                times[name].append((clock() - started) / repeats[name])
    finally:
        gc.enable()
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def in_unit(seconds: float) -> str:
    unit = "us" if seconds < 1e-3 else "ms" if seconds < 1 else "s"
    return f"{seconds * UNITS[unit]:.3g} {unit}"


def ratio_row(
    what: str,
    beside: str,
    theirs: list[float],
    ours: list[float],
    limit: bool = False,
    unit: Callable[[float], str] = in_unit,
) -> Row:
    """Compare seconds: how much faster ours is, or how much longer than a lower limit it takes."""
    ratios = [b / a if limit else a / b for a, b in zip(theirs, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    meaning = "x its time" if limit else "x faster"
    return Row(what, beside, unit(median(theirs)), unit(median(ours)), middle, low, high, meaning)


def count_row(what: str, beside: str, theirs: float, ours: float, unit: str, meaning: str = "x as much") -> Row:
    """Compare two numbers: ours over theirs, or theirs over ours for the meaning "x fewer"."""
    ratio = theirs / ours if meaning == "x fewer" else ours / theirs
    return Row(what, beside, f"{theirs:.4g} {unit}", f"{ours:.4g} {unit}", ratio, ratio, ratio, meaning)


# --- other processes


def environment() -> dict[str, str]:
    """Of a child process: this checkout first on the path, one thread, no network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONWARNINGS": "ignore",
    }


class Child:
    """A process that is suspended while others run. Its stderr is shown if it fails."""

    def __init__(self, command: list[str], folder: Path, **options: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.messages = folder / "messages.txt"
        self.process = subprocess.Popen(
            command,
            env=environment(),
            stderr=self.messages.open("w"),
            cwd=ROOT,
            start_new_session=True,  # ctrl-C goes to the benchmark, which ends this one
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def family(self) -> list[psutil.Process]:
        """The process and its descendants."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def signal(self, number: int) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def clock(self) -> float:
        """Seconds on the clock of `Settings`; CPU time has a resolution of 10 ms."""
        if Settings.clock == "cpu":
            return sum(sum(process.cpu_times()[:2]) for process in self.family())
        return time.perf_counter()

    def check(self) -> None:
        """Raises RuntimeError with the end of its stderr if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.process.args} ended: {self.messages.read_text()[-2000:]}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()


def hardware() -> str:
    """Processor, cores, versions and load of the machine."""
    import diffusers
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    busy = f"**load {load:.1f}: other work was running**" if load > 1.5 else f"load {load:.1f}"
    return f"{name}, {cores} core{'s' * (cores != 1)}, one thread; torch {torch.__version__}, diffusers {diffusers.__version__}; {busy}"
