"""Runs of training/train.py, as users start them and cheap ones.

`launch` is a real `accelerate launch`, in one or several processes: 10 to 30 s each, nearly all of
it imports. `Trainer` imports once, in a server process that forks a process per run, or one per
rank, with its own exit status, output and accelerate state. `once` shares the result of an
expensive run between tests and pytest-xdist workers.
"""

import contextlib
import fcntl
import functools
import gc
import glob
import importlib
import itertools
import json
import math
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "training" / "train.py"

# A run of a second or two, without levels, which test_levels.py fits; flags given after these win.
# The gradient of some weights is rounding alone (biases before a norm or a softmax): Adam would
# move them at full speed without a larger epsilon.
DATA = ["--dataset_name", "digits"]
NETWORK = "--block_out_channels 32 32 --layers_per_block 1 --ddpm_num_steps 100".split()
SHORT = (
    "--max_train_steps 12 --train_batch_size 8 --lr_warmup_steps 4 --adam_epsilon 1e-5 --num_samples 3 "
    "--ddpm_num_inference_steps 2 --report_to none --no_fit_levels"
).split()
TINY = [*DATA, *NETWORK, *SHORT]


# -------------------------------------------------------------------- accelerate launch


def launch(
    *flags: Any,
    processes: int = 1,
    machines: int = 1,
    script: Path = TRAIN,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    expect: int | None = 0,
    timeout: float = 150,
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch training/train.py *flags` on CPUs.

    Args:
        processes: over all machines. (`--cpu --num_processes 2` would start ONE; the flags here
            start them all.)
        machines: launchers on this machine, joined like several nodes.
        expect: exit status that is asserted of every launcher; None: any.

    Returns:
        Exit status and output of the first launcher.
    """
    one = processes == 1
    options = f"--num_processes {processes} --num_machines {machines} --mixed_precision no --dynamo_backend no".split()
    port = free_port()
    options += ["--num_cpu_threads_per_process", "1"] if one else ["--multi_gpu", "--main_process_port", str(port)]
    if machines > 1:
        options += ["--main_process_ip", "127.0.0.1", "--rdzv_backend", "c10d"]
    environment = environment_of_runs(**({} if one else {"ACCELERATE_USE_CPU": "true"}), **(env or {}))
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(machines):
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            command = [sys.executable, "-m", "accelerate.commands.launch", *options]
            command += ["--machine_rank", str(rank)] if machines > 1 else []
            command += [str(script), *map(str, flags)]
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(kill_tree, process)
            started.append((process, out, err))
            if machines > 1 and rank == 0:
                # Otherwise the second launcher may take the port.
                wait_for_listener(process, port)
        finished = []
        end = time.monotonic() + timeout
        for process, out, err in started:
            code = process.wait(max(1, end - time.monotonic()))
            out.seek(0), err.seek(0)
            finished.append(subprocess.CompletedProcess(process.args, code, out.read(), err.read()))
    for result in finished:
        assert expect is None or result.returncode == expect, describe(result)
    return finished[0]


def environment_of_runs(**more: str) -> dict[str, str]:
    """One thread, the code of this checkout, and nothing of a launcher around pytest."""
    names = r"ACCELERATE_.*|WORLD_SIZE|LOCAL_.*|RANK|GROUP_RANK|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    inherited = {name: value for name, value in os.environ.items() if not re.fullmatch(names, name)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return inherited | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path} | more


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_listener(process: subprocess.Popen, port: int, timeout: float = 60) -> None:
    """Wait until a process listens on a port, has ended, or takes too long."""
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        if any(
            c.laddr.port == port and c.status == "LISTEN" for c in psutil.Process(process.pid).net_connections("tcp")
        ):
            return
        time.sleep(0.1)


def kill_tree(process: subprocess.Popen) -> None:
    """End a process and its descendants, which a launcher leaves running."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [psutil.Process(process.pid), *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def describe(result: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {result.returncode}\n--- stdout\n{result.stdout[-4000:]}\n--- stderr\n{result.stderr[-6000:]}"


def error_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What a user reads on stderr: without progress bars, which end in a carriage return."""
    lines = [line.rpartition("\r")[2].rstrip() for line in result.stderr.split("\n")]
    return [
        line
        for line in lines
        if line
        and not re.match(
            r"(decoding .*|train|sample|[a-z_ ]+ images|Loading pipeline components...): +\d+%|Generating ", line
        )
    ]


# -------------------------------------------------------------------- one process a run


class Trainer:
    """`python training/train.py *flags`, without paying for imports each time."""

    def __init__(self) -> None:
        # The server's own output goes to this process's stderr; its stdin and stdout carry the
        # requests and answers.
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_of_runs(),
            text=True,
            start_new_session=True,
        )

    def __call__(
        self,
        *flags: Any,
        script: Path | str = TRAIN,
        processes: int = 1,
        stop_at: int | tuple[str, int] | None = None,
        by: int = signal.SIGKILL,
        kill_after: tuple[float, str] | None = None,
        file_size: int | None = None,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        expect: int | None = 0,
        timeout: int = 100,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script to its end.

        Args:
            script: a file, or "-c" to run the code in the first flag.
            processes: several are ranks on CPUs, as `accelerate launch` would start them. If one
                fails, the others have five seconds to end, and its exit status is the run's.
            stop_at: the process sends itself the signal `by` when it asks for the batch of this
                step, or calls ("module:function", n) for the n-th time.
            kill_after: (seconds, pattern): kill it that long after a matching file appears.
            file_size: limit in bytes on every file that it writes, its stderr too.
            expect: exit status that is asserted; None: any.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            argv = [str(script), *map(str, flags)]
            request = {
                "argv": argv,
                "stop_at": stop_at,
                "env": env or {},
                "cwd": str(cwd),
                "timeout": timeout * processes,
            }
            request |= {"by": int(by), "kill_after": kill_after, "file_size": file_size, "processes": processes}
            request |= {"out": str(out), "err": str(err)}
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
            assert answer, "the server of train.py died; its stderr is above"
            result = subprocess.CompletedProcess(
                argv, json.loads(answer), out.read_text(), err.read_text(errors="replace")
            )
        assert expect is None or result.returncode == expect, describe(result)
        return result

    def close(self) -> None:
        kill_tree(self.server)
        self.server.stdin.close(), self.server.stdout.close()


def serve() -> None:
    """Answer each request, a line on stdin, with the exit status of a fork that ran it."""
    for name in (
        "ddpm_notes_pipeline.training.parser",
        "ddpm_notes_pipeline.training.run",
        "datasets",
        "sklearn.datasets",
        "diffusers.pipelines",
        "torch.distributed",
    ):
        __import__(name)
    gc.freeze()  # so that the children's collector does not copy it all
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            # The interpreter's own exit would touch, and so copy, all that was imported: 3 s.
            os._exit(run_ranks(json.loads(line)))
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


def run_ranks(request: dict[str, Any]) -> int:
    """Run a request in one process, or in as many ranks as it asks for; returns its exit status."""
    count = request["processes"]
    if count == 1:
        return run_request(request)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    running, status = set(), 0
    for rank in range(count):
        child = os.fork()
        if child == 0:
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            os._exit(run_request({**request, "env": {**own, **request["env"]}}))
        running.add(child)
    deadline = math.inf
    while running:
        child, ended = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.02)
            if time.monotonic() > deadline:
                for other in running:
                    os.kill(other, signal.SIGKILL)
            continue
        running.remove(child)
        if ended and not status:  # the others end by themselves, or wait for it for ever
            status, deadline = os.waitstatus_to_exitcode(ended), time.monotonic() + 5
    if status < 0:  # a signal ended the rank: it ends the run, too
        os.kill(os.getpid(), -status)
    return status


def run_request(request: dict[str, Any]) -> int:
    """Run one script as `python SCRIPT FLAGS` would; returns its exit status."""
    for descriptor, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.alarm(request["timeout"])  # unhandled: it ends the process
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["stop_at"] is not None:
        signal_at(request["stop_at"], request["by"])
    if request["kill_after"] is not None:
        start_killer(*request["kill_after"])
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    script, *flags = request["argv"]
    code = 0
    try:
        if script == "-c":
            sys.argv = ["-c", *flags[1:]]
            exec(compile(flags[0], "<-c>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = request["argv"]
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def signal_at(stop_at: int | list | tuple, number: int = signal.SIGKILL) -> None:
    """Make this process send itself a signal: `stop_at` as in `Trainer.__call__`."""
    where, count = (
        ("ddpm_notes_pipeline.data.batches:StepBatches.__getitem__", None) if isinstance(stop_at, int) else stop_at
    )
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if args[1] == stop_at if count is None else next(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, call)


def start_killer(seconds: float, pattern: str) -> None:
    """Have this process killed that many seconds after a file that matches appears."""
    victim = os.getpid()
    if os.fork():
        return
    while not glob.glob(pattern) and os.getppid() == victim:
        time.sleep(0.0005)
    time.sleep(seconds)
    if os.getppid() == victim:  # still running
        os.kill(victim, signal.SIGKILL)
    os._exit(0)


# -------------------------------------------------------------------- shared by workers


def once(
    name: str, make: Callable[[Path], subprocess.CompletedProcess[str]]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder that `make(folder)` filled and what it returned; made once per test session.

    Fixtures of pytest-xdist are made once per worker.
    """
    home = Path(os.environ["DDPM_NOTES_TESTS_HOME"], "once")
    home.mkdir(exist_ok=True)
    folder, record = home / name, home / f"{name}.json"
    with locked(home / f"{name}.lock"):
        if not record.exists():
            if folder.exists():  # an earlier try failed
                folder = home / f"{name}-{uuid.uuid4().hex[:6]}"
            result = make(folder)
            record.write_text(json.dumps([str(folder), result.args, result.returncode, result.stdout, result.stderr]))
    path, *parts = json.loads(record.read_text())
    return Path(path), subprocess.CompletedProcess(*parts)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    serve()
