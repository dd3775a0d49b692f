"""Projections as heads, and heads whose size breaks alignment.

Heads of such a size, for example 41, are padded with zeros to D' numbers, by padding the weights that make them. The
scale of the scores stays that of D.

Shapes: B streams, R rows, Q queries, H heads, D size of a head, n projections.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import aligned
from ..kernels.autograd import Context, Function
from ..kernels.module_tree import is_plain, is_product
from ..kernels.padded import narrowed, of_weight, widened
from ..kernels.shared import Shared, add_product, shared_of


def split_heads(rows: Tensor, projections: int, heads: int) -> Tuple[Tensor, ...]:
    """Return the n *projections* of ``rows [B, R, n H D]``, views of it: ``[B, H, R, D]`` each."""
    if torch.is_grad_enabled() and rows.requires_grad:
        split: Tuple[Tensor, ...] = _SplitHeads.apply(rows, projections, heads)
        return split
    return _views(rows, projections, heads)


def _views(rows: Tensor, projections: int, heads: int) -> Tuple[Tensor, ...]:
    return tuple(projection.transpose(1, 2) for projection in rows.unflatten(-1, (projections, heads, -1)).unbind(2))


class _SplitHeads(Function):
    """Views of one tensor. If their gradients are adjacent views of one buffer, that buffer is returned uncopied."""

    @staticmethod
    def forward(ctx: Context, rows: Tensor, projections: int, heads: int) -> Tuple[Tensor, ...]:
        return _views(rows.detach(), projections, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> Tuple[Tensor, None, None]:
        gradients = [grad.transpose(1, 2) for grad in grads]
        if not _side_by_side(gradients):
            return torch.stack(gradients, dim=2).flatten(2), None, None
        batch, length, heads, size = gradients[0].shape
        width = len(gradients) * heads * size
        return gradients[0].as_strided((batch, length, width), (length * width, width, 1)), None, None


def _side_by_side(gradients: List[Tensor]) -> bool:
    """Tell whether tensors ``[B, R, H, D]`` are all the slices of one tensor ``[B, R, n, H, D]``, in order."""
    first = gradients[0]
    _, length, heads, size = first.shape
    width = len(gradients) * heads * size
    return all(
        gradient.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and gradient.storage_offset() == first.storage_offset() + n * heads * size
        and gradient.stride() == (length * width, width, size, 1)
        for n, gradient in enumerate(gradients)
    )


def project_last(new: Tensor, rows: Tensor, weight: Tensor, shared: Optional[Shared] = None) -> Tuple[Tensor, Tensor]:
    """Map ``new [B, Q, d]`` to queries, and ``rows [B, R, d]`` that end with them to keys and values.

    The rows before them are constants: they get no gradient, and none is computed.

    Args:
        weight: ``[3 H D, d]`` of queries, keys and values.
        shared: of *new*, if they have a residual too.

    Returns:
        ``[B, Q, H D]`` and ``[B, R, 2 H D]``.
    """
    projected: Tuple[Tensor, Tensor] = _ProjectLast.apply(new, rows.detach(), weight, shared)
    return projected


class _LastContext(Context):
    shared: Optional[Shared]


class _ProjectLast(Function):
    @staticmethod
    def forward(
        ctx: _LastContext, new: Tensor, rows: Tensor, weight: Tensor, shared: Optional[Shared]
    ) -> Tuple[Tensor, Tensor]:
        ctx.shared = shared
        ctx.save_for_backward(new, rows, weight)
        width = weight.size(0) // 3
        return F.linear(new, weight[:width]), F.linear(rows, weight[width:])

    @staticmethod
    @once_differentiable
    def backward(ctx: _LastContext, dq: Tensor, dkv: Tensor) -> Tuple[Optional[Tensor], ...]:
        new, rows, weight = ctx.saved_tensors
        width, slots = weight.size(0) // 3, rows.size(1) - new.size(1)
        d_new = d_weight = None
        if ctx.needs_input_grad[0]:
            d_new = add_product(ctx.shared, dq, weight[:width], new)
            d_new.baddbmm_(dkv[:, slots:], weight[width:].expand(len(rows), -1, -1))
        if ctx.needs_input_grad[2]:
            d_weight = torch.empty_like(weight)
            torch.mm(dq.flatten(0, 1).t(), new.flatten(0, 1), out=d_weight[:width])
            torch.mm(dkv.flatten(0, 1).t(), rows.flatten(0, 1), out=d_weight[width:])
        return d_new, None, d_weight, None


def mapped_to_heads(
    layer: nn.Linear, rows: Tensor, projections: int, heads: int, size: int, wide: bool
) -> Tuple[Tensor, ...]:
    """Map ``rows [B, R, d]`` to the heads of n *projections*: ``[B, H, R, D]`` each for D = *size*.

    If they may be *wide*, they are of D' numbers where that makes products faster.
    """
    if not (wide and size % 8 and aligned.matters(rows) and is_product(layer)):
        return split_heads(aligned.mapped(layer, rows), projections, heads)
    weight = wide_heads(layer.weight, size, dim=0)
    return split_heads(aligned.linear(widened(rows), weight, shared=shared_of(rows)), projections, heads)


def mapped_from_heads(layer: nn.Linear, heads: Tensor, size: int) -> Tensor:
    """Map heads ``[B, H, R, D or D']``, which D = *size* numbers are of, as one row each: ``[B, R, e]``."""
    rows = heads.transpose(1, 2)
    if heads.size(-1) == size or not is_plain(layer, nn.Linear):
        return aligned.mapped(layer, rows[..., :size].flatten(2))
    weight = wide_heads(layer.weight, size, dim=1)
    bias = layer.bias if layer.bias is None else F.pad(layer.bias, (0, len(weight) - layer.out_features))
    return narrowed(aligned.wide_linear(rows.flatten(2), weight, bias), layer.out_features)


def wide_heads(weight: Tensor, size: int, dim: int) -> Tensor:
    """Pad a weight whose *dim* is heads of *size*: with zeros behind heads and the other dimension, to multiples of 8.

    Padding a weight costs little next to padding the heads of all rows.
    """

    def make() -> Tensor:
        by_head = weight.unflatten(dim, (-1, size))
        ends = [0 if n == dim else -length % 8 for n, length in enumerate(by_head.shape)]
        return F.pad(by_head, [zeros for end in reversed(ends) for zeros in (0, end)]).flatten(dim, dim + 1)

    return of_weight(weight, (size, dim), make)
