"""Projections as heads, and heads whose size breaks alignment.

Heads of such a size, 41 for one, may be followed by zeros, D' numbers in all: weights padded with zeros make them so,
and the scale of the scores stays that of D.

Shapes: B streams, R rows, Q queries, H heads, D size of a head, n projections.
"""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.autograd import Context, Function


def split_heads(rows: Tensor, parts: int, heads: int) -> Tuple[Tensor, ...]:
    """The parts of ``[B, R, n H D]``, views of it: n times ``[B, H, R, D]``."""
    if torch.is_grad_enabled() and rows.requires_grad:
        split: Tuple[Tensor, ...] = _SplitHeads.apply(rows, parts, heads)
        return split
    return _views(rows, parts, heads)


def _views(rows: Tensor, parts: int, heads: int) -> Tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in rows.unflatten(-1, (parts, heads, -1)).unbind(2))


class _SplitHeads(Function):
    """Gradients that lie side by side, as the fused attention leaves them, are the gradient of the rows as they are."""

    @staticmethod
    def forward(ctx: Context, rows: Tensor, parts: int, heads: int) -> Tuple[Tensor, ...]:
        return _views(rows.detach(), parts, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> Tuple[Tensor, None, None]:
        parts = [grad.transpose(1, 2) for grad in grads]
        if not _side_by_side(parts):
            return torch.stack(parts, dim=2).flatten(2), None, None
        batch, rows, heads, size = parts[0].shape
        width = len(parts) * heads * size
        return parts[0].as_strided((batch, rows, width), (rows * width, width, 1)), None, None


def _side_by_side(parts: List[Tensor]) -> bool:
    """Whether ``[B, R, H, D]`` each are the parts of one tensor ``[B, R, n, H, D]``, all of them and in order."""
    first = parts[0]
    _, rows, heads, size = first.shape
    width = len(parts) * heads * size
    return all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + n * heads * size
        and part.stride() == (rows * width, width, size, 1)
        for n, part in enumerate(parts)
    )


def wide_heads(weight: Tensor, size: int, dim: int) -> Tensor:
    """A weight whose *dim* is heads of *size*, with zeros behind heads and the other dimension up to multiples of 8.

    Padding a weight costs little next to padding the heads of all rows.
    """
    parts = weight.unflatten(dim, (-1, size))
    ends = [0 if n == dim else -length % 8 for n, length in enumerate(parts.shape)]
    return F.pad(parts, [zeros for end in reversed(ends) for zeros in (0, end)]).flatten(dim, dim + 1)
