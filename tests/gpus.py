"""Tests that need GPUs.

Apart from the other helpers, which are imported before processes are forked: none can use a GPU once its parent has
asked for one.
"""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
