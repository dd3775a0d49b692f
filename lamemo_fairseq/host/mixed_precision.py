"""``--fp16`` and ``--bf16``: less to do for the host while the device has nothing to do.

fairseq copies between the parameters and the float32 ones behind them one by one, when the GPU waits for the next
update. Here all go at once, gradients are freed once they are copied, and parts of flat tensors are kept. And an update
can begin before the host has waited for the norm of the gradients.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple, cast
from weakref import WeakKeyDictionary

import torch
from fairseq.optim import fp16_optimizer
from fairseq.optim.adam import Adam
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..core.kernels.copies import copy_all
from . import adam
from .stand_in import stand_in

_OPTIMIZER: Any = fp16_optimizer._FP16OptimizerMixin
# By optimizer and name, of the flat tensor: its address and its parts.
_PARTS: "WeakKeyDictionary[Any, Dict[str, Tuple[int, List[Tensor]]]]" = WeakKeyDictionary()
# By optimizer, what counts an update that the device has been given and the host has not heard of.
_BEGUN: "WeakKeyDictionary[Any, Callable[[], None]]" = WeakKeyDictionary()


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


def begin_step(optimizer: Any, norm: Tensor, max_norm: float) -> bool:
    """Give the device the update that `step` is asked for once the host knows the norm of the gradients.

    Scaled and clipped as fairseq does it, to the last bit; where the norm is not finite, parameters and moments stay.

    Args:
        norm: of the gradients before they are scaled, a scalar on the device.
        max_norm: to clip to, 0 for not at all.

    Returns:
        Whether it was given. It is not where the update is another than that of `adam`.
    """
    inner = optimizer.fp32_optimizer.optimizer
    if type(inner) is not Adam or torch.is_tensor(optimizer._multiply_factor) or not adam.serves(inner):
        return False
    gradients = [p.grad for p in optimizer.fp32_optimizer.params if p.grad is not None]
    if any(g.device != norm.device for g in gradients):  # fairseq computes norms on a GPU if there is one
        return False
    factor = torch.full_like(norm, optimizer._multiply_factor)
    scaled = factor * norm
    if max_norm > 0 and optimizer.scaler is None:
        factor = factor * (max_norm / (scaled + 1e-6)).clamp(max=1)
    elif max_norm > 0:
        factor = torch.where(scaled > max_norm, factor * (max_norm / scaled), factor)
    torch._foreach_mul_(gradients, factor)
    _BEGUN[optimizer] = adam.begin_step(inner, skip=(~scaled.isfinite()).float())
    optimizer._sync_fp32_params_to_fp16()
    return True


@stand_in(_OPTIMIZER, "step")
def step(original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """The update, of which only the bookkeeping is left if it has begun."""
    count = _BEGUN.pop(optimizer, None)
    if count is None:
        return original(optimizer, *args, **kwargs)
    _finish(optimizer, count)


def _finish(optimizer: Any, count: Callable[[], None]) -> None:
    count()
    optimizer._multiply_factor = 1.0
    if optimizer.scaler is not None:
        optimizer.scaler.update()


@stand_in(_OPTIMIZER, "zero_grad")
def zero_grad(original: Callable[..., None], optimizer: Any) -> None:
    """With it an update begins, or one that overflowed ends."""
    _BEGUN.pop(optimizer, None)
    original(optimizer)


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
