"""How the parts ended, as a table and as JSON."""

import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from gpu_parts.setting import Row

PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "huggingface_hub", "datasets", "numpy")
LAST_LINES = 15  # of a failed part's log


@dataclass
class Result:
    """How a part ended (passed, failed, timed out, not started), its log, and its rows so far."""

    name: str
    status: str
    seconds: float
    log: Path
    rows: list[Row] = field(default_factory=list)

    def last_lines(self) -> list[str]:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = (line.rpartition("\r")[2].rstrip() for line in text.split("\n"))
        return [line for line in lines if line][-LAST_LINES:]


@dataclass
class Report:
    """All of them."""

    device: str
    quick: bool
    seconds: float
    results: list[Result]

    def __post_init__(self) -> None:
        self.date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        self.card = torch.cuda.get_device_name() if self.device == "cuda" else "a CPU"
        self.versions = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
        self.versions |= {name: importlib.metadata.version(name) for name in PACKAGES}

    def write(self, output_dir: Path) -> None:
        (output_dir / "gpu-check.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        (output_dir / "gpu-check.md").write_text(self.table(), encoding="utf-8")

    def as_dict(self) -> dict:
        parts = {
            result.name: {
                "status": result.status,
                "seconds": round(result.seconds, 1),
                "rows": [asdict(row) for row in result.rows],
                "last_lines": [] if result.status == "passed" else result.last_lines(),
            }
            for result in self.results
        }
        about = {"date": self.date, "card": self.card, "device": self.device, "quick": self.quick}
        return {**about, "seconds": round(self.seconds, 1), "versions": self.versions, "parts": parts}

    def table(self) -> str:
        """Markdown."""
        quick = "tiny networks, not compiled (--quick): the figures mean nothing; " if self.quick else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.date}, {self.card}; {quick}{self.seconds:.0f} s in all; {versions}"]
        lines += ["", "| measured | figure | target |", "|---|---|---|"]
        for result in self.results:
            lines.append(f"| **{result.name}** | {result.status} after {result.seconds:.0f} s | |")
            for row in result.rows:
                judged = {True: ": met", False: ": **missed**", None: ""}[row.met]
                lines.append(f"| {row.what} | {row.figure} | {row.target}{judged} |")
        return "\n".join(lines) + "\n"

    def troubles(self) -> str:
        """The end of each failed part's log, and the targets that are missed."""
        lines = []
        for result in self.failed():
            lines += [f"{result.name} {result.status}; {result.log} ends with:"]
            lines += [f"    {line}" for line in result.last_lines()]
        missed = [row.what for result in self.results for row in result.rows if row.met is False]
        return "\n".join(lines + ([f"targets missed: {'; '.join(missed)}"] if missed else []))

    def failed(self) -> list[Result]:
        return [result for result in self.results if result.status != "passed"]
