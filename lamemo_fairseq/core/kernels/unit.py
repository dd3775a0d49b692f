"""Heads of length 1, times a factor for each head: by a kernel if possible.

Shapes: B streams, H heads, R rows, D size of a head, D' its padded size.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rows
from .autograd import Context, Function

SMALLEST_SQUARE = 1e-6  # smallest squared length, as in the code of the models with such heads
LARGEST_HEAD = 256


def unit(heads: Tensor, factor: Optional[Tensor] = None) -> Tensor:
    """Return ``factor heads / sqrt(|heads|^2 + 1e-6)`` of heads ``[B, H, R, D or D']``, in their shape and dtype.

    Args:
        factor: ``[H]``, in float32 or wider; None is 1.
    """
    if rows.fusable(heads) and heads.size(-1) <= LARGEST_HEAD:
        normalized: Tensor = _Unit.apply(heads, factor)
        return normalized
    return plain(heads, factor)


def plain(heads: Tensor, factor: Optional[Tensor] = None) -> Tensor:
    """Compute `unit` by PyTorch's operations, in float32 or wider."""
    exact = heads.to(torch.promote_types(heads.dtype, torch.float32))
    normalized = exact * (exact.square().sum(-1, keepdim=True) + SMALLEST_SQUARE).rsqrt()
    return (normalized if factor is None else normalized * factor[:, None, None]).to(heads.dtype)


class _Unit(Function):
    @staticmethod
    def forward(ctx: Context, heads: Tensor, factor: Optional[Tensor]) -> Tensor:
        from . import unit_kernel

        heads = rows.by_rows(heads)
        ctx.save_for_backward(heads, factor)
        return unit_kernel.forward(heads, factor, SMALLEST_SQUARE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import unit_kernel

        heads, factor = ctx.saved_tensors
        grad = rows.by_rows(grad)
        return unit_kernel.backward(heads, factor, grad, SMALLEST_SQUARE)
