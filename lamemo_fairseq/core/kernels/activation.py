"""The operations between a feed-forward layer's two products: ``dropout(relu(x + bias))``, by a kernel if possible.

Shapes: W columns of rows, the width of the feed-forward layer.
"""

from typing import Optional, Tuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rows
from .autograd import Context, Function
from .padded import WideRows


def relu_dropout(x: WideRows, dropout: float, training: bool, bias: Optional[Tensor] = None) -> WideRows:
    """Return ``dropout(relu(x + bias))``.

    Args:
        x: ``[.., W]``.
        dropout: the probability of a zero, if *training*.
        bias: at most W numbers, for the first columns, or None.

    Returns:
        ``[.., W]`` in the dtype given.
    """
    p = dropout if training else 0.0
    return WideRows(by_kernel(x, p, bias) if takes(x, p, bias) else plain(x, p, bias))


def takes(x: Tensor, dropout: float, bias: Optional[Tensor] = None) -> bool:
    return rows.fusable(x) and dropout < 1 and (bias is None or (bias.dtype, bias.device) == (x.dtype, x.device))


def plain(x: Tensor, dropout: float, bias: Optional[Tensor] = None) -> Tensor:
    """Compute `relu_dropout` by PyTorch's operations."""
    if bias is not None:
        x = x + F.pad(bias, (0, x.size(-1) - len(bias)))
    return F.dropout(F.relu(x), dropout, dropout > 0)


def by_kernel(x: Tensor, dropout: float, bias: Optional[Tensor] = None) -> Tensor:
    """Compute `relu_dropout` by one kernel, the gradients by another."""
    activated: Tensor = _ReluDropout.apply(x.contiguous(), bias, rows.draw_seed(x, dropout), dropout)
    return activated


class _Notes(Context):
    dropout: float
    bias_width: Optional[int]


class _ReluDropout(Function):
    @staticmethod
    def forward(ctx: _Notes, x: Tensor, bias: Optional[Tensor], seed: Optional[Tensor], dropout: float) -> Tensor:
        from . import activation_kernel

        out = activation_kernel.forward(x, bias, seed, dropout)
        ctx.save_for_backward(out)
        ctx.dropout, ctx.bias_width = dropout, None if bias is None else len(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Notes, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import activation_kernel

        (out,) = ctx.saved_tensors
        dx, d_bias = activation_kernel.backward(grad.contiguous(), out, ctx.dropout, ctx.bias_width)
        return dx, d_bias, None, None
