"""Reading and writing associations by kernels: `attention.py` describes both.

Shapes: B streams, H heads, N rows of each, D size of a head, D' its padded size.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import rows
from ...kernels.autograd import Context, Function

LARGEST_HEAD = 248


def takes(heads: Tensor, matrix: Tensor) -> bool:
    """Tell whether the kernels take ``heads [B, H, N, D or D']`` with ``matrix [B, H, D, D]``."""
    fits = rows.fusable(heads) and heads.numel() > 0
    return fits and matrix.dtype == torch.float32 and matrix.size(-1) <= LARGEST_HEAD


def segment_sums(k: Tensor, v: Tensor, size: int) -> Tuple[Tensor, Tensor]:
    """Return ``sigma(K)^T V [B, H, D, D]`` and ``sum sigma(K) [B, H, D]``, float32, of ``[B, H, N, D or D']``."""
    sums: Tuple[Tensor, Tensor] = _Sums.apply(k, v, size)
    return sums


def mixed(q: Tensor, local: Tensor, matrix: Tensor, normalizer: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return ``(1 - gate) local + gate sigma(Q) M / (sigma(Q) z + eps)``, as *local* ``[B, H, N, D or D']``.

    Args:
        q: ``[B, H, N, D or D']``.
        matrix, normalizer, gate: ``[B, H, D, D]``, ``[B, H, D]`` and ``[B, H]``, float32.
    """
    out: Tensor = _Mixed.apply(q, local, matrix, normalizer, gate, eps)
    return out


class _SumsContext(Context):
    size: int


class _Sums(Function):
    @staticmethod
    def forward(ctx: _SumsContext, k: Tensor, v: Tensor, size: int) -> Tuple[Tensor, Tensor]:
        from . import kernel

        k, v = rows.by_rows(k), rows.by_rows(v)
        features, values = kernel.features(k, size, v)
        ctx.save_for_backward(k, features, values)
        ctx.size = size
        joined = features.transpose(2, 3) @ values
        return joined[:, :, :size, :size], joined[:, :, :size, size]

    @staticmethod
    @once_differentiable
    def backward(ctx: _SumsContext, d_matrix: Tensor, d_normalizer: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import kernel

        k, features, values = ctx.saved_tensors
        grad = _joined(d_matrix, d_normalizer)
        dk, dv = kernel.features_gradient(k, ctx.size, values @ grad.transpose(2, 3), features @ grad)
        return dk, dv, None


class _MixedContext(Context):
    size: int
    eps: float


class _Mixed(Function):
    @staticmethod
    def forward(
        ctx: _MixedContext, q: Tensor, local: Tensor, matrix: Tensor, normalizer: Tensor, gate: Tensor, eps: float
    ) -> Tensor:
        from . import kernel

        q, local, gate, size = rows.by_rows(q), rows.by_rows(local), gate.contiguous(), matrix.size(-1)
        joined = _joined(matrix, normalizer)
        features, _ = kernel.features(q, size)
        read = features @ joined
        ctx.save_for_backward(q, local, gate, joined, features, read)
        ctx.size, ctx.eps = size, eps
        return kernel.mixed(local, read, gate, size, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: _MixedContext, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import kernel

        q, local, gate, joined, features, read = ctx.saved_tensors
        size = ctx.size
        d_local, d_read, d_gate = kernel.mixed_gradient(local, read, gate, rows.by_rows(grad), size, ctx.eps)
        dq, _ = kernel.features_gradient(q, size, d_read @ joined.transpose(2, 3))
        d_matrix = d_normalizer = None
        if any(ctx.needs_input_grad[2:4]):
            d_joined = features.transpose(2, 3) @ d_read
            d_matrix, d_normalizer = d_joined[:, :, :size, :size], d_joined[:, :, :size, size]
        return dq, d_local, d_matrix, d_normalizer, d_gate, None


def _joined(matrix: Tensor, normalizer: Tensor) -> Tensor:
    """Return a matrix with its normaliser behind it as one factor of features: ``[B, H, F, W]``, zeros elsewhere."""
    from . import kernel

    size = matrix.size(-1)
    joined = matrix.new_zeros(*matrix.shape[:2], *kernel.stored(size))
    joined[:, :, :size, :size] = matrix
    joined[:, :, :size, size] = normalizer
    return joined
