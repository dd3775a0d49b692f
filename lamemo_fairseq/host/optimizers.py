"""fairseq's optimizers, made into this package's: the same state and numbers, with less for the host to wait for.

fairseq builds an optimizer as ever, and `adopt` changes its class. So its state, the names in checkpoints and other
references to it stay, and an optimizer of another model is not touched.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Callable, Collection, Iterator, Optional, Type

import torch
from fairseq.optim import FairseqOptimizer, build_optimizer, fp16_optimizer
from fairseq.optim.adam import Adam
from torch import Tensor

from ..core.kernels.copies import copy_to_host
from .adam import FusedAdam
from .mixed_precision import FP16Optimizer

_MEANWHILE: ContextVar[Optional[Callable[[Tensor], None]]] = ContextVar("meanwhile", default=None)


@contextmanager
def meanwhile(do: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``do(norm)`` in this context before the host waits for the norm, which is a scalar on the device."""
    token = _MEANWHILE.set(do)
    try:
        yield
    finally:
        _MEANWHILE.reset(token)


class WaitingOnce(FairseqOptimizer):
    """The first base of each of fairseq's optimizers: the host waits for the device once an update, at the norm.

    fairseq leaves values on the device and asks the device for each of them, some after the optimizer has begun. The
    device then has nothing to do until the host has logged the update and prepared the next batch.
    """

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """Return the norm on the host. fairseq reads it several times: for the log, and to find infinity and NaN."""
        norm = super().clip_grad_norm(max_norm, aggregate_norm_fn)
        wait = copy_to_host(norm)
        do = _MEANWHILE.get()
        if do is not None:
            do(norm)
        return wait()

    def multiply_grads(self, c: Any) -> None:
        """Multiply by a number, where *c* is a tensor on the host: fairseq would copy it to the device, and wait."""
        super().multiply_grads(c.item() if torch.is_tensor(c) and c.device.type == "cpu" else c)


@cache
def _waiting_once(kind: Any) -> Type[FairseqOptimizer]:
    """Return the class that waits once. It has the name of fairseq's class, since checkpoints hold that name."""
    return type(kind.__name__, (WaitingOnce, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def put_options(options: Any, names: Collection[str], state: Any) -> None:
    """Put the values of options into the state of an optimizer; fairseq would go on with the values in the state.

    The learning rate is left to the schedule.

    Args:
        options: fairseq's section of the optimizer.
        names: of the options.
        state: a checkpoint's. Of several optimizers in one it stays as it is.
    """
    groups = state.get("param_groups", []) if isinstance(state, dict) else []
    if not (names and groups):
        return
    [group] = build_optimizer(options, [torch.nn.Parameter(torch.zeros(1))]).param_groups
    for key in group.keys() - {"params", "lr"}:
        if any(name == key or name.endswith(f"_{key}") for name in names):  # adam_betas and betas
            for saved in groups:
                saved[key] = group[key]


def adopt(optimizer: Any) -> None:
    """Turn an optimizer that fairseq has built, and all within it, into this package's."""
    within = [vars(optimizer).get(name) for name in ("fp32_optimizer", "wrapped_optimizer", "_optimizer")]
    within += getattr(optimizer, "optimizers", {}).values()  # of --optimizer composite
    for inner in within:
        if isinstance(inner, FairseqOptimizer):
            adopt(inner)
        for algorithm in (inner, getattr(inner, "optim", None)):  # --zero-sharding wraps the algorithm
            if type(algorithm) is Adam:
                algorithm.__class__ = FusedAdam
    kind: Any = type(optimizer)
    if kind is fp16_optimizer.FP16Optimizer:
        optimizer.__class__ = FP16Optimizer
    elif (
        kind.clip_grad_norm is FairseqOptimizer.clip_grad_norm or kind.multiply_grads is FairseqOptimizer.multiply_grads
    ):
        optimizer.__class__ = _waiting_once(kind)
