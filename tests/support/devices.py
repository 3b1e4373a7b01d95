"""Where the suites of scheduler, pipeline, objectives and updates put their tensors.

    DDPM_NOTES_DEVICE=cuda pytest tests/test_scheduling_ddpm_notes.py

Noise is drawn on the CPU on any device, so that a seed has the same numbers everywhere.
"""

import os

import torch

DEVICE = torch.device(os.environ.get("DDPM_NOTES_DEVICE", "cpu"))
