"""Any `datasets` image set as batches that are a function of (seed, step)."""

from .batches import StepBatches, step_seed
from .images import EMBEDDED, HELD_OUT, MODES, ImageSet, hold_out, load_images, to_model_range, to_uint8
from .streaming import ImageStream, StreamedBatches, open_stream

__all__ = [
    "EMBEDDED",
    "HELD_OUT",
    "MODES",
    "ImageSet",
    "ImageStream",
    "StepBatches",
    "StreamedBatches",
    "hold_out",
    "load_images",
    "open_stream",
    "step_seed",
    "to_model_range",
    "to_uint8",
]
