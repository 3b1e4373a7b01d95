"""Checkpoints that are whole or not there.

A run is a pure function of (config, seed, step), so a checkpoint is the weights, their average, the
optimizer, the step number and the little that has a history: the timestep sampler, the loss scale,
the counts of skipped updates. All processes write it to a temporary folder, where it is flushed and
listed file by file with digests; only then is the folder renamed to `checkpoint-N`. A folder of
that name whose files match its list is whole.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from ..objectives import TimestepSampler
from .stops import FailedElsewhere, failing_together
from .updates import UpdateGuard

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
WINDOWS = os.name == "nt"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older ones are unchanged."""


@dataclass
class CheckpointState:
    """What a checkpoint holds besides what accelerate saves (network, optimizer, loss scale).

    Attributes:
        average: averaged weights; None without.
        identity: what must be equal for a run to resume from it: seed, batch, data set, ...
    """

    average: EMAModel | None
    timestep_sampler: TimestepSampler
    guard: UpdateGuard
    identity: dict[str, Any]

    def save(self, folder: Path, step: int) -> None:
        """Write these to `folder`, flush all its files, and list them in the manifest."""
        average_step = None
        if self.average is not None:
            average_step = self.average.optimization_step
            averages = {f"{i:05d}": p.contiguous() for i, p in enumerate(self.average.shadow_params)}
            save_file(averages, folder / "ema.safetensors")
        save_file(self.timestep_sampler.state_dict(), folder / "timestep_sampler.safetensors")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            flush(path)
        listed = {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": digest(f)} for f in files}
        state = {"step": step, "ema_step": average_step, "updates": self.guard.state_dict(), "run": self.identity}
        (folder / MANIFEST).write_text(json.dumps(state | {"files": listed}, indent=2), encoding="utf-8")
        flush(folder / MANIFEST)

    def load(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Restore these from `folder`."""
        if self.average is not None:
            averages = load_file(folder / "ema.safetensors")
            for i, parameter in enumerate(self.average.shadow_params):
                parameter.data.copy_(averages[f"{i:05d}"])
            self.average.optimization_step = manifest["ema_step"]
        self.timestep_sampler.load_state_dict(load_file(folder / "timestep_sampler.safetensors"))
        self.guard.load_state_dict(manifest["updates"])


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: CheckpointState, total_limit: int | None = None
) -> Path:
    """Write `checkpoint-{step}`. Collective: every rank must call it.

    Args:
        step: optimizer steps done.
        total_limit: number of checkpoints to keep: this one and the newest others.

    Raises:
        CheckpointError: it could not be written (disk full, ...); older checkpoints are unchanged.
        FailedElsewhere: the same on another rank.
    """
    final = output_dir / f"checkpoint-{step}"
    partial, replaced = output_dir / f".checkpoint-{step}.partial", output_dir / f".checkpoint-{step}.replaced"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        with failing_together(accelerator):
            accelerator.save_state(str(partial))  # makes the folder
        with failing_together(accelerator):
            if accelerator.is_main_process:
                state.save(partial, step)
                if final.exists():  # of an earlier try: kept until this one is in place
                    os.rename(final, replaced)
                os.replace(partial, final)
                flush(output_dir)
                shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:  # torch and safetensors raise their own types for a full disk
        if accelerator.is_main_process:
            if replaced.exists() and not final.exists():
                os.rename(replaced, final)
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, FailedElsewhere):
            raise
        raise CheckpointError(f"could not write {final}: {error}. Older checkpoints there are unchanged.") from error
    if accelerator.is_main_process and total_limit is not None:
        others = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint != final]
        for old in others[total_limit - 1 :]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, state: CheckpointState) -> int:
    """Restore a run; returns the number of steps done. Collective: every rank must call it.

    Raises:
        ValueError: the checkpoint belongs to another run (seed, batch size, data set, ...).
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    saved = manifest["run"]
    # What an earlier version did not record is taken to be the same.
    changed = [name for name, value in state.identity.items() if saved.get(name, value) != value]
    if changed:
        differences = "; ".join(f"{name} was {saved[name]!r} and is {state.identity[name]!r}" for name in changed)
        raise ValueError(
            f"{checkpoint} belongs to another run: {differences}. Resume with its settings, or train into another folder"
        )
    accelerator.load_state(str(checkpoint))
    state.load(checkpoint, manifest)
    return manifest["step"]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=steps_of, reverse=True)


def steps_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def set_aside_later(output_dir: Path, done: int) -> list[str]:
    """Rename the checkpoints after step `done`, of another continuation; returns the new names."""
    names = []
    for checkpoint in list_checkpoints(output_dir):
        if steps_of(checkpoint) > done:
            free = (f"{checkpoint.name}.old{i or ''}" for i in itertools.count())
            names.append(next(name for name in free if not (output_dir / name).exists()))
            checkpoint.rename(output_dir / names[-1])
    return names


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None for a whole one."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["files"]
        if checkpoint.name != f"checkpoint-{manifest['step']}":
            return f"{MANIFEST} is that of step {manifest['step']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in listed.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            return f"{name} is missing or not {expected['size']} bytes long"
        if digest(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, a name, or "latest".

    "latest" is the newest whole one. None if "latest" finds no checkpoint at all, so that one and
    the same command both starts and resumes a run.

    Raises:
        ValueError: the named one is damaged, or all are.
    """
    if wanted != "latest":
        checkpoint = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        fault = damage(checkpoint)
        if fault is not None:
            raise ValueError(
                f"--resume_from_checkpoint is {wanted}, and {checkpoint} is not a whole checkpoint: {fault}"
            )
        return checkpoint
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in checkpoints:
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        if os.environ.get("RANK", "0") == "0":  # every rank looks
            logger.warning("skipping %s: %s", checkpoint, fault)
    if checkpoints:
        raise ValueError(f"--resume_from_checkpoint is latest, and {output_dir} has no whole checkpoint")
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to disk."""
    # Windows opens no folders, and syncs only what is open for writing.
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
