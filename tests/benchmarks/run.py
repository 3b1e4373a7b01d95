"""The project beside its peers and its lower limits, in one table: `make bench`.

A part of it: `make bench ONLY=step,terms`. Prints the table as it grows, and writes it to
--output_dir as bench.md.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")  # before torch
sys.path.insert(0, str(Path(__file__).parents[2]))

from measure import CLOCKS, HEADER, Settings, hardware

PARTS = {  # name -> module and function; what users wait for comes first
    "training": "bench_training.training",
    "sampling": "bench_sampling.sampling",
    "likelihood": "bench_likelihood.likelihood",
    "startup": "bench_startup.startup",
    "levels": "bench_levels.levels",
    "step": "bench_scheduler.step",
    "terms": "bench_scheduler.terms",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"comma-separated parts: {', '.join(PARTS)}")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the number of rounds")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"), help="where bench.md goes")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only has {', '.join(unknown)}; must be of {', '.join(PARTS)}")
    Settings.clock, Settings.effort = arguments.clock, arguments.effort
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # unwinds, so that children are ended

    import datasets
    import torch
    from diffusers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    head = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {hardware()}; {Settings.clock} clock"
    lines = [head, "", HEADER]
    print("\n".join(lines), flush=True)
    for name in names:
        module, _, function = PARTS[name].rpartition(".")
        started = time.monotonic()
        for row in getattr(importlib.import_module(module), function)():
            lines.append(str(row))
            print(row, flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    (arguments.output_dir / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
