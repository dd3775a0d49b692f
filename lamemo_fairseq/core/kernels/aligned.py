"""Products whose widths break the 16-byte alignment that tensor cores are fast with.

Widths such as 410 and 2100 are padded with zeros for the product alone; parameters keep their shapes. Rows that stand
16 bytes apart already, as the layers' kernels leave them (`residual.py`), are taken with what is behind them. So the
rule is: rows whose storage is wider than they are hold finite numbers there, which the weights' zeros make harmless.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autograd import Context, Function
from .parts import is_plain
from .rows import readable


def matters(x: Tensor) -> bool:
    """Whether alignment makes products of *x* faster: in half precision on a GPU."""
    return x.is_cuda and x.element_size() == 2 and not torch.is_autocast_enabled("cuda")


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, keep_padding: bool = False) -> Tensor:
    """``x [.., d]`` times ``weight [e, d]`` as `F.linear`: ``[.., e]``.

    x may already be wider than d, by zeros or by anything finite, or be rows of wider storage. With *keep_padding* the
    result may be wider than e, by zeros, which saves a copy where another product takes it.
    """
    if not any(size % 8 for size in (x.size(-1), *weight.shape)) or not matters(x):
        return F.linear(x, weight, bias)
    product = F.linear(widened(x), padded(weight, 2), None if bias is None else padded(bias))
    return product if keep_padding else product[..., : weight.size(0)]


def through(layer: nn.Module, x: Tensor, width: int, keep_padding: bool = False) -> Tensor:
    """``x [.., d]``, perhaps wider, through a layer that takes d = *width*: `linear` with an `nn.Linear`'s parameters.

    Any other layer, a low-rank adapter for one, and one with hooks is called.
    """
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias, keep_padding)
    mapped: Tensor = layer(x[..., :width])
    return mapped


def padded(t: Tensor, dims: int = 1) -> Tensor:
    """Zeros behind the last *dims* dimensions, up to multiples of 8."""
    amounts = [amount for size in reversed(t.shape[-dims:]) for amount in (0, -size % 8)]
    return F.pad(t, amounts) if any(amounts) else t


def widened(rows: Tensor) -> Tensor:
    """``rows [.., d]`` up to a multiple of 8: with the numbers behind them where they have some, else with zeros."""
    if rows.size(-1) % 8 == 0 or rows.stride(-1) != 1 or readable(rows) % 8:
        return padded(rows)
    wide: Tensor = _Widen.apply(rows)
    return wide


class _WidenContext(Context):
    width: int


class _Widen(Function):
    @staticmethod
    def forward(ctx: _WidenContext, rows: Tensor) -> Tensor:
        ctx.width = rows.size(-1)
        # No view to autograd, which would refuse changes in place.
        return rows.as_strided((*rows.shape[:-1], readable(rows)), rows.stride()).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: _WidenContext, grad: Tensor) -> Tensor:
        return grad[..., : ctx.width]
