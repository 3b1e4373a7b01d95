"""Moved to ddpm_notes_pipeline.data.batches."""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    value = getattr(importlib.import_module("ddpm_notes_pipeline.data.batches"), name)
    warnings.warn(
        "ddpm_notes_pipeline.batches has moved to ddpm_notes_pipeline.data.batches", DeprecationWarning, stacklevel=2
    )
    return value
