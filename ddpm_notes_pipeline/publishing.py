"""The command `python -m ddpm_notes_pipeline.publishing FOLDER`: push a Hub folder. What it does is in hub/publishing.py."""

from .hub.publishing import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
