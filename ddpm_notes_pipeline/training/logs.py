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
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..pipeline_ddpm_notes import BitsPerDimOutput
from .arguments import Arguments
from .stops import failing_together
from .trackers import PROJECT, Tracker

# Figures of a step that differ from rank to rank.
AVERAGED = ("loss",)
# All that a run logs into its folder.
LOGS = ("loss.jsonl", "validation.jsonl", "metrics.jsonl", PROJECT, "wandb")


class StepLog:
    """Figures of some steps, one JSON line each; the newest go to the tracker.

    Args:
        name: of the file, and prefix of the figures' names in the tracker.
        done: rows of later steps are cut from the file.
    """

    def __init__(self, tracker: Tracker, output_dir: Path, name: str, done: int) -> None:
        self.accelerator, self.tracker, self.prefix = tracker.accelerator, tracker, f"{name}_"
        self.path = output_dir / f"{name}.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= done] if done else []
        if self.accelerator.is_main_process and self.path.exists():
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(partial, self.path)  # so that a full disk loses no row

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Write what was measured on the weights after `step` optimizer steps. Collective.

        A step that is already logged is not logged again.
        """
        if not self.has(step):
            self.append([{"step": step} | figures])

    def has(self, step: int) -> bool:
        """Whether the step has its row."""
        return any(row["step"] == step for row in self.rows)

    def append(self, rows: list[dict[str, Any]], **shown: float) -> None:
        """Write rows, and show the last of them, and `shown`, in the tracker. Collective.

        Non-finite numbers become null: JSON has neither NaN nor infinity.
        """
        written = [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in rows]
        with failing_together(self.accelerator, f"could not write {self.path}"):
            if self.accelerator.is_main_process:
                with self.path.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in written)
        self.rows += written
        figures = {f"{self.prefix}{name}": value for name, value in (rows[-1] | shown).items() if name != "step"}
        self.tracker.log(rows[-1]["step"], figures)


class LossLog(StepLog):
    """The figures of every step.

    Attributes:
        first: steps done before this launch. step: the last one written.

    Those in `waiting` (numbers or scalars on the device) are averaged and written by `write`, now
    and then: no sync before.
    """

    def __init__(self, tracker: Tracker, output_dir: Path, done: int, batch_size: int) -> None:
        if tracker.accelerator.is_main_process:
            (output_dir / "loss.jsonl").touch()  # fails now if the folder cannot be written to
        super().__init__(tracker, output_dir, "loss", done)
        self.prefix, self.batch_size = "", batch_size
        self.first = self.step = done
        self.waiting: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.began = self.since = time.monotonic()
        self.unwritten = 0.0  # seconds of training between the last write and `since`
        self.training = 0.0  # seconds of training alone, up to the last write
        self.elapsed = 0.0  # seconds in all, up to the last write

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count as training."""
        self.unwritten += time.monotonic() - self.since
        try:
            yield
        finally:
            self.since = time.monotonic()

    def write(self, bar: Any) -> None:
        """Write the steps that are waiting, `AVERAGED` over processes. Collective."""
        read = {name: self._read(name) for name in self.waiting[0]}
        now = time.monotonic()  # after the sync, when the steps are done
        seconds = self.unwritten + now - self.since
        self.unwritten, self.since, self.elapsed = 0.0, now, now - self.began
        self.training += seconds
        rate = len(self.waiting) * self.batch_size / seconds if seconds > 0 else math.nan
        new = [
            {"step": i, **dict(zip(read, values))} for i, values in enumerate(zip(*read.values()), start=self.step + 1)
        ]
        self.step += len(new)
        self.waiting.clear()
        self.append(new, images_per_second=rate)
        bar.set_postfix_str(f"loss {sum(read['loss']) / len(new):.4f}, {rate:.0f} images/s")

    def _read(self, name: str) -> list[float]:
        """A figure of the steps that are waiting, read from the device. Collective."""
        values = [row[name] for row in self.waiting]
        if not isinstance(values[0], torch.Tensor):
            return values
        stacked = torch.stack(values)
        return (self.accelerator.reduce(stacked, "mean") if name in AVERAGED else stacked).tolist()

    def history(self) -> tuple[list[int], list[float]]:
        """Steps and losses since the start of the run; NaN for non-finite losses."""
        losses = [math.nan if row["loss"] is None else row["loss"] for row in self.rows]
        return [row["step"] for row in self.rows], losses


class RunLogs:
    """The logs of a run, cut back to its first `done` steps. Collective.

    Attributes:
        loss, validation, metrics: the files. tracker: what shows them.
    """

    def __init__(self, accelerator: Accelerator, settings: Arguments, done: int) -> None:
        run, folder = settings.run, Path(settings.run.output_dir)
        self.tracker = Tracker(accelerator, settings, resume=done > 0)
        with failing_together(accelerator, f"could not write {folder}/loss.jsonl"):
            self.loss = LossLog(self.tracker, folder, done, run.train_batch_size)
            self.validation = StepLog(self.tracker, folder, "validation", done)
            self.metrics = StepLog(self.tracker, folder, "metrics", done)


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, up to one that was cut short."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text().splitlines():
            rows.append(json.loads(text))
    return rows
