"""Trackers (trackio, tensorboard, wandb): a view of the logs that cannot stop or slow the run.

A tracker works in a thread of its own: it may fail, or wait for a network that is not there.
"""

import atexit
import contextlib
import importlib
import importlib.util
import io
import logging
import math
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .arguments import Arguments, as_config

logger = logging.getLogger(__name__)
PROJECT = "ddpm_notes_pipeline"
PATIENCE = 10.0  # seconds to wait for a tracker, at the start and at the end


def find_tracker(report_to: str) -> str | None:
    """The tracker that `--report_to` means: "auto" is trackio if it is installed.

    Raises:
        ValueError: the named one is not installed.
    """
    if report_to == "auto":
        return "trackio" if importlib.util.find_spec("trackio") else None
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(f"--report_to is {report_to}, which is not installed: pip install {report_to}, or 'none'")
    return None if report_to == "none" else report_to


class Tracker:
    """One of accelerate's trackers in a thread of its own; idle without one and on other ranks.

    What is logged is queued, and the call returns. A tracker that fails is reported once and then
    dropped. (trackio, for one, asks the Hub who the user is, without a timeout. It stores runs in
    the Hugging Face cache, or in `TRACKIO_DIR`.)

    Args:
        accelerator: made with `log_with` of the same tracker.
        settings: --output_dir's last part is the run's name; tensorboard and wandb write inside it.
        resume: continue the tracker's run of that name.
    """

    def __init__(self, accelerator: Accelerator, settings: Arguments, resume: bool = False) -> None:
        self.accelerator = accelerator
        self.name = name = find_tracker(settings.run.report_to) if accelerator.is_main_process else None
        self.jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=10_000)
        self.started, self.finished = threading.Event(), threading.Event()
        if name is None:
            self.finished.set()
            return
        if name == "wandb":
            os.environ.setdefault("WANDB_SILENT", "true")
        output_dir, again = Path(settings.run.output_dir), "allow" if resume else None
        run_name = output_dir.absolute().name
        arguments = {
            # its CPU monitor adds a thread and says nothing about training; the GPU monitor stays
            "trackio": {"name": run_name, "resume": again or "never", "auto_log_cpu": False},
            "wandb": {"name": run_name, "resume": again, "dir": str(output_dir)},
        }
        text = {key: str(value) for key, value in as_config(*settings).items()}
        self.jobs.put(lambda: accelerator.init_trackers(PROJECT, text, arguments))
        self.jobs.put(self.started.set)
        with contextlib.redirect_stdout(io.StringIO()):  # trackers greet between the lines of the run
            with contextlib.suppress(Exception):  # needs no network, but may take long: not limited
                importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
            threading.Thread(target=self._work, name="tracker", daemon=True).start()
            if not self.started.wait(PATIENCE):
                logger.warning("%s has not started after %g s; training continues without waiting", name, PATIENCE)
        atexit.register(self.close)  # however the run ends

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Log the finite numbers of a step."""
        numbers = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._put(lambda: self.accelerator.log(numbers, step=step))

    def log_image(self, step: int, key: str, picture: Image.Image) -> None:
        """Log a picture."""
        self._put(lambda: self._log_image(step, key, np.asarray(picture.convert("RGB"))))

    def close(self) -> None:
        """Let it finish what was queued, within its patience; do not wait if it never started."""
        atexit.unregister(self.close)
        with contextlib.redirect_stdout(io.StringIO()):
            self._put(None)
            if self.started.is_set():
                self.finished.wait(PATIENCE)
        if not self.finished.is_set():
            logger.warning("%s has not finished; what it shows of this run may be incomplete", self.name)
            self.finished.set()
        self.accelerator.trackers = []  # `end_training` would finish them again

    def _put(self, job: Callable[[], None] | None) -> None:
        if not self.finished.is_set():
            with contextlib.suppress(queue.Full):  # it has hung for long: drop the job
                self.jobs.put_nowait(job)

    def _work(self) -> None:
        try:
            while (job := self.jobs.get()) is not None:
                job()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except (Exception, SystemExit) as error:
            logger.warning("%s failed and is dropped; training continues: %s", self.name, error)
        finally:
            self.finished.set()
            self.started.set()

    def _log_image(self, step: int, key: str, pixels: np.ndarray) -> None:
        if self.name == "trackio":  # accelerate's wrapper has no log_images
            import trackio

            self.accelerator.log({key: trackio.Image(pixels)}, step=step)
        else:
            for tracker in self.accelerator.trackers:
                options = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
                tracker.log_images({key: pixels[None]}, step=step, **options)
