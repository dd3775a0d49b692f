"""Features of keys and queries, by a kernel if possible.

Shapes: e width of a key, F = 6 e its features.
"""

from typing import Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import rows
from ...kernels.autograd import Context, Function

_ROLLS = (1, 2, 3)


def dpfp(keys: Tensor) -> Tensor:
    """Return the features of ``keys [.., e]``: ``[.., 6 e]``, not negative, in float32 or wider.

    This is the deterministic parameter-free projection (Schlag et al. 2021, equation 37) with three rolls. The features
    are products of ``x = [relu(u) ; relu(-u)]`` and ``x`` rolled by 1, 2 and 3.
    """
    if takes(keys, keys.size(-1)):
        features: Tensor = _Features.apply(keys)
        return features
    return plain(keys)


def takes(like: Tensor, size: int) -> bool:
    """Tell whether the kernels take keys of *size* numbers, in as many rows and of the dtype of *like*."""
    return rows.fusable(like) and like.numel() > 0 and size >= len(_ROLLS)


def plain(keys: Tensor) -> Tensor:
    """Compute `dpfp` by PyTorch's operations."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    x = torch.cat([keys.relu(), (-keys).relu()], dim=-1)
    return torch.cat([x * x.roll(shift, dims=-1) for shift in _ROLLS], dim=-1)


class _Features(Function):
    @staticmethod
    def forward(ctx: Context, keys: Tensor) -> Tensor:
        from . import features_kernel

        ctx.save_for_backward(keys)
        return features_kernel.forward(keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Tuple[Tensor]:
        from . import features_kernel

        (keys,) = ctx.saved_tensors
        return (features_kernel.backward(keys, grad),)
