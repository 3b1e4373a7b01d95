"""What each part is told, what it answers, and how it times."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

NEEDS_CUDA = "needs CUDA"


@dataclass
class Row:
    """A line of the table.

    Attributes:
        figure: as printed. value: the number in it, for the JSON.
        target: what it should be, in words; empty where there is none.
        met: whether it is; None where that says nothing (--quick, or no target).
    """

    what: str
    figure: str
    value: float | None = None
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly a part runs.

    Attributes:
        device: "cuda" or "cpu".
        quick: tiny networks, not compiled, and few steps: the code runs, the figures mean nothing.
        folder: of this part alone.
    """

    device: torch.device
    quick: bool
    folder: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def row(self, what: str, value: float, unit: str, at_least: float = 0, at_most: float = 0) -> Row:
        """A number, with its target where one of the two is given."""
        target = f"at least {at_least:g}" if at_least else f"at most {at_most:g}" if at_most else ""
        met = None if self.quick or not target else value >= at_least if at_least else value <= at_most
        return Row(what, f"{value:.4g} {unit}", value, target, met)

    def seconds(self, call: Callable[[], object], count: int = 20, rounds: int = 3) -> float:
        """Seconds a call, until the device is done: the median of some rounds of `count` calls."""
        count, rounds = (1, 1) if self.quick else (count, rounds)
        times = []
        for _ in range(rounds):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(count):
                call()
            self.synchronize()
            times.append((time.perf_counter() - started) / count)
        return statistics.median(times)


def float32_kernels(products: bool = False, convolutions: bool = True) -> None:
    """Which float32 operations CUDA may do in TF32. The defaults are torch's own."""
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
