"""The parts of gpu_check.py, each a module with a function `measure(setting)` that gives rows."""
