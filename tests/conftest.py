"""One thread for all tests: tensors here are tiny, and threads that wait for each other cost more than they bring.

Without a GPU, Triton kernels are interpreted; Triton reads the variable when it is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
