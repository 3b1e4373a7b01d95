"""`make gpu-check` on a CPU with tiny networks: all parts run; one that fails leaves the others."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.launching import ROOT, environment_of_runs

SCRIPT = ROOT / "tests" / "benchmarks" / "gpu_check.py"


def gpu_check(folder: Path, *flags: str, **env: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--output_dir", str(folder), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment_of_runs(**env))
    return result, json.loads((folder / "gpu-check.json").read_text())


def figures(record: dict, part: str) -> list[str]:
    return [row["figure"] for row in record["parts"][part]["rows"]]


@pytest.fixture
def part(monkeypatch) -> Any:
    """Imports a module of gpu_parts."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return lambda name: importlib.import_module(f"gpu_parts.{name}")


@pytest.mark.slow
@pytest.mark.launch
def test_every_part_runs_and_the_table_says_what_a_cpu_cannot_show(tmp_path):
    result, record = gpu_check(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["suites", "resume", "syncs", "memory", "speed", "share", "sampling"]
    assert list(record["parts"]) == names and all(record["parts"][name]["status"] == "passed" for name in names)
    assert figures(record, "resume") == ["weights and optimizer equal bit for bit", "needs CUDA"]
    for name in ("syncs", "memory"):
        assert set(figures(record, name)) == {"needs CUDA"} and len(figures(record, name)) >= 5
    rows = [row for name in names for row in record["parts"][name]["rows"]]
    assert [row["what"] for row in rows if row["target"]] and all(row["met"] is None for row in rows)
    assert record["card"] == "a CPU" and record["quick"]
    # wheels of one version differ in what follows the +, and their metadata may leave it out
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    table = (tmp_path / "gpu-check.md").read_text()
    assert table in result.stdout and all(row["what"] in table and row["figure"] in table for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.md", "logs"]


@pytest.mark.slow
@pytest.mark.launch
def test_a_part_that_fails_is_named_with_the_end_of_its_log_and_leaves_the_others(tmp_path):
    (tmp_path / "pytest.py").write_text("raise SystemExit('no pytest on this machine')")
    result, record = gpu_check(tmp_path / "out", "--only", "suites,memory", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert {name: found["status"] for name, found in record["parts"].items()} == {
        "suites": "failed",
        "memory": "passed",
    }
    assert figures(record, "memory") and not figures(record, "suites")
    for text in (result.stdout, "\n".join(record["parts"]["suites"]["last_lines"])):
        assert "no pytest on this machine" in text and "pytest ended with status 1" in text
    assert f"suites failed; {tmp_path}/out/logs/suites.log ends with:" in result.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_what_takes_too_long_is_ended_and_what_is_late_is_not_started(tmp_path):
    result, record = gpu_check(tmp_path, "--only", "suites,syncs,memory", "--seconds", "3")
    assert result.returncode == 1
    statuses = {name: found["status"] for name, found in record["parts"].items()}
    assert statuses == {"suites": "timed out", "syncs": "timed out", "memory": "not started"}


def test_a_target_is_judged_unless_the_figures_mean_nothing(part):
    setting = part("setting")
    rows = [
        setting.Setting(torch.device("cpu"), quick, Path()).row("speed", 2.0, "x", **target)
        for quick in (False, True)
        for target in ({"at_least": 1.5}, {"at_least": 3}, {"at_most": 3}, {"at_most": 1}, {})
    ]
    assert [row.met for row in rows] == [True, False, True, False, None] + [None] * 5
    assert [row.target for row in rows[:5]] == ["at least 1.5", "at least 3", "at most 3", "at most 1", ""]


def test_a_missed_target_is_marked_and_is_no_failure(part):
    report, row = part("report"), part("setting").Row
    rows = [row("speed", "2 x", 2, "at least 3", False), row("share", "1 %", 1, "at most 3", True)]
    done = report.Report("cpu", False, 9, [report.Result("speed", "passed", 5, Path("none"), rows)])
    assert "| speed | 2 x | at least 3: **missed** |\n| share | 1 % | at most 3: met |" in done.table()
    assert done.troubles() == "targets missed: speed" and not done.failed()


def test_utilization_is_a_share_of_the_card_s_own_peak(part):
    """H200 SXM by its datasheet: 989 TFLOP/s in bf16, dense; 494 in TF32; 67 in float32."""
    utilization = part("cards").utilization
    assert utilization("NVIDIA H200", "bf16", 494.5e12) == pytest.approx(0.5)
    assert utilization("NVIDIA H200", "TF32", 494e12) == utilization("NVIDIA H200", "float32", 67e12) == 1
    assert utilization("NVIDIA H200 NVL", "bf16", 494.5e12) is None  # a slower card of nearly that name


def test_the_network_is_that_of_the_paper(part):
    """35.7 M weights (Ho et al. 2020, appendix B); 37.3 GFLOP an image, as cifar10.yaml states."""
    network = part("network")
    setting = SimpleNamespace(quick=False, folder=Path())
    config = network.recipe_network(setting)
    assert network.new_network(config).num_parameters() / 1e6 == pytest.approx(35.7, abs=0.05)
    assert network.training_flops(config) / 1e9 == pytest.approx(37.3, abs=0.05)
    assert network.arguments(setting, "noise").run.train_batch_size == 128
