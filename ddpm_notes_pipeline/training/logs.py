"""What a run says about itself while it trains: a loss for every step, bits/dim now and then, and a tracker.

The two files of JSON lines are the record: always written, the same for every number of processes, put back to the step that a resumed run
goes on from. A tracker (trackio, tensorboard, wandb) is a window on them: it works on a thread of its own, so that one that fails, or waits
for a network that is not there, neither stops nor slows the run.
"""

import atexit
import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..pipeline_ddpm_notes import BitsPerDimOutput

logger = logging.getLogger(__name__)
PROJECT = "ddpm_notes_pipeline"
LOGS = ("loss.jsonl", "validation.jsonl", "metrics.jsonl", PROJECT, "wandb")  # in the folder of a run


class LossLog:
    """Loss, gradient norm and learning rate of every step, as one JSON line each; read from the accelerator only now and then."""

    def __init__(
        self, accelerator: Accelerator, path: Path, done: int, batch_size: int, tracker: "Tracker | None" = None
    ) -> None:
        self.accelerator, self.path, self.step, self.batch_size = accelerator, path, done, batch_size
        self.tracker = tracker
        self.waiting: list[tuple[torch.Tensor, Any, float]] = []
        self.rows = keep_rows(accelerator, path, done)
        if accelerator.is_main_process:
            path.touch()  # a folder that cannot be written to is known at once
        self.seconds, self.since = 0.0, time.monotonic()  # of training alone, since rows were written last
        self.pauses = 0.0  # seconds of the whole run

    def add(self, loss: torch.Tensor, grad_norm: Any, learning_rate: float) -> None:
        """Remember one step, without waiting for it."""
        self.waiting.append((loss, torch.as_tensor(grad_norm, device=loss.device), learning_rate))

    @contextlib.contextmanager
    def paused(self) -> Any:
        """Time that is no training, and so does not count in images/s."""
        began = time.monotonic()
        self.seconds += began - self.since
        try:
            yield
        finally:
            self.since = time.monotonic()
            self.pauses += self.since - began

    def write(self, bar: Any) -> None:
        """Average over processes and write what has gathered."""
        losses = self.accelerator.reduce(torch.stack([loss for loss, _, _ in self.waiting]), "mean").tolist()
        seconds = self.seconds + time.monotonic() - self.since  # the losses are here, so their steps are done
        self.seconds, self.since = 0.0, time.monotonic()
        rate = len(losses) * self.batch_size / seconds if seconds > 0 else math.nan
        fresh = []
        for loss, (_, norm, learning_rate) in zip(losses, self.waiting, strict=True):
            self.step += 1
            fresh.append({"step": self.step, "loss": loss, "grad_norm": float(norm), "learning_rate": learning_rate})
        self.waiting.clear()
        self.rows += write_rows(self.accelerator, self.path, fresh)
        if self.tracker is not None:
            self.tracker.log({**fresh[-1], "images_per_second": rate})
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}, {rate:.0f} images/s")

    def history(self) -> tuple[list[int], list[float]]:
        """Steps and losses of the whole run, from before an interruption too; NaN for a loss that was not finite."""
        return [row["step"] for row in self.rows], [
            math.nan if row["loss"] is None else row["loss"] for row in self.rows
        ]


class StepLog:
    """Figures measured at some steps, as one JSON line each; `name` is the file's and what a tracker's names start with."""

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, name: str, done: int, tracker: "Tracker | None" = None
    ) -> None:
        self.accelerator, self.name, self.tracker = accelerator, name, tracker
        self.path = output_dir / f"{name}.jsonl"
        self.rows = keep_rows(accelerator, self.path, done)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Write what was measured on the weights after `step` optimizer steps."""
        self.rows += write_rows(self.accelerator, self.path, [{"step": step} | figures])
        if self.tracker is not None:
            self.tracker.log({"step": step} | {f"{self.name}_{name}": value for name, value in figures.items()})

    def has(self, step: int) -> bool:
        return any(row["step"] == step for row in self.rows)


def bits_per_dim_figures(result: BitsPerDimOutput) -> dict[str, float]:
    """A row of validation.jsonl: the averaged weights' bits/dim, with its standard error and parts."""
    figures = {"bits_per_dim": result.total, "standard_error": result.standard_error}
    figures |= {name: getattr(result, name) for name in ("prior", "diffusion", "decoder")}
    return figures | {"images": len(result.per_image)}


def keep_rows(accelerator: Accelerator, path: Path, done: int) -> list[dict[str, Any]]:
    """The rows of the first `done` steps; those of later ones, which will be made again, are taken out of the file."""
    rows = [row for row in read_rows(path) if row["step"] <= done] if done else []
    if accelerator.is_main_process and (rows or path.exists()):
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(aside, path)  # a full disk costs no row
    return rows


