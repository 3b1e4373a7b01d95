"""Checkpoints that are whole or not there.

A run is a pure function of (config, seed, step), so a checkpoint is: the weights, their average, the optimizer, the step number, and
the few things with a history (timestep sampler, loss scale, counts of updates left out). It is written aside by every process, flushed, listed file by file with
digests, and only then renamed to `checkpoint-N`. What carries that name and agrees with its list is whole.
"""

import hashlib
import json
import logging
import os
import shutil
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


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those written before are as they were."""


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    ema: EMAModel | None,
    sampler: TimestepSampler,
    guard: UpdateGuard,
    run: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-{step}`; called by every process.

    Args:
        step: optimizer steps done. run: what the run is (seed, batch, data): kept to compare with when it goes on.
        total_limit: keep only the newest so many checkpoints, this one among them.

    Raises:
        CheckpointError: the disk is full or the like; older checkpoints are as they were.
        FailedElsewhere: so it is for another process.
    """
    final = output_dir / f"checkpoint-{step}"
    aside, replaced = output_dir / f".checkpoint-{step}.partial", output_dir / f".checkpoint-{step}.replaced"
    try:
        with failing_together(accelerator):
            if accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        with failing_together(accelerator):
            accelerator.save_state(str(aside))
        with failing_together(accelerator):
            if accelerator.is_main_process:
                state = {"step": step, "ema_step": ema.optimization_step if ema else None}
                _complete(aside, ema, sampler, state | {"updates": guard.state_dict(), "run": run})
                if final.exists():  # the same step of an earlier try: kept until this one stands in its place
                    os.rename(final, replaced)
                os.replace(aside, final)
                _flush(output_dir)
                shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:  # torch and safetensors have exceptions of their own for a full disk
        if accelerator.is_main_process:
            if replaced.exists() and not final.exists():
                os.rename(replaced, final)
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, FailedElsewhere):
            raise
        raise CheckpointError(
            f"could not write {final}: {error}. Older checkpoints in {output_dir} are as they were."
        ) from error
    if accelerator.is_main_process and total_limit is not None:
        others = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint != final]
        for old in others[total_limit - 1 :]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _complete(aside: Path, ema: EMAModel | None, sampler: TimestepSampler, state: dict[str, Any]) -> None:
    """Add what only one process writes, flush all files, and list them with `state` in the manifest."""
    if ema is not None:
        averages = {f"{i:05d}": p.contiguous() for i, p in enumerate(ema.shadow_params)}
        save_file(averages, aside / "ema.safetensors", {"optimization_step": str(ema.optimization_step)})
    save_file(sampler.state_dict(), aside / "timestep_sampler.safetensors")
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    listed = {str(path.relative_to(aside)): {"size": path.stat().st_size, "sha256": _digest(path)} for path in files}
    (aside / MANIFEST).write_text(json.dumps(state | {"files": listed}, indent=2), encoding="utf-8")
    _flush(aside / MANIFEST)


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    ema: EMAModel | None,
    sampler: TimestepSampler,
    guard: UpdateGuard,
    run: dict[str, Any],
) -> int:
    """Put everything back as it was; returns the number of steps done. Called by every process.

    Raises:
        ValueError: the checkpoint belongs to another run (another seed, batch size, data set...), or has no average to go on with.
    """
    state = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    changed = {name: (state["run"].get(name), value) for name, value in run.items() if state["run"].get(name) != value}
    if changed:
        differences = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items())
        raise ValueError(
            f"{checkpoint} belongs to another run: {differences}. Resume with its settings, or train into another folder"
        )
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        averages = load_file(checkpoint / "ema.safetensors")
        for i, parameter in enumerate(ema.shadow_params):
            parameter.data.copy_(averages[f"{i:05d}"])
        ema.optimization_step = state["ema_step"]
    sampler.load_state_dict(load_file(checkpoint / "timestep_sampler.safetensors"))
    guard.load_state_dict(state["updates"])
    return state["step"]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        state = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        listed = state["files"]
        if checkpoint.name != f"checkpoint-{state['step']}":
            return f"{MANIFEST} is that of step {state['step']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in listed.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            return f"{name} is missing or not {expected['size']} bytes long"
        if _digest(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, or "latest", the newest whole one.

    None where "latest" finds no checkpoint at all: a machine that is started again with one and the same command begins at the beginning.

    Raises:
        ValueError: all are damaged, or the one named is.
    """
    if wanted != "latest":
        checkpoint = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        fault = damage(checkpoint)
        if fault is not None:
            raise ValueError(f"--resume_from_checkpoint is {wanted}, and {checkpoint} is no whole checkpoint: {fault}")
        return checkpoint
    for checkpoint in list_checkpoints(output_dir):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("passing over %s: %s", checkpoint, fault)
    if list_checkpoints(output_dir):
        raise ValueError(f"--resume_from_checkpoint is latest, and {output_dir} has no whole checkpoint")
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
