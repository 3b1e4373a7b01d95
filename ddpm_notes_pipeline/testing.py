"""Moved to ddpm_notes_pipeline.oracles."""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    value = getattr(importlib.import_module("ddpm_notes_pipeline.oracles"), name)
    warnings.warn(
        "ddpm_notes_pipeline.testing has moved to ddpm_notes_pipeline.oracles", DeprecationWarning, stacklevel=2
    )
    return value
