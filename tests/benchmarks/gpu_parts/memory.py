"""Peak memory of the tensors of training and of sampling with the recipe's network."""

from collections.abc import Callable, Iterator

import torch

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from gpu_parts.network import forget, new_network, random_images, recipe_network, steps_of, training_run
from gpu_parts.setting import NEEDS_CUDA, Row, Setting

TRAINING = {
    "float32": ["--mixed_precision", "no"],
    "bf16": ["--mixed_precision", "bf16"],
    "bf16, gradient checkpointing": ["--mixed_precision", "bf16", "--gradient_checkpointing"],
}


def measure(setting: Setting) -> Iterator[Row]:
    images = random_images(setting)
    for name, flags in TRAINING.items():

        def train(name: str = name, flags: list[str] = flags) -> None:
            steps = steps_of(training_run(setting, images, name, *flags))
            for _ in range(3):
                next(steps)
            steps.close()

        yield peak(setting, f"peak memory, training, {name}", train)
    config, batch_size = recipe_network(setting), 2 if setting.quick else 256
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):

        def sample(dtype: torch.dtype = dtype) -> None:
            unet = new_network(config).eval().to(setting.device, dtype)
            pipe = DDPMNotesPipeline(unet, DDPMNotesScheduler())
            pipe(batch_size, num_inference_steps=3, output_type="pt")

        yield peak(setting, f"peak memory, sampling {batch_size} images, {name}", sample)


def peak(setting: Setting, what: str, call: Callable[[], None]) -> Row:
    forget()
    if not setting.cuda:
        call()
        return Row(what, NEEDS_CUDA)
    torch.cuda.reset_peak_memory_stats()
    call()
    gib = torch.cuda.max_memory_allocated() / 2**30
    return Row(what, f"{gib:.3g} GiB", gib)
