"""Gaussian radial basis functions on [0, 1], and their expectations under a Gaussian density.

Shapes: J basis functions (N_b of the paper), * any.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import rows
from ...kernels.autograd import Context, Function


@dataclass(frozen=True)
class RadialBasis:
    """``psi_j(t) = N(t; c_j, w_j^2)``: at every one of evenly spaced centres from 0 to 1 a function of each width.

    Args:
        count: J, a multiple of the number of widths.
        widths: the standard deviations.
    """

    count: int
    widths: Tuple[float, ...]

    def evaluate(self, points: Tensor) -> Tensor:
        """Return ``psi [*, J]`` at *points* ``[*]``."""
        return self.expectation(points, torch.zeros_like(points))

    def expectation(self, mean: Tensor, variance: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
        """Return ``E[psi_j(t)]``, ``[*, J]``, for ``t ~ N(mean, variance)``, both ``[*]``; in *dtype* if it is given.

        The product of two Gaussians integrates to a Gaussian: ``N(mean; c_j, variance + w_j^2)``
        (Martins et al. 2020, *Sparse and continuous attention mechanisms*).
        """
        given, dtype = (mean, variance, *self.grid(mean)), dtype or mean.dtype
        return by_kernel(*given, dtype) if takes(mean) else plain(*given, dtype)

    def grid(self, like: Tensor) -> Tuple[Tensor, Tensor]:
        """Return centres and squared widths ``[J]``, in the dtype and on the device of *like*."""
        return _grid(self, like.device, like.dtype)


# The cache is by value: models share its tensors, and no checkpoint has them. Made on the host in float64, whatever the
# default device, and never as inference tensors, which later training could not use.
@lru_cache(maxsize=64)
def _grid(basis: RadialBasis, device: torch.device, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        centres = torch.linspace(0, 1, basis.count // len(basis.widths), dtype=torch.float64, device="cpu")
        widths = torch.tensor(basis.widths, dtype=torch.float64, device="cpu")
        centres, widths = centres.repeat_interleave(len(widths)), widths.repeat(len(centres))
        return centres.to(device, dtype), widths.square().to(device, dtype)


def takes(mean: Tensor) -> bool:
    """Return whether the kernels take densities with such means: in float32, on a GPU."""
    return mean.dtype == torch.float32 and rows.fusable(mean)


def plain(mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the densities ``[*, J]`` by PyTorch's operations."""
    density: Tensor = _Gaussian.apply(mean, variance, centres, squares)
    return density.to(dtype)


def by_kernel(mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the densities ``[*, J]`` by one kernel; another computes the gradients."""
    density: Tensor = _GaussianByKernel.apply(mean.contiguous(), variance.contiguous(), centres, squares, dtype)
    return density


class _GaussianByKernel(Function):
    @staticmethod
    def forward(
        ctx: Context, mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor, dtype: torch.dtype
    ) -> Tensor:
        from . import basis_kernel

        ctx.save_for_backward(mean, variance, centres, squares)
        return basis_kernel.forward(mean, variance, centres, squares, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        from . import basis_kernel

        return *basis_kernel.backward(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _Gaussian(Function):
    """Densities ``[*, J]`` that save nothing as large as themselves for the backward pass."""

    @staticmethod
    def forward(ctx: Context, mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor) -> Tensor:
        ctx.save_for_backward(mean, variance, centres, squares)
        return _density(mean, variance, centres, squares)[0]

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tuple[Tensor, Tensor, None, None]:
        density, offset, total = _density(*ctx.saved_tensors)
        weighted = grad * density / total
        by_variance = 0.5 * (offset.square() / total - 1)
        return -(weighted * offset).sum(-1), (weighted * by_variance).sum(-1), None, None


def _density(mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the density, ``mean - c_j`` and the variance of the sum, ``[*, J]`` each."""
    offset, total = mean.unsqueeze(-1) - centres, variance.unsqueeze(-1) + squares
    return (-0.5 * offset.square() / total).exp() * (2 * math.pi * total).rsqrt(), offset, total
