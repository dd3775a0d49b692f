"""Triton kernels: expected Gaussian basis functions, and their gradients; nothing of their size is stored between.

Shapes: T densities, J basis functions.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import TILE

WIDEST = 256  # basis functions of a tile


@triton.jit
def _gaussian(p_mean, p_variance, p_centres, p_squares, row, column, T, J):
    """Return density, distance from the centre and variance of the sum, ``[rows, columns]``."""
    b_mean = tl.load(p_mean + row, row < T, other=0.0)[:, None]
    b_variance = tl.load(p_variance + row, row < T, other=1.0)[:, None]
    b_offset = b_mean - tl.load(p_centres + column, column < J, other=0.0)[None, :]
    b_total = b_variance + tl.load(p_squares + column, column < J, other=1.0)[None, :]
    return tl.exp(-0.5 * b_offset * b_offset / b_total) / tl.sqrt(6.283185307179586 * b_total), b_offset, b_total


@triton.jit
def expectation_kernel(
    p_mean, p_variance, p_centres, p_squares, p_out, T, J, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_density, _, _ = _gaussian(p_mean, p_variance, p_centres, p_squares, row, column, T, J)
    offset = row.to(tl.int64)[:, None] * J + column[None, :]
    tl.store(p_out + offset, b_density.to(p_out.dtype.element_ty), (row < T)[:, None] & (column < J)[None, :])


@triton.jit
def expectation_gradient_kernel(
    p_grad, p_mean, p_variance, p_centres, p_squares, p_dmean, p_dvariance, T, J,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_dmean = tl.zeros([ROWS], tl.float32)
    b_dvariance = tl.zeros([ROWS], tl.float32)
    for start in range(0, J, BLOCK):
        column = start + tl.arange(0, BLOCK)
        b_density, b_offset, b_total = _gaussian(p_mean, p_variance, p_centres, p_squares, row, column, T, J)
        offset = row.to(tl.int64)[:, None] * J + column[None, :]
        b_grad = tl.load(p_grad + offset, (row < T)[:, None] & (column < J)[None, :], other=0.0).to(tl.float32)
        b_weighted = b_grad * b_density / b_total
        b_dmean -= tl.sum(b_weighted * b_offset, 1)
        b_dvariance += tl.sum(b_weighted * 0.5 * (b_offset * b_offset / b_total - 1), 1)
    tl.store(p_dmean + row, b_dmean, row < T)
    tl.store(p_dvariance + row, b_dvariance, row < T)


def forward(mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``N(mean; c_j, variance + w_j^2)``, ``[*, J]`` in *dtype*, of contiguous ``[*]`` in float32."""
    out = mean.new_empty(*mean.shape, len(centres), dtype=dtype)
    if out.numel():
        tile = _tile(len(centres))
        grid = (triton.cdiv(mean.numel(), tile["ROWS"]), triton.cdiv(len(centres), tile["BLOCK"]))
        expectation_kernel[grid](mean, variance, centres, squares, out, mean.numel(), len(centres), **tile)
    return out


def backward(
    grad: Tensor, mean: Tensor, variance: Tensor, centres: Tensor, squares: Tensor
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of mean and variance; *grad* ``[*, J]`` is contiguous."""
    d_mean, d_variance = torch.empty_like(mean), torch.empty_like(variance)
    if mean.numel():
        tile = _tile(len(centres))
        expectation_gradient_kernel[(triton.cdiv(mean.numel(), tile["ROWS"]),)](
            grad, mean, variance, centres, squares, d_mean, d_variance, mean.numel(), len(centres), **tile
        )
    return d_mean, d_variance


def _tile(functions: int) -> dict[str, int]:
    block = min(WIDEST, triton.next_power_of_2(functions))
    return {"ROWS": TILE // block, "BLOCK": block, "num_warps": 4}
