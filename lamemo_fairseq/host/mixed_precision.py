"""``--fp16`` and ``--bf16``: copies between the parameters and the float32 ones behind them, all at once.

fairseq copies one parameter after another while the GPU, which it has just waited for, has nothing else to do. For the
same reason gradients are freed once they are copied, before the host waits, and parts of flat tensors are kept.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple, cast
from weakref import WeakKeyDictionary

from fairseq.optim import fp16_optimizer
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..modules.copies import copy_all
from .stand_in import stand_in

_OPTIMIZER: Any = fp16_optimizer._FP16OptimizerMixin
# By optimizer and name, of the flat tensor: its address and its parts.
_PARTS: "WeakKeyDictionary[Any, Dict[str, Tuple[int, List[Tensor]]]]" = WeakKeyDictionary()


@stand_in(_OPTIMIZER, "_sync_fp16_grads_to_fp32")
def copy_gradients(original: Callable[..., Any], optimizer: Any) -> None:
    """From the parameters, which then have none, to the float32 ones, unless that has been done already."""
    if not optimizer._needs_sync:  # fairseq asks three times an update
        return
    gradients = [p.grad for p in optimizer.fp16_params]
    masters = _one_by_one(optimizer, "grad")
    if masters is None or any(g is None for g in gradients):
        return original(optimizer)
    copy_all(masters, cast(List[Tensor], gradients))
    optimizer._needs_sync = False
    for p in optimizer.fp16_params:
        p.grad = None


@stand_in(_OPTIMIZER, "_sync_fp32_params_to_fp16")
def copy_parameters(original: Callable[..., Any], optimizer: Any) -> None:
    """From the float32 parameters to those of the model, rounded."""
    masters = _one_by_one(optimizer, "data")
    if masters is None:
        return original(optimizer)
    copy_all([p.data for p in optimizer.fp16_params], masters)


def _one_by_one(optimizer: Any, what: str) -> Optional[List[Tensor]]:
    """``data`` or ``grad`` of the float32 parameters in the shapes of the model's; None where fairseq does more."""
    held, params = optimizer.fp32_params, optimizer.fp16_params
    if not all(p.requires_grad for p in params):
        return None
    if not isinstance(held, dict):
        tensors = [getattr(p, what) for p in held]
        return None if any(t is None for t in tensors) else tensors
    if len(held) != 1:  # a pipeline over several devices
        return None
    flat = getattr(next(iter(held.values())), what)
    kept = _PARTS.setdefault(optimizer, {})
    if what not in kept or kept[what][0] != flat.data_ptr():
        kept[what] = flat.data_ptr(), list(_unflatten_dense_tensors(flat, params))
    return kept[what][1]
