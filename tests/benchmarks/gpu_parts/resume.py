"""Training on MNIST by `accelerate launch`, stopped and resumed, beside the same run unstopped."""

import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file

from gpu_parts.setting import NEEDS_CUDA, Row, Setting
from measure import HERE
from tests.support.comparing import assert_same, assert_same_checkpoint, weights
from tests.support.launching import describe, launch

SCRIPT = HERE / "gpu_parts" / "deterministic_train.py"
FLAGS = (
    "--dataset_name mnist --block_out_channels 32 64 --layers_per_block 1 --attention_levels 1 --dropout 0.1 "
    "--train_batch_size 64 --max_train_steps 40 --checkpointing_steps 1000 --lr_warmup_steps 5 --learning_rate 1e-3 "
    "--num_samples 1 --ddpm_num_inference_steps 2 --report_to none --no_fit_levels"
).split()
TINY = "--block_out_channels 16 16 --train_batch_size 4 --max_train_steps 6 --lr_warmup_steps 1 --max_train_samples 64".split()


def measure(setting: Setting) -> Iterator[Row]:
    precisions, wrong = ("bf16", "fp16") if setting.cuda else ("bf16",), []
    with ThreadPoolExecutor(2 * len(precisions)) as pool:
        runs = {precision: start(pool, setting, precision) for precision in precisions}
        for precision, futures in runs.items():
            figure = "weights and optimizer equal bit for bit"
            try:
                whole, stopped = (future.result() for future in futures)
                check_equal(whole, stopped, steps(setting))
            except Exception as error:  # the other precision is still of interest
                traceback.print_exc()
                figure, wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}", [*wrong, precision]
            yield Row(title(precision), figure)
    if not setting.cuda:
        yield Row(title("fp16"), NEEDS_CUDA)
    if wrong:
        raise RuntimeError(f"wrong in {' and '.join(wrong)}, see above")


def title(precision: str) -> str:
    return f"{precision} on MNIST, deterministic kernels, stopped and resumed"


def steps(setting: Setting) -> int:
    return 6 if setting.quick else 40


def start(pool: ThreadPoolExecutor, setting: Setting, precision: str) -> tuple:
    """Futures of two folders: of the run that was not stopped, and of the one that was."""

    def run(name: str, *flags: str, stop_at: int | None = None) -> Path:
        folder = setting.folder / f"{precision}-{name}"
        line = [*FLAGS, *(TINY if setting.quick else []), "--mixed_precision", precision, "--output_dir", folder]
        line += ["--cache_dir", setting.folder / f"cache-{precision}-{name}", *flags]
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | ({} if stop_at is None else {"STOP_AT": str(stop_at)})
        expected = 0 if stop_at is None else None  # the launcher has a status of its own for a stopped script
        result = launch(*line, script=SCRIPT, env=environment, expect=expected)
        started = f"on 1 process(es) of {setting.device.type}, {precision} mixed precision"
        if started not in result.stdout or (stop_at is not None and "stopped by SIGTERM" not in result.stderr):
            raise RuntimeError(f"{folder.name} is not the run it should be: {describe(result)}")
        return folder

    def stop_and_resume() -> Path:
        run("stopped", stop_at=steps(setting) // 2)
        return run("stopped", "--resume_from_checkpoint", "latest")

    return pool.submit(run, "whole"), pool.submit(stop_and_resume)


def check_equal(whole: Path, stopped: Path, last: int) -> None:
    """AssertionError unless both ended with the same checkpoint and model, and trained after it."""
    half, end = stopped / f"checkpoint-{last // 2 + 1}", f"checkpoint-{last}"
    assert_same(weights(stopped), weights(whole), "averaged weights")
    assert_same_checkpoint(stopped / end, whole / end)
    before, after = (load_file(folder / "model.safetensors") for folder in (half, stopped / end))
    assert any(not value.equal(after[name]) for name, value in before.items()), "nothing was trained after the stop"
