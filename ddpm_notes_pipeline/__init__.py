"""The math of the DDPM notes as Hugging Face components: a scheduler that is the math, a pipeline that runs it.

Names are imported when first used, so that `import ddpm_notes_pipeline` costs next to nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "DDPMNotesScheduler": "scheduling_ddpm_notes",
    "DDPMNotesSchedulerOutput": "scheduling_ddpm_notes",
    "DDPMNotesPipeline": "pipeline_ddpm_notes",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
