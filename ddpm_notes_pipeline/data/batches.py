"""What global step n of training sees: a pure function of (seed, n).

The images of step n are positions n*B ... n*B + B-1 of an endless sequence of epochs, where epoch e
is a permutation drawn from (seed, e). Flips, crops, noise and uniforms come from generators seeded
by (seed, n, name of the draw); they are drawn for the whole global batch, then sliced. No state is
carried from step to step: resuming is asking for step n, whatever the number of processes.
"""

import zlib
from typing import Any

import numpy as np
import torch

from .image_set import ImageSet


def step_seed(seed: int, step: int, stream: str) -> int:
    """The seed, in [0, 2**63), of the draw called `stream` at global step `step` of a run.

    torch's CPU generator keeps its low 32 bits.

    Raises:
        ValueError: `seed` (of the run) or `step` is negative.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed is {seed}, step is {step}; both must be at least 0")
    words = np.random.SeedSequence([seed, step, zlib.crc32(stream.encode())]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


class StepBatches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Item n is this process's share of global step n, whatever was asked for before.

    Use it as `DataLoader(batches, batch_size=None, sampler=range(first_step, last_step))`. It
    splits the global batch over processes by itself: do not pass that loader to
    `accelerator.prepare`.

    An item, with b = batch_size / num_processes:
        pixel_values: uint8 (b, C, H, W); `to_model_range` maps it to [-1, 1].
        noise: float32 (b, C, H, W), standard normal.
        u: float64 (b,), uniform in [0, 1), to draw timesteps with.
        class_labels: int64 (b,), if the set has labels.

    Each epoch holds every image once, in an order of its own; a batch that an epoch cannot fill
    continues into the next.

    Args:
        images: from `load_images`.
        batch_size: images in a global step, of all processes.
        seed: of the run.
        process_index, num_processes: the share is images [process_index*b, (process_index+1)*b).
        random_flip: mirror left-right with probability 1/2.
        label_dropout: probability that a label becomes `null_label`, for classifier-free guidance.
        null_label: the label that means "no class", usually `images.num_classes`.
        num_steps: the length, where one is needed.

    Raises:
        ValueError: arguments that do not fit together.
        IndexError: a step below 0, or from num_steps on.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        random_flip: bool = False,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        num_steps: int | None = None,
    ) -> None:
        if batch_size < 1 or num_processes < 1 or batch_size % num_processes:
            raise ValueError(f"batch_size (of all processes) is {batch_size}; it must be a multiple of {num_processes}")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}; it must be in 0..{num_processes - 1}")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is {label_dropout}; it must be a probability, 0..1")
        classes = images.num_classes
        if label_dropout > 0 and (classes is None or null_label is None or null_label < classes):
            raise ValueError(
                f"label_dropout {label_dropout} needs images with a label_column (classes: {classes}) and a null_label that is none of the classes (got {null_label})"
            )
        step_seed(seed, 0, "epoch")  # a bad seed fails here rather than in a worker
        self.images, self.batch_size, self.seed, self.num_steps = images, batch_size, seed, num_steps
        self.random_flip, self.label_dropout, self.null_label = random_flip, label_dropout, null_label
        share = batch_size // num_processes
        self.share = slice(process_index * share, (process_index + 1) * share)
        self._epoch: tuple[int, np.ndarray] = (-1, np.arange(0))

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("these StepBatches have no length: they were made without num_steps")
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            raise IndexError(f"step {step} must be in 0..{'' if self.num_steps is None else self.num_steps - 1}")
        images = self.images
        pixel_values, labels = self.read(step, self._draw(torch.rand, step, "crop", 2, dtype=torch.float64).numpy())
        if self.random_flip:
            flipped = self._draw(torch.rand, step, "flip") < 0.5
            pixel_values[flipped] = pixel_values[flipped].flip(-1)
        item = {
            "pixel_values": pixel_values,
            "noise": self._draw(torch.randn, step, "noise", images.channels, *images.size),
            "u": self._draw(torch.rand, step, "u", dtype=torch.float64),
        }
        if labels is not None:
            item["class_labels"] = labels
            if self.label_dropout > 0 and self.null_label is not None:
                dropped = self._draw(torch.rand, step, "label_dropout", dtype=torch.float64) < self.label_dropout
                labels[dropped] = self.null_label
        return item

    def read(self, step: int, crop_at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This process's images, uint8 (b, C, H, W), and labels of a step; `crop_at` is (b, 2)."""
        index, labels = self.indices(step), self.images.labels
        return self.images.take(index, crop_at), None if labels is None else torch.from_numpy(labels[index])

    def indices(self, step: int) -> np.ndarray:
        """(b,) int64: the images of this process at a global step."""
        position = step * self.batch_size + np.arange(self.share.start, self.share.stop)
        epoch, within = np.divmod(position, len(self.images))
        return np.concatenate([self._order(e)[within[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)])

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            generator = torch.Generator("cpu").manual_seed(step_seed(self.seed, epoch, "epoch"))
            self._epoch = (epoch, torch.randperm(len(self.images), generator=generator, device="cpu").numpy())
        return self._epoch[1]

    def _draw(self, kind: Any, step: int, stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """This process's rows of a draw for the whole global batch."""
        generator = torch.Generator("cpu").manual_seed(step_seed(self.seed, step, stream))
        drawn = kind((self.batch_size, *shape), generator=generator, dtype=dtype, device="cpu")
        # A slice keeps the whole draw alive, and a DataLoader worker would send all of it.
        return drawn if self.share.stop - self.share.start == len(drawn) else drawn[self.share].clone()
