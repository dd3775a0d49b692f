"""Reading a layer's memory by kernels: `association.py` describes it.

Shapes: B streams, R rows, d model width, e width of a key, F = 6 e its features.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.autograd import Context, Function
from ...kernels.padded import cut
from ...kernels.residual import LARGEST_WIDTH
from ...kernels.shared import Shared
from . import features as phi


def takes(rows: Tensor, matrix: Tensor) -> bool:
    """Tell whether the kernels read ``matrix [B, F, d]`` into ``rows [B, R, d]``."""
    fits = matrix.dtype == torch.float32 and rows.size(-1) <= LARGEST_WIDTH
    return fits and phi.takes(rows, matrix.size(1) // 6)


def by_kernels(
    rows: Tensor, keys: Tensor, matrix: Tensor, normalizer: Tensor, eps: float, shared: Optional[Shared] = None
) -> Tensor:
    """Return ``rows + A phi / (z . phi + eps)`` for the features phi of ``keys [B, R, e]``, in the dtype of *rows*.

    Products with A round as the model does. Those of a write keep single precision, as what they miss stays in A.

    Args:
        rows: ``[B, R, d]``.
        matrix, normalizer: ``[B, F, d]`` and ``[B, F]``, in float32.
        shared: of *rows*, whose gradient the product that made the keys may take.
    """
    read: Tensor = _Recall.apply(rows, keys, matrix, normalizer, eps, shared)
    return read


class _RecallContext(Context):
    shared: Optional[Shared]


class _Recall(Function):
    @staticmethod
    def forward(
        ctx: _RecallContext, rows: Tensor, keys: Tensor, matrix: Tensor, normalizer: Tensor, eps: float,
        shared: Optional[Shared],
    ) -> Tensor:  # fmt: skip
        from . import features_kernel, recall_kernel
        from .product_kernel import ROUNDED, product

        keys, matrix, normalizer = keys.contiguous(), matrix.contiguous(), normalizer.contiguous()
        features, overlap = features_kernel.with_overlap(keys, keys.size(-1), normalizer, 1.0, eps)
        recalled = product(features, matrix, rows, precision=ROUNDED)
        ctx.save_for_backward(keys, matrix, normalizer, features, overlap, recalled)
        ctx.shared = shared
        return cut(recall_kernel.mixed(rows, recalled, overlap), rows.size(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: _RecallContext, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import features_kernel, recall_kernel
        from .product_kernel import ROUNDED, product

        keys, matrix, normalizer, features, overlap, recalled = ctx.saved_tensors
        d_recalled, d_overlap, d_rows = recall_kernel.mixed_gradient(grad, recalled, overlap)
        d_features = product(d_recalled, matrix.transpose(1, 2), grad, precision=ROUNDED)
        d_keys = features_kernel.backward(keys, d_features, features_kernel.Overlap(normalizer, d_overlap))
        d_matrix = d_normalizer = None
        if ctx.needs_input_grad[2]:
            d_matrix = product(features.transpose(1, 2), d_recalled, grad, precision=ROUNDED)
        if ctx.needs_input_grad[3]:
            d_normalizer = (d_overlap.unsqueeze(1) @ features).squeeze(1)
        if ctx.shared is not None:
            ctx.shared.store(d_rows)
        return cut(d_rows, grad.size(-1)), d_keys, d_matrix, d_normalizer, None, None
