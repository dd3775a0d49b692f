"""Reduce the work of the host with ``--fp16`` and ``--bf16`` while the device has nothing to do.

fairseq copies between the parameters and their float32 copies one by one, when the GPU waits for the next update. Here
all copies run at once, gradients are freed once they are copied, and views of flat tensors are stored. An update can
also begin before the host has waited for the norm of the gradients.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple, cast

import torch
from fairseq.optim import fp16_optimizer
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..core.kernels.copies import copy_all
from .adam import FusedAdam


class FP16Optimizer(fp16_optimizer.FP16Optimizer):
    """fairseq's optimizer of the same name (checkpoints name it), with the same state and the same numbers.

    `optimizers.adopt` turns fairseq's into one, so that attributes are initialised in the class and not in
    ``__init__``.
    """

    _needs_sync: bool
    _count: Optional[Callable[[], None]] = None  # counts an update that the device has been given ahead of the host
    _views: Optional[Dict[str, Tuple[int, List[Tensor]]]] = None  # by name: the address of a flat tensor, and its views

    def _sync_fp16_grads_to_fp32(self) -> None:
        """Move the gradients to the float32 parameters, unless they have been moved already."""
        if not self._needs_sync:  # fairseq asks three times an update
            return
        gradients = [p.grad for p in self.fp16_params]
        masters = self._one_by_one("grad")
        if masters is None or any(g is None for g in gradients):
            return super()._sync_fp16_grads_to_fp32()
        copy_all(masters, cast(List[Tensor], gradients))
        self._needs_sync = False
        for p in self.fp16_params:
            p.grad = None

    def _sync_fp32_params_to_fp16(self) -> None:
        """Copy the float32 parameters to the model's parameters, rounded."""
        masters = self._one_by_one("data")
        if masters is None:
            return super()._sync_fp32_params_to_fp16()
        copy_all([p.data for p in self.fp16_params], masters)

    def begin_step(self, norm: Tensor, max_norm: float) -> bool:
        """Give the device the update before the host knows the norm of the gradients and calls `step`.

        The update is scaled and clipped as by fairseq, to the last bit; where the norm is not finite, parameters and
        moments stay.

        Args:
            norm: of the gradients before they are scaled, a scalar on the device.
            max_norm: to clip to, 0 for no clipping.

        Returns:
            Whether the update was given. An update that `FusedAdam` cannot do is not given.
        """
        inner, given = self.fp32_optimizer.optimizer, self._multiply_factor
        if type(inner) is not FusedAdam or not inner.serves():
            return False
        gradients = [p.grad for p in self.fp32_optimizer.params if p.grad is not None]
        if any(g.device != norm.device for g in gradients):  # fairseq computes norms on a GPU if there is one
            return False
        dtype = norm.dtype
        if torch.is_tensor(given):  # of several ranks: they divide by numbers that they have exchanged, in float64
            if given.device.type != "cpu":
                return False
            dtype = torch.promote_types(given.dtype, norm.dtype)
        factor = torch.full_like(norm, float(given), dtype=dtype)
        scaled = factor * norm
        if max_norm > 0 and self.scaler is None:
            factor = factor * (max_norm / (scaled + 1e-6)).clamp(max=1)
        elif max_norm > 0:
            factor = torch.where(scaled > max_norm, factor * (max_norm / scaled), factor)
        torch._foreach_mul_(gradients, factor.to(norm.dtype))
        self._count = inner.begin_step(skip=(~scaled.isfinite()).float())
        self._sync_fp32_params_to_fp16()
        return True

    def step(self, closure: Any = None, groups: Any = None) -> None:
        """Update the parameters; for an update that has begun, only the bookkeeping is left."""
        count, self._count = self._count, None
        if count is None:
            return super().step(closure, groups)
        self._finish(count)

    def _finish(self, count: Callable[[], None]) -> None:
        count()
        self._multiply_factor = 1.0
        if self.scaler is not None:
            self.scaler.update()

    def zero_grad(self) -> None:
        """Clear the gradients. An update begins with this call, or one that overflowed ends."""
        self._count = None
        super().zero_grad()

    def _one_by_one(self, name: str) -> Optional[List[Tensor]]:
        """Return ``data`` or ``grad`` of the float32 parameters in the shapes of the model's.

        None where fairseq does more than copy.
        """
        masters, params = self.fp32_params, self.fp16_params
        if not all(p.requires_grad for p in params):
            return None
        if not isinstance(masters, dict):
            tensors = [getattr(p, name) for p in masters]
            return None if any(t is None for t in tensors) else tensors
        if len(masters) != 1:  # a pipeline over several devices
            return None
        flat = getattr(next(iter(masters.values())), name)
        self._views = self._views or {}
        if name not in self._views or self._views[name][0] != flat.data_ptr():
            self._views[name] = flat.data_ptr(), list(_unflatten_dense_tensors(flat, params))
        return self._views[name][1]
