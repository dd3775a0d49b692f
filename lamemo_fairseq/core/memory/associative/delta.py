"""The delta rule that writes into a layer's memory, by kernels if possible: `association.py` describes it.

Shapes: B streams, m memory tokens, d model width, e width of a key, F = 6 e its features,
W >= e + d + 1 columns of the maps ``[k ; v ; gate]``.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.autograd import Context, Function
from . import features

LARGEST_COUNT = 64  # memory tokens: a program has their products with each other in registers


def takes(rows: Tensor, matrix: Tensor) -> bool:
    """Tell whether the kernels write ``rows [B, m, d]`` into ``matrix [B, F, d]``."""
    fits = matrix.dtype == torch.float32 and rows.size(1) <= LARGEST_COUNT
    return fits and features.takes(rows, matrix.size(1) // 6)


def by_kernels(
    maps: Tensor, bias: Tensor, matrix: Tensor, normalizer: Tensor, eps: float, decay: float, unit: float
) -> Tuple[Tensor, Tensor]:
    """Return the matrix and the normaliser after a write.

    Args:
        maps: ``[B, m, W]``, all maps of the memory tokens; values are multiples of *unit*.
        bias: ``[1]``, of the gates, which is not in the maps.
        matrix, normalizer: ``[B, F, d]`` and ``[B, F]``, of before, in float32.
        eps: is added to denominators.
    """
    written: Tuple[Tensor, Tensor] = _Write.apply(maps, bias, matrix, normalizer, eps, decay, unit)
    return written


class _WriteContext(Context):
    decay: float
    unit: float


class _Write(Function):
    @staticmethod
    def forward(
        ctx: _WriteContext, maps: Tensor, bias: Tensor, matrix: Tensor, normalizer: Tensor, eps: float, decay: float,
        unit: float,
    ) -> Tuple[Tensor, Tensor]:  # fmt: skip
        from . import delta_kernel

        maps, matrix, normalizer = maps.contiguous(), matrix.contiguous(), normalizer.contiguous()
        new_matrix, new_normalizer, written = delta_kernel.forward(maps, bias, matrix, normalizer, eps, decay, unit)
        ctx.save_for_backward(maps, bias, matrix, normalizer, *written)
        ctx.decay, ctx.unit = decay, unit
        return new_matrix, new_normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: _WriteContext, d_matrix: Tensor, d_normalizer: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import delta_kernel

        maps, bias, matrix, normalizer, *written = ctx.saved_tensors
        d_maps, d_bias, *d_past = delta_kernel.backward(
            maps, matrix, normalizer, delta_kernel.Written(*written), d_matrix.contiguous(), d_normalizer.contiguous(),
            ctx.decay, ctx.unit, any(ctx.needs_input_grad[2:4]),
        )  # fmt: skip
        return d_maps, d_bias.to(bias.dtype), *d_past, None, None, None
