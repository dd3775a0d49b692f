"""Parameters that an update does not read, and that need a gradient nevertheless.

Data-parallel reducers wait for a gradient of every parameter.
"""

from typing import Iterable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.autograd import Context, Function


def with_unread(rows: Tensor, parameters: Iterable[Optional[Tensor]]) -> Tensor:
    """Return *rows* as they are, with a gradient of zero for those of *parameters* that are not None."""
    learned = [p for p in parameters if p is not None]
    if not learned or not torch.is_grad_enabled():
        return rows
    same: Tensor = _Unread.apply(rows, *learned)
    return same


def no_contribution(parameters: Iterable[Optional[Tensor]]) -> Tensor:
    """Return zero, with a gradient of zero for those of *parameters* that are not None."""
    used = [p.sum(dtype=torch.float32) for p in parameters if p is not None]
    return 0.0 * torch.stack(used).sum() if used else torch.zeros(())


class _UnreadContext(Context):
    parameters: Tuple[Tensor, ...]  # for their shapes: they may change before the backward pass


class _Unread(Function):
    @staticmethod
    def forward(ctx: _UnreadContext, rows: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        # As padded as before, and no view to autograd, which would refuse changes in place.
        same: Tensor = Tensor._make_subclass(type(rows), rows.detach())
        return same

    @staticmethod
    @once_differentiable
    def backward(ctx: _UnreadContext, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        zeros = (
            torch.zeros_like(p) if needed else None
            for p, needed in zip(ctx.parameters, ctx.needs_input_grad[1:], strict=True)
        )
        return grad, *zeros
