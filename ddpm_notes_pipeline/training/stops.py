"""Stopping together: on a signal (spot machine, Slurm, ctrl-C), or when one process fails.

The handler only remembers the signal. Training asks for it once per step, together with all other
processes, so that all of them stop after the same step, with one whole checkpoint. Before training
starts there is nothing to save, and the signal ends the process at once. So does a second signal,
unless it is one of the repetitions that launchers send.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher and Slurm may both send the same signal, and a handler only runs once a long operation
# has returned: repetitions arrive seconds apart.
REPEATED = 5.0  # seconds


class Stopped(BaseException):
    """The run ends because of a signal. Not an `Exception`, so that nothing catches it on the way.

    Attributes:
        status: exit status, 128 + signal number as in shells: 143 for SIGTERM, 130 for SIGINT.
        together: whether all processes agreed to stop here.
    """

    def __init__(self, number: int, where: str, together: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.status, self.together = 128 + number, together


class Stops:
    """Whether this process, or one that trains with it, has been told to stop.

    It takes no signals before `install`, which a script calls. In a notebook, or under pytest, the
    caller's own handlers stay in place, and ctrl-C raises KeyboardInterrupt as usual.

    Attributes:
        received: number of the first signal; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self.first = 0.0  # when it came, by time.monotonic
        # How to describe a stop that takes effect at once; None: it waits for `agreed`.
        self.where: str | None = "before training started; start it again by the same command"
        self.group: Any = None

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def hold(self, accelerator: Accelerator) -> None:
        """From now on a signal waits for `agreed`. Collective: every rank must call it."""
        self.where = None
        if accelerator.num_processes > 1:
            # A second group, for CPU tensors: asking on the device would force a sync.
            self.group = torch.distributed.new_group(backend="gloo")

    def agreed(self) -> int:
        """The signal that any rank has received, the same on all ranks; 0: none.

        Collective: every rank must call it.
        """
        if self.group is None:
            return self.received
        number = torch.tensor(self.received)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(number)

    def release(self, where: str) -> None:
        """From now on a signal takes effect at once again: nothing is left to save.

        Raises:
            Stopped: a signal came before.
        """
        self.where, self.group = where, None
        if self.received:
            raise Stopped(self.received, where, together=False)

    def _handle(self, number: int, frame: Any) -> None:
        if self.where is not None:
            raise Stopped(number, self.where, together=False)
        now = time.monotonic()
        if not self.received:
            self.received, self.first = number, now
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                # not print: the signal may have interrupted one
                os.write(2, f"\n{name}: stopping after this step; a second one ends the run at once\n".encode())
        elif now - self.first > REPEATED:
            os._exit(128 + number)


class FailedElsewhere(Exception):
    """Another process failed, and reports why."""


@contextlib.contextmanager
def failing_together(accelerator: Accelerator, what: str | None = None) -> Iterator[None]:
    """A block that fails on every rank if it fails on one: the others would wait for it otherwise.

    Collective: every rank must enter it, and reach the same collectives inside.

    Args:
        what: put before the message of the failure, which becomes an OSError.

    Raises:
        FailedElsewhere: on the ranks that did not fail themselves.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    failures = accelerator.reduce(torch.tensor(float(fault is not None), device=accelerator.device))
    if fault is not None:
        raise fault if what is None else OSError(f"{what}: {fault}") from fault
    if float(failures) > 0:
        raise FailedElsewhere


def exit_now(status: int, text: str = "", once: bool = False) -> NoReturn:
    """End this process with a line on stderr.

    The interpreter's own exit would wait for pushes in flight and, maybe for ever, for other ranks.

    Args:
        once: all ranks exit with the same line, and rank 0 writes it.
    """
    if text and (not once or os.environ.get("RANK", "0") == "0"):
        tqdm.write(text, file=sys.stderr)  # above a progress bar
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
