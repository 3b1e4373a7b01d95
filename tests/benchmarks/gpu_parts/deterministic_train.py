"""training/train.py with deterministic kernels; with STOP_AT=n, it gets SIGTERM at step n.

cuDNN, attention and the matrix products choose kernels that add in any order otherwise. Those of
cuBLAS also need CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment.
"""

import os
import runpy
import signal

import torch

from tests.support.launching import TRAIN, signal_at

torch.use_deterministic_algorithms(True)
if "STOP_AT" in os.environ:
    signal_at(int(os.environ["STOP_AT"]), signal.SIGTERM)
runpy.run_path(str(TRAIN), run_name="__main__")
