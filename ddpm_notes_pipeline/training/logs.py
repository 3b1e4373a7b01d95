"""What a run records while it trains: loss of each step, now and then bits/dim and sample metrics.

The JSON-lines files are the record. They are always written, are the same for any number of
processes, and are cut back to the step that a resumed run starts from.
"""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..pipeline_ddpm_notes import BitsPerDimOutput
from .stops import failing_together
from .trackers import PROJECT, Tracker

# All that a run logs into its folder.
LOGS = ("loss.jsonl", "validation.jsonl", "metrics.jsonl", PROJECT, "wandb")


AVERAGED = {"loss"}  # over processes; the other figures of a step are the same on every rank


class LossLog:
    """The figures of every step, one JSON line each.

    `add` keeps them on the device; `write`, now and then, averages and writes them.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, done: int, batch_size: int, tracker: Tracker | None = None
    ) -> None:
        self.accelerator, self.path, self.step, self.batch_size = accelerator, path, done, batch_size
        self.tracker = tracker
        self.waiting: list[dict[str, torch.Tensor | float]] = []
        self.rows = keep_rows(accelerator, path, done)
        if accelerator.is_main_process:
            path.touch()  # fails now if the folder cannot be written to
        self.seconds, self.since = 0.0, time.monotonic()  # of training alone, since the last write
        self.pauses = 0.0  # seconds, over the whole run

    def add(self, figures: dict[str, torch.Tensor | float]) -> None:
        """Remember the figures of one step (numbers or scalars on the device), without a sync."""
        self.waiting.append(figures)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count in images/s."""
        began = time.monotonic()
        self.seconds += began - self.since
        try:
            yield
        finally:
            self.since = time.monotonic()
            self.pauses += self.since - began

    def write(self, bar: Any) -> None:
        """Average over processes and write the steps added since the last call. Collective."""
        columns = {name: self._column(name) for name in self.waiting[0]}
        losses = columns["loss"]
        # read after the sync, when the steps are done
        seconds = self.seconds + time.monotonic() - self.since
        self.seconds, self.since = 0.0, time.monotonic()
        rate = len(losses) * self.batch_size / seconds if seconds > 0 else math.nan
        rows = zip(*columns.values(), strict=True)
        new = [{"step": self.step + i} | dict(zip(columns, row)) for i, row in enumerate(rows, start=1)]
        self.step += len(new)
        self.waiting.clear()
        with failing_together(self.accelerator, f"could not write {self.path}"):
            self.rows += write_rows(self.accelerator, self.path, new)
        if self.tracker is not None:
            self.tracker.log({**new[-1], "images_per_second": rate})
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}, {rate:.0f} images/s")

    def _column(self, name: str) -> list[float]:
        """A figure of the steps that are waiting."""
        values: Any = [figures[name] for figures in self.waiting]
        if not isinstance(values[0], torch.Tensor):
            return values
        column = torch.stack(values)
        return (self.accelerator.reduce(column, "mean") if name in AVERAGED else column).tolist()

    def history(self) -> tuple[list[int], list[float]]:
        """Steps and losses since the start of the run; NaN for non-finite losses."""
        losses = [math.nan if row["loss"] is None else row["loss"] for row in self.rows]
        return [row["step"] for row in self.rows], losses


class StepLog:
    """Figures measured at some steps, one JSON line each.

    Args:
        name: of the file, and prefix of the figures' names in a tracker.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, name: str, done: int, tracker: Tracker | None = None
    ) -> None:
        self.accelerator, self.name, self.tracker = accelerator, name, tracker
        self.path = output_dir / f"{name}.jsonl"
        self.rows = keep_rows(accelerator, self.path, done)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Write what was measured on the weights after `step` optimizer steps. Collective.

        A step that has its row keeps it.
        """
        with failing_together(self.accelerator, f"could not write {self.path}"):
            if self.has(step):
                return
            self.rows += write_rows(self.accelerator, self.path, [{"step": step} | figures])
            if self.tracker is not None:
                self.tracker.log({"step": step} | {f"{self.name}_{name}": value for name, value in figures.items()})

    def has(self, step: int) -> bool:
        """Whether the step has its row."""
        return any(row["step"] == step for row in self.rows)


@dataclass
class RunLogs:
    """The logs of a run; the tracker is on the main process alone."""

    loss: LossLog
    validation: StepLog
    metrics: StepLog
    tracker: Tracker | None

    @classmethod
    def open(
        cls, accelerator: Accelerator, output_dir: Path, done: int, batch_size: int, tracker: Tracker | None
    ) -> "RunLogs":
        """Open the files, cut back to the first `done` steps. Collective."""
        with failing_together(accelerator, f"could not write {output_dir}/loss.jsonl"):
            return cls(
                LossLog(accelerator, output_dir / "loss.jsonl", done, batch_size, tracker),
                StepLog(accelerator, output_dir, "validation", done, tracker),
                StepLog(accelerator, output_dir, "metrics", done, tracker),
                tracker,
            )

    def log_image(self, step: int, name: str, image: Any) -> None:
        """Show a picture in the tracker, if there is one."""
        if self.tracker is not None:
            self.tracker.log_image(step, name, image)

    def close(self) -> None:
        """Let the tracker finish."""
        if self.tracker is not None:
            self.tracker.close()


@contextlib.contextmanager
def warning_once(accelerator: Accelerator) -> Iterator[None]:
    """A block whose warnings, the same on every rank, appear on the main process alone."""
    if accelerator.is_main_process:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bits_per_dim_figures(result: BitsPerDimOutput) -> dict[str, float]:
    """A row of validation.jsonl: bits/dim with standard error and parts."""
    figures = {"bits_per_dim": result.total, "standard_error": result.standard_error}
    figures |= {name: getattr(result, name) for name in ("prior", "diffusion", "decoder")}
    return figures | {"images": len(result.per_image)}


def keep_rows(accelerator: Accelerator, path: Path, done: int) -> list[dict[str, Any]]:
    """The rows of the first `done` steps; later ones are cut from the file."""
    rows = [row for row in read_rows(path) if row["step"] <= done] if done else []
    if accelerator.is_main_process and (rows or path.exists()):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, path)  # so that a full disk loses no row
    return rows


def write_rows(accelerator: Accelerator, path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Append rows to the file, on the main process; returns them as written.

    Non-finite numbers become null: JSON has neither NaN nor infinity.
    """
    rows = [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in rows]
    if accelerator.is_main_process:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, up to one that was cut short."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text().splitlines():
            rows.append(json.loads(text))
    return rows
