"""What it takes to have the project loaded: the time of its import, and the most memory that training and sampling hold."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_training import Loop, OurTraining, our_words
from measure import Row, Settings, count_row, environment, ratio_row, run_child, turns
from models import describe, make_images

PEER, CLASSES = "import diffusers", "from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel"


def seconds_of(code: str) -> float:
    """Of a fresh interpreter that runs it."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    after = os.times()
    if Settings.clock == "wall":
        return time.perf_counter() - started
    return sum(after[2:4]) - sum(before[2:4])  # user and system time of children


def startup() -> list[Row]:
    pairs = {
        "`import ddpm_notes_pipeline` on top": (PEER, f"{PEER}, ddpm_notes_pipeline"),
        "`from ddpm_notes_pipeline import DDPMNotesPipeline` on top": (
            CLASSES,
            f"{CLASSES}; from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler",
        ),
    }
    rows = []
    for what, (theirs, ours) in pairs.items():
        times: dict[str, list[float]] = {theirs: [], ours: []}
        for turn in range(turns(11) + 1):
            for code in (theirs, ours):
                seconds = seconds_of(code)
                if turn:
                    times[code].append(seconds)
        rows.append(ratio_row(what, f"`{theirs}`", times[theirs], times[ours], "<= 1.05"))
    return rows


SAMPLE = """
import sys, json, resource
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
from models import BATCH, make_unet
{imports}
pipeline = {made}
pipeline.set_progress_bar_config(disable=True)
pipeline(batch_size=BATCH, num_inference_steps=5)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""
SAMPLERS = {
    "peer": (
        "from diffusers import DDPMPipeline, DDPMScheduler",
        "DDPMPipeline(make_unet({!r}).eval(), DDPMScheduler())",
    ),
    "ours": (
        "from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler",
        "DDPMNotesPipeline(make_unet({!r}).eval(), DDPMNotesScheduler())",
    ),
}


def memory() -> list[Row]:
    """Resident memory of fresh processes at its highest: 16 images, float32, nothing compiled."""
    rows = []
    for size in ("S", "L"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            peaks = {}
            for kind, (imports, made) in SAMPLERS.items():
                script = folder / f"{kind}.py"
                here = str(Path(__file__).parent)
                script.write_text(SAMPLE.format(here=here, imports=imports, made=made.format(size)))
                peaks[kind] = float(run_child(str(script)))  # type: ignore[arg-type]
            rows.append(
                count_row(
                    f"peak of sampling {describe(size)}",
                    "`DDPMPipeline`",
                    peaks["peer"],
                    peaks["ours"],
                    "MiB",
                    "<= 1.0",
                )
            )

            images = make_images(size, folder)
            peer = Loop("peer", size, str(images), folder / "peer")
            try:
                peer.run(8)
                theirs = peer.peak_mib()
            finally:
                peer.end()
            ours = OurTraining(folder / "ours", our_words(size, images, folder, fast=False), logging_steps=2)
            try:
                while ours.done() < 8:
                    ours.check()
                    time.sleep(0.05)
                ours.signal(signal.SIGSTOP)
                mine = ours.peak_mib()
            finally:
                ours.end()
            rows.append(
                count_row(f"peak of training {describe(size)}", "official script's loop", theirs, mine, "MiB", "<= 1.0")
            )
    return rows
