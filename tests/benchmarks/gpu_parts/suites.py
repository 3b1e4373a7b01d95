"""The tests of scheduler, pipeline, objectives and updates, on the device."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from gpu_parts.setting import Row, Setting
from measure import ROOT

FILES = [
    "tests/test_scheduling_ddpm_notes.py",
    "tests/test_pipeline_ddpm_notes.py",
    "tests/test_objectives.py",
    "tests/training/test_updates.py",
]
A_FEW = "definition or squared_error"  # --quick


def measure(setting: Setting) -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "10", *FILES]
    command += ["-m", "not launch and not slow"]  # real runs are the part `resume`
    if setting.quick:
        command += ["-k", A_FEW]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    environment = os.environ | {"DDPM_NOTES_DEVICE": setting.device.type}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(result.stdout)
    passed = re.search(r"(\d+) passed", result.stdout)
    if result.returncode != 0 or passed is None:
        raise RuntimeError(f"pytest ended with status {result.returncode}: {result.stdout.splitlines()[-1:]}")
    yield Row(f"tests on {setting.device.type}", f"{passed[1]} passed", float(passed[1]))
