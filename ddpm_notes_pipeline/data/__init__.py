"""Any `datasets` image set as batches that are a function of (seed, step)."""

from ..core.levels import to_model_range, to_uint8
from .batches import StepBatches, step_seed
from .image_set import HELD_OUT, ImageSet, hold_out
from .images import load_images
from .sources import EMBEDDED, MODES
from .streaming import ImageStream, StreamedBatches, open_stream

__all__ = ["EMBEDDED", "HELD_OUT", "MODES", "ImageSet", "hold_out", "load_images", "to_model_range", "to_uint8"]
__all__ += ["ImageStream", "StepBatches", "StreamedBatches", "open_stream", "step_seed"]
