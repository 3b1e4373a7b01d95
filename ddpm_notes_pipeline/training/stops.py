"""Stopping together: on a signal, as a spot machine, a Slurm time limit or ctrl-C sends it, or by a failure of one of several processes.

The handler only remembers the signal. Training looks at it once a step, together with all other processes, so that they all stop behind the
same step, with one whole checkpoint, whichever of them was told. Before training starts there is nothing to save, and the signal ends the
process where it is. A second signal, later than launchers repeat the first one, ends it at once.
"""

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers and Slurm each send a signal to the same processes, and the handler runs only when a long operation has returned: seconds apart.
REPEATED = 5.0  # seconds


class Stopped(BaseException):
    """The run ends because of a signal. Not an `Exception`: nobody is to catch it on the way and go on.

    Attributes:
        status: exit status as shells know it, 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.
        together: whether all processes stop so, having agreed on it.
    """

    def __init__(self, number: int, where: str, together: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.status, self.together = 128 + number, together


class Stops:
    """SIGTERM and SIGINT of this process, and of the others that train with it. Made in the main thread."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self.first = 0.0  # when it came
        self.where: str | None = "before training started; start it again by the same command"
        self.group: Any = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def hold(self, accelerator: Accelerator) -> None:
        """From now on a signal waits for `agreed`. Called by every process, when there is something to save."""
        self.where = None
        if accelerator.num_processes > 1:
            # Of CPU tensors, beside the one for gradients: asking whether to stop waits for no accelerator.
            self.group = torch.distributed.new_group(backend="gloo")

    def agreed(self) -> int:
        """The number of a signal that any of the processes has received, the same on all of them; 0: none has.

        Called by every process as often. On one process it looks at a number; several exchange one through their CPUs.
        """
        if self.group is None:
            return self.received
        number = torch.tensor(self.received)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(number)

    def release(self, where: str) -> None:
        """From now on a signal ends the process where it is again: there is nothing left to save. `where`, in words."""
        self.where = where
        if self.received:
            raise Stopped(self.received, where, together=False)

    def _handle(self, number: int, frame: Any) -> None:
        if self.where is not None:
            raise Stopped(number, self.where, together=False)
        now = time.monotonic()
        if not self.received:
            self.received, self.first = number, now
            if os.environ.get("RANK", "0") == "0":  # not by print: the signal may have come in the midst of one
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping behind this step; a second one ends the run at once\n".encode())
        elif now - self.first > REPEATED:
            os._exit(128 + number)


class FailedElsewhere(Exception):
    """Another process failed, and says why."""


@contextlib.contextmanager
def failing_together(accelerator: Accelerator, what: str | None = None) -> Iterator[None]:
    """A block that each process runs, with as many exchanges between them in it: if it fails in one, it fails in all.

    Else the others would wait for that one. `what` goes before its message, and makes an OSError of it.

    Raises:
        FailedElsewhere: in the processes in which it did not fail.
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


def resume_command(*without: str) -> str:
    """The command that goes on with this process's run from its newest whole checkpoint; `without` some flags that have one value."""
    given = "\0".join(sys.argv[1:])
    for name in ("--resume_from_checkpoint", *without):
        given = re.sub(rf"(^|\0){name.replace('_', '[-_]')}[=\0][^\0]*", "", given)
    script = shlex.join([sys.argv[0], *filter(None, given.split("\0"))])
    return f"{launcher()} {script} --resume_from_checkpoint latest"


def launcher() -> str:
    """How this process was started, before the script's name: by `accelerate launch`, with its number of processes, or by `python`."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return "python"  # the launcher sets that for what it starts
    launch = "accelerate launch"
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        launch += " OPTIONS_AS_BEFORE"  # of each machine: its rank, the first one's address
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        launch += f" --multi_gpu --num_processes {os.environ['WORLD_SIZE']}"
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "--multi_gpu" in launch:
        launch = f"ACCELERATE_USE_CPU=true {launch}"
    return launch
