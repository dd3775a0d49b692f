"""Figures of an update on the host, for which it waits for the device once: at the norm of the gradients.

fairseq leaves them on the device and asks it about each of them, some after the optimizer has begun; the device then
has nothing to do until the host has logged the update and prepared the next batch.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Callable, Iterator, Optional

import torch
from fairseq import utils
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer
from torch import Tensor

from ..core.kernels.copies import copy_to_host
from .stand_in import stand_in

_MEANWHILE: ContextVar[Optional[Callable[[Tensor], None]]] = ContextVar("meanwhile", default=None)


@contextmanager
def meanwhile(do: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, ``do(norm)`` is called before the host waits for the norm, which is a scalar on the device."""
    token = _MEANWHILE.set(do)
    try:
        yield
    finally:
        _MEANWHILE.reset(token)


@stand_in(FairseqOptimizer, "clip_grad_norm")
def clip_grad_norm(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The norm, of which fairseq asks whether it is large, infinite and a number."""
    norm = original(*args, **kwargs)
    wait = copy_to_host(norm)
    do = _MEANWHILE.get()
    if do is not None:
        do(norm)
    return wait()


@stand_in(FairseqOptimizer, "multiply_grads")
def multiply_grads(original: Callable[..., None], optimizer: Any, factor: Any) -> None:
    """By a number, where the factor is a tensor on the host: fairseq would copy it to the device, and wait."""
    original(optimizer, factor.item() if torch.is_tensor(factor) and factor.device.type == "cpu" else factor)


@stand_in(Trainer, "_aggregate_logging_outputs")
def aggregate_logging_outputs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Sums over all ranks. fairseq divides gradients by one of them, if it is not zero."""
    return _on_the_host(original(*args, **kwargs))


@stand_in(Trainer, "_reduce_and_log_stats")
def reduce_and_log_stats(
    original: Callable[..., Any],
    trainer: Any,
    logging_outputs: Any,
    sample_size: Any,
    grad_norm: Optional[Tensor] = None,
) -> Any:
    """Log what the criterion computed; with a norm, that of an update whose backward pass the host has waited for."""
    if trainer.device.type == "cuda" and grad_norm is not None:
        # The optimizer has the current stream, and these figures are older.
        with torch.cuda.stream(_beside(trainer.device)):
            logging_outputs, sample_size = _on_the_host((logging_outputs, sample_size))
    return original(trainer, logging_outputs, sample_size, grad_norm)


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_the_host(sample: Any) -> Any:
    """All tensors within lists, tuples and dictionaries; their dtypes stay."""
    return utils.apply_to_sample(lambda t: t.cpu(), sample)
