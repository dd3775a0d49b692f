"""The operations between two blocks of a layer: ``layer_norm(residual + dropout(x + bias))``, by a kernel if possible.

Half-precision rows of a width that breaks alignment, such as 410, come out as `PaddedRows`: products of them need no
copy (`aligned.py`).

Shapes: B streams, R rows of each, d width.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import rows
from .autograd import Context, Function
from .module_tree import is_plain
from .padded import WideRows, cut, stored_width
from .shared import Shared

LARGEST_WIDTH = 4096


def residual_norm(
    x: WideRows,
    residual: Tensor,
    norm: nn.LayerNorm,
    dropout: nn.Dropout,
    bias: Optional[Tensor] = None,
    shared: Optional[Shared] = None,
) -> Tensor:
    """Return ``norm(residual + dropout(x + bias))``.

    Args:
        x: ``[.., d]``, or wider by zeros.
        residual: ``[.., d]``, with any strides.
        norm, dropout: an `nn.LayerNorm` and an `nn.Dropout`, or modules in place of them, which are then called.
        bias: ``[d]`` or None.
        shared: of *residual*, whose gradient a product may take.

    Returns:
        ``[.., d]`` in the dtype given; the kernel's sums and statistics are in float32.
    """
    if takes(x, residual, norm, dropout, bias):
        return by_kernel(x, residual, norm, chance(dropout), bias, torch.is_grad_enabled(), shared)[1]
    return plain(x, residual, norm, dropout, bias)[1]


def residual_sum_and_norm(
    x: WideRows, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout
) -> Tuple[Tensor, Tensor]:
    """Return ``(sum, norm)``: the result of `residual_norm` without a bias, and the sum that it normalises."""
    if takes(x, residual, norm, dropout):
        total, normed = by_kernel(x, residual, norm, chance(dropout))
        assert total is not None
        return total, normed
    return plain(x, residual, norm, dropout)


def takes(x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout, bias: Optional[Tensor] = None) -> bool:
    """Tell whether the kernel does all that *norm* and *dropout* would, hooks and replaced classes included."""
    if not rows.fusable(residual) or residual.size(-1) > LARGEST_WIDTH:
        return False
    if not is_affine(norm) or chance(dropout) >= 1:
        return False
    given = [t for t in (x, norm.weight, norm.bias, bias) if t is not None]
    return all(t.dtype == residual.dtype and t.device == residual.device for t in given)


def chance(dropout: nn.Dropout) -> float:
    """Return the probability of a zero of an `nn.Dropout` in its mode; 1 for any other module."""
    if not is_plain(dropout, nn.Dropout):
        return 1.0
    return dropout.p if dropout.training else 0.0


def is_affine(norm: nn.Module) -> bool:
    """Tell whether calling *norm* is a layer norm over rows with a gain and a bias."""
    if not is_plain(norm, nn.LayerNorm):
        return False
    return norm.weight is not None and norm.bias is not None and len(norm.normalized_shape) == 1


Map = Callable[[Tensor], Tensor]


def plain(x: Tensor, residual: Tensor, norm: Map, dropout: Map, bias: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Compute sum and norm by PyTorch's operations."""
    x = x[..., : residual.size(-1)]
    total = residual + dropout(x if bias is None else x + bias)
    return total, norm(total)


def by_kernel(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: float, bias: Optional[Tensor] = None, keep: bool = True,
    shared: Optional[Shared] = None,
) -> Tuple[Optional[Tensor], Tensor]:  # fmt: skip
    """Compute sum and norm by one kernel, their gradients by another; without *keep*, no sum and no gradients."""
    d = residual.size(-1)
    if x.size(-1) not in (d, stored_width(residual, d)):
        x = x[..., :d]
    seed = rows.draw_seed(x, dropout)
    parameters = norm.weight, norm.bias, bias, norm.eps
    total, normed = _ResidualNorm.apply(x, residual, *parameters, seed, dropout, keep, shared)
    return total, normed


class _Notes(Context):
    dropout: float
    with_bias: bool
    width_x: int
    shared: Optional[Shared]


class _ResidualNorm(Function):
    @staticmethod
    def forward(
        ctx: _Notes, x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, bias: Optional[Tensor], eps: float,
        seed: Optional[Tensor], dropout: float, keep: bool, shared: Optional[Shared],
    ) -> Tuple[Optional[Tensor], Tensor]:  # fmt: skip
        from . import residual_kernel

        d = residual.size(-1)
        out, saved = residual_kernel.forward(x, bias, residual, gamma, beta, eps, seed, dropout, keep)
        if saved is None:
            return None, cut(out, d)
        ctx.save_for_backward(*saved, gamma, seed)
        ctx.dropout, ctx.with_bias, ctx.width_x, ctx.shared = dropout, bias is not None, x.size(-1), shared
        ctx.set_materialize_grads(False)
        return cut(saved.total, d), cut(out, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Notes, grad_sum: Optional[Tensor], grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        from . import residual_kernel

        *saved, gamma, seed = ctx.saved_tensors
        if grad is None:
            assert grad_sum is not None
            grad = torch.zeros_like(grad_sum)
        dx, ds, parameters = residual_kernel.backward(
            grad, grad_sum, residual_kernel.Saved(*saved), gamma, seed, ctx.dropout, ctx.with_bias
        )
        d_gamma, d_beta, *d_bias = parameters.unbind()
        d_residual = cut(ds, grad.size(-1))
        if ctx.shared is not None and dx is not ds:
            ctx.shared.store(ds)
        dx = d_residual if dx is ds and ctx.width_x == grad.size(-1) else cut(dx, ctx.width_x)
        return dx, d_residual, d_gamma, d_beta, d_bias[0] if d_bias else None, *(None,) * 5