def write_rows(accelerator: Accelerator, path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows behind those of the file, on the main process, and return them as they are there: null for what is not finite.

    JSON has no NaN and no infinity.
    """
    rows = [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in rows]
    if accelerator.is_main_process:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one that a stop cut short is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text().splitlines():
            rows.append(json.loads(text))
    return rows


# ------------------------------------------------------------------------------------------------ trackers


def find_tracker(report_to: str) -> str | None:
    """The tracker that `--report_to` means: "auto" is trackio where it is installed.

    Raises:
        ValueError: one was named that is not installed.
    """
    if report_to == "auto":
        return "trackio" if importlib.util.find_spec("trackio") else None
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(f"--report_to is {report_to}, which is not installed: pip install {report_to}, or 'none'")
    return None if report_to == "none" else report_to


class Tracker:
    """One of accelerate's trackers on a thread of its own; made on the main process.

    What is logged is queued and the call returns. A tracker that fails is said once and then left alone. trackio, for one, asks the Hub who
    the user is, without a limit of time; it keeps what it is given in the Hugging Face cache (`TRACKIO_DIR` names another place).

    Args:
        accelerator: made with `log_with=[name]`.
        config: settings of the run.
        output_dir: its last part is the run's name; tensorboard and wandb write inside it.
        resume: go on with the tracker's run of that name.
        patience: seconds to wait for it, at the start and at the end.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        name: str,
        config: dict[str, Any],
        output_dir: Path,
        resume: bool = False,
        patience: float = 10.0,
    ) -> None:
        self.accelerator, self.name, self.patience = accelerator, name, patience
        run_name, again = output_dir.absolute().name, "allow" if resume else None
        if name == "wandb":
            os.environ.setdefault("WANDB_SILENT", "true")
        arguments = {
            # its monitor of the processor adds a thread and tells nothing about training; that of GPUs stays
            "trackio": {"name": run_name, "resume": again or "never", "auto_log_cpu": False},
            "wandb": {"name": run_name, "resume": again, "dir": str(output_dir)},
        }
        self.jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=10_000)
        self.started, self.finished = threading.Event(), threading.Event()
        text = {key: str(value) for key, value in config.items()}
        self.jobs.put(lambda: accelerator.init_trackers(PROJECT, text, arguments))
        self.jobs.put(self.started.set)
        with silence():
            with contextlib.suppress(Exception):  # takes no network, and may take long: not in the patience
                importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
            threading.Thread(target=self._work, name="tracker", daemon=True).start()
            if not self.started.wait(patience):
                logger.warning("%s has not started after %g s; the run goes on meanwhile", name, patience)
        atexit.register(self.close)  # however the run ends

    def log(self, values: dict[str, Any]) -> None:
        """Log numbers of the step `values["step"]`."""
        numbers = {key: value for key, value in values.items() if key != "step" and math.isfinite(value)}
        self._put(lambda: self.accelerator.log(numbers, step=values["step"]))

    def log_image(self, step: int, key: str, picture: Image.Image) -> None:
        """Log a picture."""
        self._put(lambda: self._log_image(step, key, np.asarray(picture.convert("RGB"))))

    def close(self) -> None:
        """Have it finish what was queued, within its patience; nothing is waited for if it never started."""
        atexit.unregister(self.close)
        with silence():
            self._put(None)
            if self.started.is_set():
                self.finished.wait(self.patience)
        if not self.finished.is_set():
            logger.warning("%s has not finished; what it shows of this run may be incomplete", self.name)
        self.accelerator.trackers = []  # `end_training` would finish them again

    def _put(self, job: Callable[[], None] | None) -> None:
        if not self.finished.is_set():
            with contextlib.suppress(queue.Full):  # it has hung for long: nobody waits
                self.jobs.put_nowait(job)

    def _work(self) -> None:
        try:
            while (job := self.jobs.get()) is not None:
                job()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except (Exception, SystemExit) as error:
            logger.warning("%s failed and is left alone; the run goes on: %s", self.name, error)
        finally:
            self.finished.set()
            self.started.set()

    def _log_image(self, step: int, key: str, pixels: np.ndarray) -> None:
        if self.name == "trackio":  # accelerate's wrapper has no log_images
            import trackio

            self.accelerator.log({key: trackio.Image(pixels)}, step=step)
        else:
            for tracker in self.accelerator.trackers:
                tracker.log_images({key: pixels[None]}, step=step, **self._image_options())

    def _image_options(self) -> dict[str, Any]:
        return {"dataformats": "NHWC"} if self.name == "tensorboard" else {}


@contextlib.contextmanager
def silence() -> Any:
    """Nothing on stdout: trackers greet and take leave there, in the midst of what the run prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        finally:
            sys.stdout.flush()
