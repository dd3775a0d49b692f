"""Rows that a product and a residual share: the product adds the residual's gradient to its own.

PyTorch would add the two in a pass over memory of its own. Gradients are the same whichever of the two comes first, and
where the product is left out.

Shapes: B streams, R rows of each, d width, e width of the product.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autograd import Context, Function
from .rows import fusable

_SHARED = "_lamemo_shared"


class Shared:
    """The gradient of a residual, from when it is known until a product of the same rows takes it."""

    def __init__(self) -> None:
        self.gradient: Optional[Tensor] = None
        self.taken = False

    def store(self, gradient: Tensor) -> None:
        """Store a gradient ``[B, R, d or wider]``, contiguous, which may be overwritten."""
        self.gradient, self.taken = gradient, False

    def take(self, like: Tensor) -> Optional[Tensor]:
        """Return the gradient if it is there, and as large as *like*."""
        gradient = self.gradient
        if gradient is None or gradient.shape != like.shape or gradient.dtype != like.dtype:
            return None
        self.gradient, self.taken = None, True
        return gradient


def as_residual(rows: Tensor) -> Tuple[Tensor, Optional[Shared]]:
    """Return ``rows [B, R, d]`` for a residual; products of *rows* that come later may add the residual's gradient.

    The operation that uses the residual stores its gradient in `Shared`, and returns it as well.
    """
    if not torch.is_grad_enabled() or not rows.requires_grad or not fusable(rows):
        return rows, None
    shared = Shared()
    residual: Tensor = _Residual.apply(rows, shared)
    setattr(rows, _SHARED, (shared, rows._version))
    return residual, shared


def shared_of(rows: Tensor) -> Optional[Shared]:
    """Return what `as_residual` has made of *rows*, unless they have changed since."""
    shared, version = getattr(rows, _SHARED, (None, 0))
    return shared if shared is not None and rows._version == version else None


def product(rows: Tensor, weight: Tensor, shared: Shared) -> Tensor:
    """Return ``rows [B, R, d]`` times ``weight [e, d]``: ``[B, R, e]``."""
    made: Tensor = _Product.apply(rows, weight, shared)
    return made


def add_product(shared: Optional[Shared], grad: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """Return ``grad [B, R, e]`` times ``weight [e, d]``, and the residual's gradient if it is there: as *like*."""
    given = None if shared is None else shared.take(like)
    if given is None:
        return grad @ weight
    given.view(-1, given.size(-1)).addmm_(grad.flatten(0, -2), weight)
    return given


class _ResidualContext(Context):
    shared: Shared


class _Residual(Function):
    """Runs after the products in the backward pass, as it is made before them: autograd begins with what is newest."""

    @staticmethod
    def forward(ctx: _ResidualContext, rows: Tensor, shared: Shared) -> Tensor:
        ctx.shared = shared
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ResidualContext, grad: Tensor) -> Tuple[Optional[Tensor], None]:
        taken, ctx.shared.gradient, ctx.shared.taken = ctx.shared.taken, None, False
        return None if taken else grad, None


class _Product(Function):
    @staticmethod
    def forward(ctx: _ResidualContext, rows: Tensor, weight: Tensor, shared: Shared) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ResidualContext, grad: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor], None]:
        rows, weight = ctx.saved_tensors
        d_rows = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = add_product(ctx.shared, grad, weight, rows)
        if ctx.needs_input_grad[1]:
            d_weight = grad.flatten(0, -2).t() @ rows.flatten(0, -2)
        return d_rows, d_weight, None
