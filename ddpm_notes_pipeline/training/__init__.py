"""The engine of a training run."""
