"""Moved to ddpm_notes_pipeline.data.batches."""

import warnings
from typing import Any

from .data import batches


def __getattr__(name: str) -> Any:
    value = getattr(batches, name)
    warnings.warn(
        "ddpm_notes_pipeline.batches has moved to ddpm_notes_pipeline.data.batches", DeprecationWarning, stacklevel=2
    )
    return value
