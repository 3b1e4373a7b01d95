"""How everything here is measured.

A machine is never the same twice: what is compared runs in turns (A B C A B C ...), and each turn gives one ratio. Reported are the median of
the times, the median of the ratios, and the middle half of the ratios as their spread. One thread, so that nobody waits for another's core.
On a machine with other work on it `--clock cpu` counts the time that the kernel gave to the process instead of the time that passed.
"""

import contextlib
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
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
    """Of this run: which clock, times how many turns, where pictures go."""

    clock = "wall"
    effort = 1.0
    output_dir = Path("outputs/bench")


@dataclass
class Row:
    """One line of the table: `ratio` and its middle half, and whether it is where it should be."""

    what: str
    beside: str
    theirs: str
    ours: str
    ratio: float
    low: float
    high: float
    target: str = ""  # ">= 2" or "<= 1.5"; empty: told, not judged
    more: str = "x faster"

    @property
    def reached(self) -> bool | None:
        if not self.target:
            return None
        sign, number = self.target.split()
        return self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number)

    def __str__(self) -> str:
        digits = 3 if self.ratio < 1.2 else 2 if self.ratio < 10 else 1
        ratio = f"{self.ratio:.{digits}f} {self.more} ({self.low:.{digits}f} to {self.high:.{digits}f})"
        verdict = {None: "", True: "reached", False: "**not reached**"}[self.reached]
        return f"| {self.what} | {self.beside} | {self.theirs} | {self.ours} | {ratio} | {self.target} | {verdict} |"


HEADER = "| measured | beside | theirs | ours | ratio (middle half) | target | |\n|---|---|---|---|---|---|---|"


def turns(number: int) -> int:
    return max(3, round(number * Settings.effort))


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.1
) -> dict[str, list[float]]:
    """Seconds of a call of each, once a round; short calls are repeated for about `seconds`."""
    clock = CLOCKS[Settings.clock]
    repeats = {}
    for name, call in calls.items():
        call(), call()  # warm
        started = clock()
        call()
        repeats[name] = max(1, int(seconds / max(clock() - started, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns(rounds)):
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
    target: str = "",
    show: Callable[[float], str] = in_unit,
) -> Row:
    """How many times faster ours is (a target ">= ..."), or of the time of a limit, how much it takes (a target "<= ...")."""
    limit = target.startswith("<=")
    ratios = [b / a if limit else a / b for a, b in zip(theirs, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    more = "x its time" if limit else "x faster"
    return Row(what, beside, show(median(theirs)), show(median(ours)), middle, low, high, target, more)


def count_row(what: str, beside: str, theirs: float, ours: float, unit: str, target: str = "", more: str = "x") -> Row:
    """Of two plain numbers: theirs over ours for a target ">= ...", else ours over theirs."""
    ratio = theirs / ours if target.startswith(">=") else ours / theirs
    return Row(what, beside, f"{theirs:.4g} {unit}", f"{ours:.4g} {unit}", ratio, ratio, ratio, target, more)


# ------------------------------------------------------------------------------------------------ other processes


def environment(threads: int = 1) -> dict[str, str]:
    """Of a child: our code first, `threads` threads, no network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONWARNINGS": "ignore",
    }


class Child:
    """A process that is stopped while it is not its turn. Its messages go to a file, which is shown where it fails."""

    def __init__(self, command: list[str], folder: Path, threads: int = 1, **options: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.messages = folder / "messages.txt"
        self.process = subprocess.Popen(
            command,
            env=environment(threads),
            stderr=self.messages.open("w"),
            cwd=ROOT,
            start_new_session=True,  # ctrl-C is for the benchmark, which ends it
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def family(self) -> list[psutil.Process]:
        """It and what it started, which a launcher of several processes puts into sessions of their own."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def signal(self, number: int) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def cpu_seconds(self) -> float:
        """Of all of them; in hundredths."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family())

    def clock(self) -> float:
        return self.cpu_seconds() if Settings.clock == "cpu" else time.perf_counter()

    def peak_mib(self) -> float:
        """The most memory it has held so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024

    def check(self) -> None:
        """Raises RuntimeError, with its last words, if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.process.args} ended: {self.messages.read_text()[-2000:]}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()


def run_child(script: str, *words: str, threads: int = 1) -> dict:
    """The JSON that a script here prints as its last line."""
    done = subprocess.run(
        [sys.executable, script, *words], env=environment(threads), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} {words}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def hardware() -> str:
    """Processor, cores, versions, and what else the machine is doing."""
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
    return f"{name}, {cores} cores, one thread; torch {torch.__version__}, diffusers {diffusers.__version__}; {busy}"
