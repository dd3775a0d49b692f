"""``--cpu`` on a machine that has GPUs."""

from contextlib import contextmanager
from typing import Iterator

import torch


@contextmanager
def without_gpus(hide: bool) -> Iterator[None]:
    """Let torch report that there is no GPU in this context, if *hide*.

    fairseq asks torch in places that do not look at ``--cpu``: when it clips gradients, stores random states and loads
    batches ahead.
    """
    former = torch.cuda.is_available, torch.cuda.device_count
    if hide:
        torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count = former
