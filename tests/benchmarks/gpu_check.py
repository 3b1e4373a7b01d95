"""What only a GPU can show, in one command of at most 8 minutes without network: `make gpu-check`.

Each part runs in a process of its own, with a limit of its own: one that fails leaves the others.
Writes gpu-check.md, gpu-check.json and the parts' logs to --output_dir, and prints the table. Exits
with 1 if a part failed; a target that is missed is said so, and is no failure. `--device cpu
--quick` runs the same code with tiny networks on a CPU.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from gpu_parts.report import Report, Result
from gpu_parts.setting import Row, Setting
from measure import ROOT
from tests.support.launching import kill_tree


@dataclass
class Part:
    """A module of gpu_parts.

    Attributes:
        limit: seconds it may take on a GPU.
        timed: whether it measures time, and so has the machine for itself.
    """

    limit: float
    timed: bool = False


PARTS = {
    "suites": Part(180),
    "resume": Part(180),
    "syncs": Part(150),
    "memory": Part(120),
    "speed": Part(200, timed=True),
    "share": Part(120, timed=True),
    "sampling": Part(120, timed=True),
}


class Check:
    """Runs parts until a deadline; all arguments as of the command line."""

    def __init__(self, device: str, quick: bool, output_dir: Path, seconds: float) -> None:
        self.device, self.quick, self.output_dir = device, quick, output_dir
        self.deadline = time.monotonic() + seconds
        self.processes: list[subprocess.Popen] = []

    def run(self, names: list[str]) -> list[Result]:
        """Those that are not timed, side by side; then the others, one after the other.

        On a CPU all are run two at a time: no figure means anything there.
        """
        on_cpu = self.device == "cpu"
        untimed = [name for name in names if on_cpu or not PARTS[name].timed]
        with ThreadPoolExecutor(2 if on_cpu else 4) as pool:
            try:
                results = list(pool.map(self.part, untimed))
                return results + [self.part(name) for name in names if name not in untimed]
            finally:
                for process in self.processes:
                    end(process)

    def part(self, name: str) -> Result:
        """Run a part in its process."""
        started, log = time.monotonic(), self.output_dir / "logs" / f"{name}.log"
        limit = min(PARTS[name].limit * (3 if self.device == "cpu" else 1), self.deadline - started)
        if limit <= 0:
            return Result(name, "not started", 0, log)
        folder = self.output_dir / "work" / name
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--part", name, "--device", self.device, "--output_dir", str(folder)]
        command += ["--quick"] if self.quick else []
        with log.open("w") as file:
            home = self.output_dir / "work" / "home"
            settings = {"env": environment(self.device, home), "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, start_new_session=True, **settings)
            self.processes.append(process)
            try:
                status = "passed" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timed out"
                end(process)
        result = Result(name, status, time.monotonic() - started, log, read_rows(folder))
        print(f"{name}: {status} after {result.seconds:.0f} s", file=sys.stderr, flush=True)
        return result


def end(process: subprocess.Popen) -> None:
    """End a part that still runs, and the runs that it started."""
    if process.poll() is None:
        kill_tree(process)


def environment(device: str, home: Path) -> dict[str, str]:
    """Of a part: this checkout first, no network, nothing of the user's or of a pytest's."""
    inherited = {name: value for name, value in os.environ.items() if not re.match("PYTEST_|DDPM_NOTES_", name)}
    paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    return inherited | own | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def read_rows(folder: Path) -> list[Row]:
    path = folder / "rows.json"
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def run_part(name: str, setting: Setting) -> None:
    """Measure, in the part's own process. Each row is kept at once: a failure leaves the others."""
    if setting.quick:  # on a CPU that takes a minute a network; test_compiled.py and test_updates.py do it
        torch.nn.Module.compile = lambda self: None  # type: ignore[method-assign]
    rows: list[dict] = []
    for row in importlib.import_module(f"gpu_parts.{name}").measure(setting):
        print(row, flush=True)
        rows.append(asdict(row))
        (setting.folder / "rows.json").write_text(json.dumps(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps: does the code run?")
    parser.add_argument("--only", default="", help=f"comma-separated parts: {', '.join(PARTS)}")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu-check"), help="where the reports go")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in its own process
    arguments = parser.parse_args()
    arguments.names = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(PARTS)
    if unknown := [name for name in arguments.names if name not in PARTS]:
        parser.error(f"--only has {', '.join(unknown)}; it must be among {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --quick runs the same code on a CPU")
    return arguments


def main() -> None:
    arguments, started = parse(), time.monotonic()
    device, quick, output_dir = arguments.device, arguments.quick, arguments.output_dir.resolve()
    if arguments.part:
        return run_part(arguments.part, Setting(torch.device(device), quick, output_dir))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # unwinds, so that the parts are ended
    (output_dir / "logs").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output_dir / "work", ignore_errors=True)
    results = Check(device, quick, output_dir, arguments.seconds).run(arguments.names)
    shutil.rmtree(output_dir / "work", ignore_errors=True)
    report = Report(device, quick, time.monotonic() - started, results)
    report.write(output_dir)
    print(report.table(), report.troubles(), sep="\n")
    sys.exit(1 if report.failed() else 0)


if __name__ == "__main__":
    main()
