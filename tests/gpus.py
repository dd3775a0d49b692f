"""Tests that need GPUs.

Apart from the other helpers, which are imported before processes are forked: none can use a GPU once its parent has
asked for one.
"""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu(1)  # skipped without one; tests that use DEVICE are marked by conftest.py
gpus = pytest.mark.gpu(2)
