"""The project beside its peers and its limits, in one table: `make bench`, or a part of it: `make bench ONLY=step,terms`.

About 25 minutes on two quiet cores. Prints the table as it grows; the whole goes to --output_dir as bench.md, beside bench.png.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")  # before torch
sys.path.insert(0, str(Path(__file__).parents[2]))

from measure import CLOCKS, HEADER, Row, Settings, hardware

PARTS = {  # name -> module and function
    "step": "bench_scheduler.step",
    "terms": "bench_scheduler.terms",
    "sampling": "bench_sampling.sampling",
    "training": "bench_training.training",
    "likelihood": "bench_likelihood.likelihood",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parts, with commas between them: {', '.join(PARTS)}")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine with other work on it")
    parser.add_argument("--effort", type=float, default=1.0, help="times the usual number of turns")
    parser.add_argument("--output_dir", default="outputs/bench", help="where bench.md and bench.png go")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only has {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    Settings.clock, Settings.effort = arguments.clock, arguments.effort
    Settings.output_dir = Path(arguments.output_dir)
    Settings.output_dir.mkdir(parents=True, exist_ok=True)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # through what ends the children

    import datasets
    import torch
    from diffusers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    head = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {hardware()}; {Settings.clock} clock"
    lines = [head, "", HEADER]
    print("\n".join(lines), flush=True)
    missed = 0
    for name in names:
        module, _, function = PARTS[name].rpartition(".")
        started = time.monotonic()
        rows: Iterable[Row] = getattr(importlib.import_module(module), function)()
        for row in rows:  # some come as they are measured
            missed += row.reached is False
            lines.append(str(row))
            print(row, flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    lines += ["", f"{missed} of the targets not reached." if missed else "All targets reached."]
    print("\n".join(lines[-2:]))
    (Settings.output_dir / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
