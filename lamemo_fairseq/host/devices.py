"""``--cpu`` on a machine that has GPUs."""

from contextlib import contextmanager
from typing import Iterator

import torch


@contextmanager
def without_gpus(hide: bool) -> Iterator[None]:
    """If *hide*, let torch report meanwhile that there is no GPU.

    fairseq asks torch in places that do not look at ``--cpu``: when it clips gradients, keeps random states and loads
    batches ahead.
    """
    former = torch.cuda.is_available, torch.cuda.device_count
    if hide:
        torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count = former
