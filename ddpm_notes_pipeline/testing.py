"""Moved to ddpm_notes_pipeline.oracles."""

import warnings

from .oracles import CoinDenoiser, ExactDenoiser, GaussianDenoiser

__all__ = ["CoinDenoiser", "ExactDenoiser", "GaussianDenoiser"]

warnings.warn("ddpm_notes_pipeline.testing has moved to ddpm_notes_pipeline.oracles", DeprecationWarning, stacklevel=2)
